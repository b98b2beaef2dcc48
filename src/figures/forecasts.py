"""Leave-future-out: what the smaller budgets said about the next one, and what it gave."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .sheet import Sheet, arch_marks, empty_sheet, log_axis, mark, say, whiskers
from .style import INK, SOFT, arch_styles, count, flops, themed
from .tables import Tables, interval_percent, order_archs, reasons

TITLE = "Does a law hold one budget further?"
PANELS = {"num_params": "best model size N*", "num_tokens": "best training tokens D*", "loss": "least loss L*"}
FORMS = {"surface_gamma_fixed": "surface,\nγ = 1", "surface_gamma_free": "surface,\nγ free"}


def forecasts_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Every forecast, with the deviation of prediction and interval from what was observed [%]."""
    rows = tables["fits/forecasts"].copy()
    for end in ("", "_lo", "_hi"):
        rows[f"deviation{end}_percent"] = 100 * (rows[f"predicted{end}"] / rows["observed"] - 1)
    return rows


@themed
def forecasts(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Deviation of each prediction from the budget it did not see: N*, D*, L*, and the losses of single runs."""
    rows = forecasts_data(tables, config)
    drawable = rows[np.isfinite(rows["deviation_percent"])]
    if drawable.empty:
        why = reasons(rows) if len(rows) else "three budgets at one context are needed"
        return empty_sheet(TITLE, f"no fit to forecast from: {why}")
    archs, styles = order_archs(drawable["arch"]), arch_styles(tables.archs)
    level = interval_percent(config)
    sheet = Sheet(
        TITLE,
        "Left: power laws through all smaller budgets, at each budget they did not see; right: loss surfaces at the "
        f"largest. Bars: {level:g} % intervals of the prediction; hollow: the interval misses what was observed.",
        ncols=4,
        width=11.0,
        row_height=3.2,
        width_ratios=(1, 1, 1, 0.8),
    )
    for ax, (quantity, name) in zip(sheet.axes[0], PANELS.items()):
        here = drawable[drawable["quantity"] == quantity]
        for i, arch in enumerate(archs):
            for row in here[here["arch"] == arch].itertuples():
                place = row.flops_mean * 1.06 ** (i - 0.5) * 1.12 ** _rank(row.context_length, here["context_length"])
                _point(ax, place, row, styles[arch])
        ax.set_title(name)
        ax.set_xlabel("budget predicted [FLOPs]")
        if here.empty:
            say(ax, "too few budgets")
        else:
            log_axis(ax, "x", flops)
    last = sheet.axes[0, 3]
    places = {law: i for i, law in enumerate(FORMS)}
    surface = drawable[drawable["quantity"] == "val_loss"]
    for i, arch in enumerate(archs):
        for row in surface[surface["arch"] == arch].itertuples():
            place = places[row.law] + 0.25 * (i - 0.5 * (len(archs) - 1))
            _point(last, place, row, styles[arch], fine=row.coverage >= 0.5 * level / 100)
            if np.isfinite(row.coverage):
                last.annotate(
                    f"{100 * row.coverage:.0f} %", (place, row.deviation_percent), (6, 0), textcoords="offset points",
                    size=8, va="center", color=styles[arch].colour,
                )  # fmt: skip
    last.set_title("loss of each run")
    if surface.empty:
        say(last, "no surface")
    else:
        last.set_xticks(list(places.values()), list(FORMS.values()))
        last.set_xlim(-0.5, len(FORMS) - 0.3)
        context = count(surface["context_length"].iloc[0])
        sheet.note(
            f"Loss surfaces: context {context}, fitted to all runs with less compute than the largest budget; the mean "
            "of its runs is drawn, the numbers say how many of them lie in the interval of a single run."
        )
    for ax in sheet.axes[0]:
        ax.axhline(0, color=INK, lw=0.9, zorder=1)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    sheet.axes[0, 0].set_ylabel("predicted / observed − 1 [%]")
    sheet.handles = arch_marks(styles, archs)
    sheet.handles.append(mark("interval misses", SOFT, hollow=True))
    laws = drawable[drawable["law"] == "power_law"]
    if len(laws):
        sheet.note("Within a budget, contexts stand side by side, short ones left. " + _counts(laws))
    return sheet.finish()


def _rank(value: float, values: pd.Series) -> int:
    return sorted(values.unique()).index(value)


def _point(ax: Axes, place: float, row: Any, style: Any, fine: bool | None = None) -> None:
    fine = row.coverage == 1 if fine is None else fine
    whiskers(ax, place, 0, y_range=(row.deviation_lo_percent, row.deviation_hi_percent), colour=style.colour)
    ax.plot(
        [place], [row.deviation_percent], style.marker, ms=6, mec=style.colour if not fine else "white", mew=1.1,
        mfc=style.colour if fine else "white", zorder=5,
    )[0].set_gid(f"forecast-{row.quantity}-{row.arch}-{'covered' if fine else 'missed'}")  # fmt: skip


def _counts(laws: pd.DataFrame) -> str:
    parts = [
        f"{name.split()[-1]} {int(group['coverage'].sum())} of {int(group['coverage'].notna().sum())}"
        for quantity, name in PANELS.items()
        if len(group := laws[laws["quantity"] == quantity])
    ]
    return f"Covered: {', '.join(parts)}."
