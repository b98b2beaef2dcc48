"""What carries over from one study to another: a forest plot, a colour a study."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xlstm_scaling.accounting import label

from .sheet import Sheet, empty_sheet, mark
from .style import INK, OTHER_COLOURS, OTHER_MARKERS, SOFT, count, themed

TITLE = "What carries over from study to study"
RATIO = "FLOPs for equal loss"
LOSS = "exponent of the least loss"


def _panels(table: pd.DataFrame) -> list[tuple[str, str, float, pd.DataFrame]]:
    """(title, x label, neutral value, rows) of each group of quantities that share a scale."""
    ratio, loss = table["quantity"] == RATIO, table["quantity"].str.startswith(LOSS)
    groups = [
        ("Size and tokens", "exponent [1]", 0.0, table[~ratio & ~loss]),
        ("Loss", "exponent [1]", 0.0, table[loss]),
        ("Equal loss", "ratio of FLOPs [1]", 1.0, table[ratio]),
    ]
    return [group for group in groups if len(group[3])]


def _label(quantity: str, arch: str) -> str:
    separator = " / " if " / " in arch else " - "
    name = separator.replace("-", "−").join(map(label, arch.split(separator)))
    return f"{quantity.removeprefix('exponent of ')}\n{name}"


def _draw(ax: Axes, rows: pd.DataFrame, styles: dict[str, tuple[str, str]], neutral: float, room: int) -> None:
    """One panel, with room for so many lines: all panels have the same pitch."""
    lines = list(dict.fromkeys(zip(rows["quantity"], rows["arch"])))
    for y, (quantity, arch) in enumerate(lines):
        here = rows[(rows["quantity"] == quantity) & (rows["arch"] == arch)]
        for row in here.itertuples():
            colour, marker = styles[row.study]
            place = y + 0.62 / max(len(styles), 2) * (list(styles).index(row.study) - (len(styles) - 1) / 2)
            ax.hlines(place, row.lo, row.hi, color=colour, lw=1.8)
            point = ax.scatter([row.value], [place], s=36, marker=marker, color=colour, edgecolors="white", lw=0.6)
            point.set_gid(f"comparison-{row.study}-{row.verdict.replace(' ', '-')}")
        if (here["verdict"] == "differ").any():
            ax.text(1.01, y, "differ", transform=ax.get_yaxis_transform(), va="center", size=8, color=INK)
    ax.set_yticks(range(len(lines)), [_label(*line) for line in lines])
    ax.set_ylim(room - 0.4, -0.6)
    ax.axvline(neutral, color=SOFT, lw=1.1, ls=(0, (4, 3)), zorder=1)
    ax.grid(False, axis="y")


@themed
def comparison(table: pd.DataFrame) -> Figure:
    """Forest plot of the table ``comparison`` (docs/tables.md); "differ" where the interval of a difference to the
    first study leaves out 0."""
    shown = table[np.isfinite(table["value"].astype(float))]
    if shown.empty:
        return empty_sheet(TITLE, "none of the studies has a law with a usable fit")
    studies = list(dict.fromkeys(table.sort_index()["study"]))
    reference = next(iter(table.loc[table["verdict"] == "reference", "study"]), studies[0])
    studies.sort(key=lambda study: study != reference)
    styles = {s: (OTHER_COLOURS[i % 5], OTHER_MARKERS[i % 5]) for i, s in enumerate(studies)}
    panels = _panels(shown)
    lines = max(len(set(zip(rows["quantity"], rows["arch"]))) for *_, rows in panels)
    sheet = Sheet(
        TITLE,
        f"Exponents and ratios have no unit, so studies of any size and text can be compared. Bars are intervals of "
        f"each study; “differ”: the interval of a difference to {reference} leaves out 0.",
        ncols=len(panels),
        width=4.6 * len(panels),
        row_height=1.0 + (0.3 + 0.1 * len(studies)) * lines,
    )
    for ax, (title, axis, neutral, rows) in zip(sheet.axes[0], panels):
        _draw(ax, rows, styles, neutral, lines)
        ax.set_title(title)
        ax.set_xlabel(axis)
    for study, (colour, marker) in styles.items():
        contexts = sorted(shown.loc[shown["study"] == study, "context_length"].dropna().unique())
        where = ", context " + ", ".join(count(c) for c in contexts) if contexts else ""
        sheet.handles.append(mark(study + where, colour, marker, line="-"))
    return sheet.finish()
