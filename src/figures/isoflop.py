"""IsoFLOP curves: the loss against model size and tokens at fixed budgets."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sheet import Sheet, empty_sheet, hollow_mark, log_axis, mark, say, whiskers
from .style import FAILED, INK, arch_styles, count, flops, sequential, si, themed
from .tables import Tables, base_context, good_runs, interval_percent, order_archs, pick, reasons, tagged

VARIABLES = {"num_params": "model size N [parameters]", "num_tokens": "training tokens D [tokens]"}
TITLE = "IsoFLOP curves: each budget has a best model size"


def isoflop_runs(tables: Tables, context: int) -> pd.DataFrame:
    """Runs with a loss that belong to a budget at `context`."""
    runs = good_runs(tables)
    return runs[(runs["context_length"] == context) & runs["isoflop_tag"].notna()]


def parabola(cell: pd.Series, num: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Points on the fitted parabola of one cell of `fits/isoflop`, over the range of its runs."""
    x = np.geomspace(cell["x_min"], cell["x_max"], num)
    log_x = np.log10(x)
    return x, cell["a"] * log_x**2 + cell["b"] * log_x + cell["c"]


def has_curve(cell: pd.Series) -> bool:
    """Whether the cell holds coefficients and a range to draw them over."""
    return bool(np.all(np.isfinite(cell[["a", "b", "c", "x_min", "x_max"]].astype(float))) and cell["x_min"] > 0)


def draw_cell(ax: Axes, runs: pd.DataFrame, cell: pd.Series | None, variable: str, colour: Any, style: Any) -> bool:
    """Points, parabola and minimum of one cell; grey and hollow, and False, where it has no usable minimum."""
    fine = cell is not None and cell["status"] == "ok"
    tint = colour if fine else FAILED
    points = ax.scatter(
        runs[variable],
        runs["val_loss"],
        s=20,
        marker=style.marker,
        facecolors=[tint] if fine else "none",
        edgecolors="white" if fine else FAILED,
        linewidths=0.4 if fine else 1.0,
        zorder=3,
    )
    points.set_gid(f"runs-{style.name}-{variable}")
    if cell is not None and has_curve(cell):
        x, y = parabola(cell)
        ax.plot(x, y, color=tint, lw=1.5, ls="-" if fine else (0, (4, 3)), zorder=2)
    if fine:
        whiskers(
            ax,
            cell["x_opt"],
            cell["loss_opt"],
            x_range=(cell["x_opt_lo"], cell["x_opt_hi"]),
            y_range=(cell["loss_opt_lo"], cell["loss_opt_hi"]),
            colour=INK,
            width=1.2,
        )
        star = ax.plot([cell["x_opt"]], [cell["loss_opt"]], ls="none", marker="D", ms=6.5, mfc=tint, mec=INK, zorder=6)
        star[0].set_gid(f"minimum-{style.name}-{variable}")
    return bool(fine)


def isoflop_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Measured points and the fitted parabola at each of them: one row a run and variable."""
    context = base_context(tables, config.get("base_context"))
    runs = isoflop_runs(tables, context)
    fits = tagged(tables.table("fits/isoflop"))
    long = runs.melt(
        id_vars=["run_id", "arch", "context_length", "isoflop_tag", "val_loss"],
        value_vars=list(VARIABLES),
        var_name="variable",
        value_name="value",
    )
    keys = ["arch", "context_length", "isoflop_tag", "variable"]
    joined = long.merge(fits[[*keys, "a", "b", "c", "status"]], on=keys, how="left")
    log_x = np.log10(joined["value"].astype(float))
    joined["fitted_loss"] = joined["a"] * log_x**2 + joined["b"] * log_x + joined["c"]
    return joined.drop(columns=["a", "b", "c"]).rename(columns={"status": "fit_status"})


@themed
def isoflop_curves(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Loss against N (top) and D (bottom) per architecture, one parabola a budget, minima with intervals."""
    context = base_context(tables, config.get("base_context"))
    runs = isoflop_runs(tables, context)
    fits = tagged(tables.table("fits/isoflop", "arch", "context_length", "isoflop_tag", "variable", "x_opt", "status"))
    fits = fits[fits["context_length"] == context]
    if runs.empty:
        return empty_sheet(TITLE, f"no fit: no run with a loss belongs to a FLOP budget at context {count(context)}")
    archs = order_archs(runs["arch"])
    colours, styles = sequential(runs["isoflop_tag"]), arch_styles(tables.archs)
    level = interval_percent(config)
    sheet = Sheet(
        TITLE,
        f"Every point is a training run at context {count(context)}; every colour is one compute budget; "
        "the diamond is the minimum of its parabola.",
        nrows=2,
        ncols=len(archs),
        sharey=True,
        sharex="row",
        row_height=3.2,
    )
    failed: list[str] = []
    for j, arch in enumerate(archs):
        for i, (variable, label) in enumerate(VARIABLES.items()):
            ax = sheet.axes[i, j]
            mine = runs[runs["arch"] == arch]
            for budget, cell_runs in mine.groupby("isoflop_tag"):
                cell = pick(fits, arch=arch, isoflop_tag=budget, variable=variable)
                if not draw_cell(ax, cell_runs, cell, variable, colours[budget], styles[arch]):
                    why = "not fitted" if cell is None else str(cell["status"]).replace("_", " ")
                    failed.append(f"{styles[arch].name} {flops(budget)} in {'N' if i == 0 else 'D'} ({why})")
            if fits[fits["arch"] == arch].empty:
                say(ax, f"no fit: {reasons(fits)}", blank=False)
            ax.set_xlabel(label)
            if j == 0:
                ax.set_ylabel("validation loss [nat/token]")
        sheet.axes[0, j].set_title(styles[arch].name, color=styles[arch].colour)
    for ax in sheet.axes.flat:
        log_axis(ax, "x", si)
    sheet.handles = [mark(f"{flops(b)} FLOPs", colour, "", line="-", lw=3) for b, colour in colours.items()]
    sheet.handles.append(mark(f"minimum, {level:g} % interval", "#bbbbbb", "D", mec=INK))
    if failed:
        sheet.handles.append(hollow_mark("no usable minimum"))
        sheet.note("Hollow and grey, no usable minimum: " + ", ".join(failed) + ".")
    lost = tables["runs"]
    lost = lost[(lost["status"] != "ok") & (lost["context_length"] == context) & lost["isoflop_tag"].notna()]
    if len(lost):
        sheet.note(f"{len(lost)} runs diverged or failed and are not drawn.")
    return sheet.finish()
