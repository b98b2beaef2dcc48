"""The fitted loss surface at fixed tokens per parameter, and what it leaves over."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .isoflop import VARIABLES
from .sheet import Sheet, empty_sheet, log_axis, mark, say
from .style import INK, arch_styles, count, plain, sequential, si, themed
from .surface import surface_loss, surface_row
from .tables import Tables, base_context, good_runs, order_archs

TITLE = "The loss surface at fixed tokens per parameter"
GREY = "#d5d8db"


def surface_ratio_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Every run at the context of the surface: what was measured, what the surface says, and the share between."""
    context = base_context(tables, config.get("base_context"))
    runs = good_runs(tables)
    runs = runs[runs["context_length"] == context]
    columns = ["run_id", "arch", "experiment_set", "ratio_tag", "num_params", "num_tokens", "val_loss"]
    table = runs[columns].assign(predicted_loss=np.nan)
    for arch in order_archs(runs["arch"]):
        fit, _ = surface_row(tables, arch, context, config)
        mine = table["arch"] == arch
        if fit is not None and mine.any():
            sizes = table.loc[mine, ["num_params", "num_tokens"]].to_numpy(dtype=float)
            table.loc[mine, "predicted_loss"] = surface_loss(fit, sizes[:, 0], sizes[:, 1])
    return table.assign(relative_residual=table["val_loss"].astype(float) / table["predicted_loss"] - 1)


@themed
def surface_ratio(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Loss against N with the surface at each D/N (top) and the residuals of all runs (bottom), per architecture."""
    context = base_context(tables, config.get("base_context"))
    table = surface_ratio_data(tables, config)
    if table.empty:
        return empty_sheet(TITLE, f"no fit: no run with a loss at context {count(context)}")
    archs, styles = order_archs(table["arch"]), arch_styles(tables.archs)
    ratios = sorted(table["ratio_tag"].dropna().unique())
    colours = sequential(ratios) if ratios else {}
    sheet = Sheet(
        TITLE,
        f"Runs at context {count(context)}; colour: tokens per parameter D/N; lines: the fitted surface; below: what "
        "is left over.",
        nrows=2,
        ncols=len(archs),
        row_height=2.9,
        sharex="col",
        sharey="row",
        height_ratios=(1.5, 1),
    )
    for j, arch in enumerate(archs):
        top, bottom = sheet.axes[:, j]
        mine = table[table["arch"] == arch]
        fit, why = surface_row(tables, arch, context, config)
        for tag, rows in [(None, mine[mine["ratio_tag"].isna()]), *mine.groupby("ratio_tag")]:
            tint, area = (GREY, 12) if tag is None else (colours[tag], 30)
            for ax, column in ((top, "val_loss"), (bottom, "relative_residual")):
                values = rows[column] * (100 if ax is bottom else 1)
                ax.scatter(
                    rows["num_params"],
                    values,
                    s=area,
                    marker=styles[arch].marker,
                    color=tint,
                    edgecolors="white",
                    lw=0.4 if tag is not None else 0,
                    zorder=1 if tag is None else 3,
                ).set_gid(f"{column}-{arch}-{tag}")
            if tag is not None and fit is not None and len(rows):
                sizes = np.geomspace(rows["num_params"].min() / 1.2, rows["num_params"].max() * 1.2, 50)
                top.plot(sizes, surface_loss(fit, sizes, tag * sizes), color=tint, lw=1.5, zorder=2)
        bottom.axhline(0, color=INK, lw=0.9, zorder=2)
        top.set_title(styles[arch].name, color=styles[arch].colour)
        bottom.set_xlabel(VARIABLES["num_params"])
        if fit is None:
            say(top, f"no fit: {why}", blank=False)
        else:
            form = "γ = 1" if fit["form"] == "gamma_fixed" else "γ free"
            worst = 100 * mine["relative_residual"].abs().max()
            sheet.note(
                f"{styles[arch].name}: form {form}, fitted to {int(fit['num_runs'])} runs ({fit['subset']}), Huber "
                f"δ = {fit['huber_delta']:g}; the largest residual is {worst:.1f} %."
            )
    for ax in sheet.axes.flat:
        log_axis(ax, "x", si)
    for ax in sheet.axes[0]:
        log_axis(ax, "y", plain)
    if table["relative_residual"].isna().all():
        sheet.axes[1, 0].set_ylim(-1, 1)
    sheet.axes[0, 0].set_ylabel("validation loss [nat/token], log scale")
    sheet.axes[1, 0].set_ylabel("measured / fitted − 1 [%]")
    sheet.handles = [mark(f"D/N = {plain(ratio)}", colour, "o", line="-") for ratio, colour in colours.items()]
    if table["ratio_tag"].isna().any():
        sheet.handles.append(mark("runs of no fixed ratio", GREY, "o", ms=4))
    return sheet.finish()
