"""Loss against training compute: all runs, the frontier, and the FLOPs for equal loss."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .sheet import Sheet, empty_sheet, log_axis, mark, say
from .style import FAILED, INK, SOFT, ArchStyle, arch_styles, count, flops, plain, themed
from .tables import Tables, base_context, good_runs, order_archs, reasons

TITLE = "Loss for a training budget"


def _frontier(ax: Axes, runs: pd.DataFrame, front: pd.DataFrame, style: ArchStyle, arch: str) -> None:
    faint = ax.scatter(
        runs["num_flops"], runs["val_loss"], s=16, marker=style.marker, color=style.colour, alpha=0.22, lw=0, zorder=2
    )
    faint.set_gid(f"runs-{arch}")
    front = front.sort_values("num_flops")
    (line,) = ax.plot(
        front["num_flops"],
        front["val_loss"],
        color=style.colour,
        marker=style.marker,
        lw=2.4,
        ms=6.5,
        mec="white",
        mew=0.8,
        zorder=4,
    )
    line.set_gid(f"frontier-{arch}")


def _verdict(ratio: pd.DataFrame, level: float) -> str:
    """What the ratio says, in one sentence, with its interval; nothing is claimed where the interval holds 1."""
    if ratio.empty:
        return ""
    centre = (ratio["val_loss"].min() + ratio["val_loss"].max()) / 2
    middle = ratio.iloc[(ratio["val_loss"] - centre).abs().argmin()]
    value, lo, hi = middle["flop_ratio"], middle["flop_ratio_lo"], middle["flop_ratio_hi"]
    where = f"At a loss of {middle['val_loss']:.2f} nat/token"
    size = f"{value:.2f}× the FLOPs of xLSTM ({100 * level:g} % interval {lo:.2f}–{hi:.2f})"
    least, most = ratio["flop_ratio"].min(), ratio["flop_ratio"].max()
    spread = f"over all losses with an interval, {least:.2f}× to {most:.2f}×"
    if lo > 1 or hi < 1:
        return f"{where} the Transformer needs {size}; {spread}."
    return f"{where} the Transformer needs {size}: the interval holds 1, no difference is shown; {spread}."


def _ratio_panel(ax: Axes, ratio: pd.DataFrame, known: pd.DataFrame, colour: str) -> None:
    known = known.sort_values("val_loss")
    ax.plot(known["flop_ratio"], known["val_loss"], color=FAILED, lw=1.4, ls=(0, (3, 2)), zorder=2)
    ratio = ratio.sort_values("val_loss")
    ax.axvline(1, color=SOFT, lw=1.2, zorder=1)
    ax.fill_betweenx(ratio["val_loss"], ratio["flop_ratio_lo"], ratio["flop_ratio_hi"], color=colour, alpha=0.18, lw=0)
    (line,) = ax.plot(ratio["flop_ratio"], ratio["val_loss"], color=colour, lw=2.2, zorder=3)
    line.set_gid("flop-ratio")
    low = np.nanmin([ratio["flop_ratio_lo"].min(), known["flop_ratio"].min(), 0.8])
    high = np.nanmax([ratio["flop_ratio_hi"].max(), known["flop_ratio"].max(), 1.25])
    ax.set_xlim(min(low, high**-0.55) / 1.04, max(high, low**-0.55) * 1.04)
    for x, side, text in ((0.02, "left", "← Transformer\nneeds fewer"), (0.98, "right", "xLSTM →\nneeds fewer")):
        ax.text(x, 0.985, text, transform=ax.transAxes, ha=side, va="top", size=8.5, color=SOFT, linespacing=1.2)


@themed
def loss_vs_flops(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """All runs faint and the frontier bold (left); FLOPs for equal loss, on the same loss axis (right)."""
    context = base_context(tables, config.get("base_context"))
    runs = good_runs(tables)
    runs = runs[runs["context_length"] == context]
    front = tables.table("fits/pareto", "arch", "context_length", "num_flops", "val_loss")
    front = front[front["context_length"] == context]
    whole = tables.table("fits/pareto_ratio", "context_length", "val_loss", "flop_ratio", "status")
    whole = whole[whole["context_length"] == context]
    known = whole[np.isfinite(whole["flop_ratio"].astype(float))]
    ratio = known[known["status"] == "ok"]
    if runs.empty:
        return empty_sheet(TITLE, f"no fit: no run with a loss at context {count(context)}")
    archs, styles = order_archs(runs["arch"]), arch_styles(tables.archs)
    level = 100 * float(config.get("confidence", 0.95))
    sheet = Sheet(
        f"{TITLE}: {' and '.join(styles[arch].name for arch in archs)}",
        _verdict(ratio, level / 100)
        or f"Every training run at context {count(context)}, and the best for its compute.",
        ncols=2,
        row_height=4.6,
        sharey=True,
        width_ratios=(1.9, 1),
    )
    left, right = sheet.axes[0]
    entries: list[Line2D] = []
    for arch in archs:
        _frontier(left, runs[runs["arch"] == arch], front[front["arch"] == arch], styles[arch], arch)
        name = styles[arch].name
        if (front["arch"] == arch).any():
            entries.append(mark(f"{name}: best for its compute", styles[arch].colour, styles[arch].marker, line="-"))
        entries.append(
            mark(
                f"{name}: every run ({(runs['arch'] == arch).sum()})",
                styles[arch].colour,
                styles[arch].marker,
                alpha=0.35,
                mew=0,
            )
        )
    if ratio.empty:
        right.set_xlim(0.5, 2)
        log_axis(right, "x", lambda value: f"{plain(value)}×")
        say(right, f"no fit: {reasons(whole)}", blank=False)
    else:
        _ratio_panel(right, ratio, known, INK)
        sheet.note(
            f"Runs at context {count(context)}. Right: read across from the loss axis. Band: {level:g} % bootstrap "
            "interval."
        )
        log_axis(right, "x", lambda value: f"{plain(value)}×")
        bare, none = len(known) - len(ratio), len(whole) - len(known)
        if bare:
            sheet.note(
                f"Dashed grey: {bare} of {len(whole)} losses have a ratio but too few resamples for an interval."
            )
        if none:
            sheet.note(f"{none} of {len(whole)} losses have no ratio ({reasons(whole)}).")
    log_axis(left, "x", flops)
    log_axis(left, "y", plain)
    right.tick_params(labelleft=False)
    left.set_xlabel("training compute H [FLOPs]")
    left.set_ylabel("validation loss [nat/token], log scale")
    right.set_xlabel("FLOPs of Transformer / FLOPs of xLSTM [×]")
    left.legend(handles=entries, loc="upper right", borderaxespad=0.8, labelspacing=0.45)
    left.set_title("Loss against compute")
    right.set_title("Compute for equal loss")
    return sheet.finish()
