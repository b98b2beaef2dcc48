"""Training curves of all runs."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure

from .sheet import Sheet, empty_sheet, log_axis, mark
from .style import arch_styles, count, flops, plain, si, themed
from .tables import Tables, order_archs

TITLE = "Training curves of all runs"
POINTS = 30_000  # over all runs: enough for the eye, small enough for an SVG


def thinned(curves: pd.DataFrame, column: str = "train_loss") -> pd.DataFrame:
    """Curves with at most POINTS rows in all: means of `column` over bins of log step, run by run."""
    rows = curves[np.isfinite(curves[column].astype(float)) & (curves["flops"] > 0)]
    bins = max(30, POINTS // max(rows["run_id"].nunique(), 1))
    log_step = np.log(rows["step"].astype(float).clip(lower=1))
    top = log_step.groupby(rows["run_id"]).transform("max").clip(lower=1e-9)
    place = np.floor(log_step / top * (bins - 1)).astype(int)
    keys = ["run_id", "arch", "num_params"]
    return rows.assign(bin=place).groupby([*keys, "bin"], as_index=False)[["tokens", "flops", column]].mean()


def curves_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """The curves as drawn: means of the training loss over bins of log step."""
    curves = tables.table("curves", "run_id", "arch", "num_params", "step", "tokens", "flops", "train_loss", "val_loss")
    return thinned(curves)


def _without_curves(tables: Tables, curves: pd.DataFrame) -> str:
    """Which runs come without a curve; nothing where all have one."""
    runs = tables.table("runs", "run_id", "arch", "context_length") if "runs" in tables else curves
    lacking = runs[~runs["run_id"].isin(curves["run_id"])]
    if lacking.empty:
        return ""
    styles = arch_styles(lacking["arch"])
    cells = [
        f"{len(part)} {styles[arch].name} at {count(context)}"
        for (arch, context), part in lacking.groupby(["arch", "context_length"])
        if arch in styles
    ]
    return f"{len(lacking)} of {len(runs)} runs come without a curve: {', '.join(cells)} tokens of context."


def _draw(
    ax: Axes, lines: pd.DataFrame, ends: pd.DataFrame, colours: Colormap, norm: LogNorm, marker: str, arch: str
) -> None:
    """A line a run, and a dot for the last validation loss of each, coloured by model size."""
    groups = [group.sort_values("bin") for _, group in lines.groupby("run_id")]
    collection = LineCollection(
        [group[["flops", "train_loss"]].to_numpy(dtype=float) for group in groups],
        array=[group["num_params"].iloc[0] for group in groups],
        cmap=colours,
        norm=norm,
        lw=0.9,
        alpha=0.75,
    )
    collection.set_gid(f"curves-{arch}")
    ax.add_collection(collection)
    dots = ax.scatter(
        ends["flops"], ends["val_loss"], c=ends["num_params"].astype(float), cmap=colours, norm=norm, s=16,
        marker=marker, edgecolors="white", lw=0.5, zorder=3,
    )  # fmt: skip
    dots.set_gid(f"ends-{arch}")


@themed
def training_curves(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Training loss against FLOPs spent, one line a run, colour by model size; dots: last validation losses."""
    curves = tables.table("curves", "run_id", "arch", "num_params", "step", "flops", "train_loss", "val_loss")
    lines = curves_data(tables, config)
    if lines.empty:
        return empty_sheet(TITLE, "no curves: the runs of this study come without training histories")
    archs, styles = order_archs(lines["arch"]), arch_styles(tables.archs)
    sizes = curves["num_params"].astype(float)
    lowest, highest = sizes.min(), sizes.max()
    norm = LogNorm(lowest, highest if highest > lowest else 1.01 * lowest)
    colours = ListedColormap(mpl.colormaps["viridis_r"](np.linspace(0.12, 0.95, 256)))
    sheet = Sheet(
        TITLE,
        "One line a run: the training loss while it trains, averaged over short stretches; dots: the validation loss "
        "at its end.",
        ncols=len(archs),
        width=max(7.0, 4.8 * len(archs)),
        row_height=3.9,
        sharey=True,
        sharex=True,
    )
    for ax, arch in zip(sheet.axes[0], archs):
        mine = lines[lines["arch"] == arch]
        validated = curves[(curves["arch"] == arch) & curves["val_loss"].notna()].sort_values("step")
        _draw(ax, mine, validated.groupby("run_id").tail(1), colours, norm, styles[arch].marker, arch)
        ax.set_title(styles[arch].name, color=styles[arch].colour)
        ax.set_xlabel("training compute spent [FLOPs]")
    first = sheet.axes[0, 0]
    losses = lines["train_loss"]
    first.set_xscale("log")
    first.set_yscale("log")
    first.set_xlim(lines["flops"].quantile(0.02), lines["flops"].max() * 1.3)
    first.set_ylim(losses.min() * 0.96, losses.quantile(0.995) * 1.05)
    for ax in sheet.axes[0]:
        log_axis(ax, "x", flops)
        log_axis(ax, "y", plain)
    first.set_ylabel("loss [nat/token], log scale")
    bar = sheet.fig.colorbar(ScalarMappable(norm, colours), ax=list(sheet.axes[0]), pad=0.015, aspect=28)
    bar.outline.set_visible(False)
    log_axis(bar.ax, "y", si)
    bar.set_label("model size N [parameters]")
    sheet.note(_without_curves(tables, curves))
    sheet.handles = [
        mark("training loss, one run", "#5f6368", "", line="-"),
        mark("last validation loss", "#5f6368", "o"),
    ]
    return sheet.finish()
