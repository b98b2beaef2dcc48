"""The plan of a study: which model sizes were trained on how many tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .isoflop import VARIABLES
from .sheet import Sheet, empty_sheet, log_axis, mark
from .style import SOFT, ArchStyle, arch_styles, count, flops, nested, si, themed
from .tables import Tables, numbers, order_archs

TITLE = "The study at a glance: every run by model size and tokens"
#: set of runs -> marker, name
SETS = {"isoflop": ("o", "IsoFLOP set"), "tokenparam": ("D", "token/param set"), "other": ("^", "other runs")}
LOST = "#111111"
LINE = "#c3c7cb"


def _budget_lines(ax: Axes, budgets: list[float]) -> None:
    """D = H / 6N for each budget, labelled where the line leaves the panel at the top or the left."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    for budget in budgets:
        sizes = np.geomspace(left, right, 2)
        ax.plot(sizes, budget / (6 * sizes), color=LINE, lw=1, ls=(0, (4, 3)), zorder=1)
        start = max(left * (right / left) ** 0.02, budget / 6 / (high / (high / low) ** 0.06))
        if start < right and budget / (6 * start) > low:
            ax.text(
                start,
                budget / (6 * start),
                flops(budget),
                size=7.5,
                color=SOFT,
                va="center",
                ha="left",
                zorder=1.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
            )
    ax.set_xlim(left, right)
    ax.set_ylim(low, high)


def _runs(
    ax: Axes, runs: pd.DataFrame, kind: pd.Series, styles: Mapping[str, ArchStyle], area: float, context: int
) -> None:
    """Points of the runs of one context, a marker a set (`kind`), later architectures smaller; crosses: lost ones."""
    for k, arch in enumerate(styles):
        for group, (marker, _) in SETS.items():
            here = runs[(runs["arch"] == arch) & (kind == group)]
            points = ax.scatter(
                here["num_params"], here["num_tokens"], s=nested(k, area), marker=marker, color=styles[arch].colour,
                alpha=0.9, edgecolors="white", lw=0.4, zorder=3,
            )  # fmt: skip
            points.set_gid(f"runs-{arch}-{group}-{context}")
    gone = runs[runs["status"] != "ok"]
    crosses = ax.scatter(gone["num_params"], gone["num_tokens"], marker="x", s=60, color=LOST, lw=1.5, zorder=5)
    crosses.set_gid(f"diverged-{context}")


@themed
def study_overview(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """N against D of all runs, a panel a context, with lines of equal FLOPs; diverged runs crossed."""
    runs = tables.table("runs", "arch", "context_length", "experiment_set", "status", "num_params", "num_tokens")
    runs = runs[(runs["num_params"] > 0) & (runs["num_tokens"] > 0)]
    if runs.empty:
        return empty_sheet(TITLE, "no runs: the table of runs is empty")
    contexts = sorted(runs["context_length"].unique())
    known = arch_styles(tables.archs)
    styles = {arch: known[arch] for arch in order_archs(runs["arch"])}
    ncols = min(len(contexts), 3)
    nrows = -(-len(contexts) // ncols)
    lost = runs["status"] != "ok"
    counts = ", ".join(f"{(runs['arch'] == arch).sum()} {styles[arch].name}" for arch in styles)
    sheet = Sheet(
        TITLE,
        f"{len(runs)} runs ({counts}), one panel a training context"
        + (f"; {int(lost.sum())} diverged or failed." if lost.any() else "."),
        nrows=nrows,
        ncols=ncols,
        width=max(7.0, 3.6 * ncols),
        row_height=3.5,
        sharex=True,
        sharey=True,
    )
    kind = runs["experiment_set"].where(runs["experiment_set"].isin(list(SETS)), "other")
    for ax, context in zip(sheet.axes.flat, contexts):
        here = runs["context_length"] == context
        _runs(ax, runs[here], kind[here], styles, 40 if len(runs) < 200 else 24, context)
        ax.set_title(f"context {count(context)}")
    budgets = sorted(numbers(runs["isoflop_tag"]).dropna().unique())
    first = sheet.axes[0, 0]
    first.set_xscale("log")
    first.set_yscale("log")
    left, right = first.get_xlim()
    first.set_xlim(left / (right / left) ** 0.13, right)  # room for the labels of the lines
    for i, ax in enumerate(sheet.axes.flat):
        if i >= len(contexts):
            ax.set_visible(False)
            continue
        log_axis(ax, "x", si)
        log_axis(ax, "y", si)
        if i % ncols == 0:
            ax.set_ylabel(VARIABLES["num_tokens"])
        if i + ncols >= len(contexts):
            ax.set_xlabel(VARIABLES["num_params"])
    for ax in sheet.axes.flat[: len(contexts)]:
        _budget_lines(ax, budgets)
    sheet.handles = [mark(styles[arch].name, styles[arch].colour, "o", mew=0) for arch in styles]
    present = set(kind)
    sheet.handles += [mark(name, SOFT, marker, mew=0) for group, (marker, name) in SETS.items() if group in present]
    if lost.any():
        sheet.handles.append(mark("diverged or failed", LOST, "x"))
    if budgets:
        sheet.handles.append(mark("equal compute, D = H / 6N", LINE, "", line=(0, (4, 3))))
        sheet.note("The runs lie off the dashed lines where attention, gates and embeddings make H differ from 6·N·D.")
    return sheet.finish()
