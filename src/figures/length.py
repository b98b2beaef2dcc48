"""The loss by position, within the training context and beyond it."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sheet import Sheet, arch_marks, empty_sheet, log_axis
from .style import INK, ArchStyle, arch_styles, count, themed
from .tables import Tables, fine, order_archs, reasons, select

TITLE = "Beyond the training context: loss by the number of tokens read"
COLUMNS = (
    *("arch", "run_id", "context_length", "num_params", "position", "position_max", "num_targets", "num_documents"),
    *("loss", "loss_lo", "loss_hi", "excess", "excess_lo", "excess_hi", "confidence", "status"),
)
#: rows of panels: column of the table, label
ROWS = {"loss": "loss [nat/token]", "excess": "excess loss [nat/token]"}


def _curve(ax: Axes, rows: pd.DataFrame, value: str, style: ArchStyle, gid: str) -> None:
    """A line with a mark a bin and a band; broken where bins have no value."""
    rows = rows.sort_values("position")
    x, y, lo, hi = (rows[name].to_numpy(dtype=float) for name in ("position", value, f"{value}_lo", f"{value}_hi"))
    ax.fill_between(x, lo, hi, color=style.colour, alpha=0.18, lw=0, zorder=2)
    (line,) = ax.plot(x, y, color=style.colour, marker=style.marker, ms=3.5, lw=1.5, zorder=3)
    line.set_gid(gid)


def _ratio(value: float) -> str:
    """1/16, 1/2, 1, 8: a power of two as a fraction."""
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of two from low to high, 1 among them."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    step = math.ceil(len(powers) / most)
    return [2.0**power for power in powers if power % step == 0]


@themed
def length(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Loss, and its excess over that of the same tokens within T, against tokens read over T; a column a context."""
    table = tables.table("evaluation/length", *COLUMNS)
    shown = table[fine(table["status"])]
    if shown.empty:
        why = reasons(table) if len(table) else "no held-out document is longer than a training context"
        return empty_sheet(TITLE, f"no measurement: {why}")
    shown = shown.assign(position=shown["position"] / shown["context_length"])
    archs, styles = order_archs(shown["arch"]), arch_styles(tables.archs)
    contexts = sorted(shown["context_length"].unique())
    level = 100 * float(shown["confidence"].iloc[0])
    sheet = Sheet(
        TITLE,
        "Held-out documents; the line marks the training context T. Below: the loss minus that of the same tokens "
        f"after T/2 to T tokens (grey). Bands: {level:g} % intervals over documents.",
        nrows=len(ROWS),
        ncols=len(contexts),
        width=max(7.0, 3.6 * len(contexts)),
        row_height=2.6,
        sharex=True,
        sharey="row",
    )
    low = shown["position"].min() / 1.15
    high = 1.05 * max((shown["position_max"] / shown["context_length"]).max(), 1.0)
    for j, context in enumerate(contexts):
        for ax, value in zip(sheet.axes[:, j], ROWS):
            ax.axvline(1.0, color=INK, lw=1.0, zorder=1).set_gid(f"training-context-{context}")
            for arch in archs:
                mine = select(shown, arch=arch, context_length=context)
                for run, rows in mine.groupby("run_id", sort=False):
                    _curve(ax, rows, value, styles[arch], f"{value}-{arch}-{context}-{run}")
        sheet.axes[0, j].set_title(f"T = {count(context)} tokens")
        top, bottom = sheet.axes[:, j]
        bottom.axhline(0.0, color=INK, lw=0.8, zorder=1)
        bottom.axvspan(0.5, 1.0, color="#e8eaed", lw=0, zorder=0)
        top.set_xlim(low, high)
        bottom.set_xlabel("tokens read / training context T [1]")
    for label, row in zip(ROWS.values(), sheet.axes):
        row[0].set_ylabel(label)
        for ax in row:
            log_axis(ax, "x", _ratio, _ticks(low, high))
    sheet.handles = arch_marks(styles, archs, line="-")
    for context, rows in shown.groupby("context_length"):
        sizes = rows.drop_duplicates("run_id").set_index("arch")["num_params"]
        models = ", ".join(f"{styles[arch].name} {count(size)}" for arch, size in sizes.items())
        far = rows.loc[rows["position"].idxmax()]
        sheet.note(
            f"T = {count(context)}: {models} parameters; {far['num_documents']} documents in the last bin, "
            f"{count(far['num_targets'])} tokens."
        )
    left_out = int((~fine(table["status"])).sum())
    if left_out:
        sheet.note(f"{left_out} bins are left out: {reasons(table)}.")
    return sheet.finish()
