"""Loss against training compute: all runs, the frontier, and the FLOPs for equal loss."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from xlstm_scaling.accounting import label

from .sheet import Sheet, empty_sheet, log_axis, mark, say
from .style import FAILED, INK, SOFT, ArchStyle, arch_styles, count, flops, plain, themed
from .tables import Tables, base_context, good_runs, interval_percent, order_archs, reasons

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
    """What the ratio says of the first pair, in one sentence, with its interval; nothing is claimed where that holds
    1."""
    if ratio.empty:
        return ""
    first, other = next(iter(_pairs(ratio)))
    ratio = ratio[(ratio["arch"] == first) & (ratio["other"] == other)]
    centre = (ratio["val_loss"].min() + ratio["val_loss"].max()) / 2
    middle = ratio.iloc[(ratio["val_loss"] - centre).abs().argmin()]
    value, lo, hi = middle["flop_ratio"], middle["flop_ratio_lo"], middle["flop_ratio_hi"]
    where = f"At a loss of {middle['val_loss']:.2f} nat/token"
    size = f"{value:.2f}× the FLOPs of {label(first)} ({100 * level:g} % interval {lo:.2f}–{hi:.2f})"
    least, most = ratio["flop_ratio"].min(), ratio["flop_ratio"].max()
    spread = f"over all losses with an interval, {least:.2f}× to {most:.2f}×"
    if lo > 1 or hi < 1:
        return f"{where} {label(other)} needs {size}; {spread}."
    return f"{where} {label(other)} needs {size}: the interval holds 1, no difference is shown; {spread}."


def _pairs(ratio: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs with the first architecture: those between the others follow from them."""
    first = order_archs(ratio["arch"])[0]
    return [(first, other) for other in order_archs(ratio.loc[ratio["arch"] == first, "other"])]


def _ratios(tables: Tables, context: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows of the first architecture at a context: all losses, those with a ratio, and those with its interval too."""
    whole = tables.table("fits/pareto_ratio", "arch", "other", "context_length", "val_loss", "flop_ratio", "status")
    whole = whole[whole["context_length"] == context]
    if len(whole):
        whole = whole[whole["arch"] == order_archs(whole["arch"])[0]]
    known = whole[np.isfinite(whole["flop_ratio"].astype(float))]
    return whole, known, known[known["status"] == "ok"]


def _note_gaps(sheet: Sheet, whole: pd.DataFrame, known: pd.DataFrame, ratio: pd.DataFrame) -> None:
    """At how many losses there is no interval, or no ratio at all."""
    bare, none = len(known) - len(ratio), len(whole) - len(known)
    if bare:
        sheet.note(f"Dashed grey: {bare} of {len(whole)} losses have a ratio but too few resamples for an interval.")
    if none:
        sheet.note(f"{none} of {len(whole)} losses have no ratio ({reasons(whole)}).")


def _ratio_panel(ax: Axes, ratio: pd.DataFrame, known: pd.DataFrame, styles: Mapping[str, ArchStyle]) -> None:
    pairs = _pairs(known)
    for first, other in pairs:
        colour = INK if len(pairs) == 1 else styles[other].colour
        mine = [rows[(rows["arch"] == first) & (rows["other"] == other)] for rows in (known, ratio)]
        every, sure = (rows.sort_values("val_loss") for rows in mine)
        ax.plot(every["flop_ratio"], every["val_loss"], color=FAILED, lw=1.4, ls=(0, (3, 2)), zorder=2)
        lo, hi = sure["flop_ratio_lo"], sure["flop_ratio_hi"]
        ax.fill_betweenx(sure["val_loss"], lo, hi, color=colour, alpha=0.18, lw=0)
        (line,) = ax.plot(sure["flop_ratio"], sure["val_loss"], color=colour, lw=2.2, zorder=3)
        line.set_gid(f"flop-ratio-{first}-{other}")
    ax.axvline(1, color=SOFT, lw=1.2, zorder=1)
    low = np.nanmin([ratio["flop_ratio_lo"].min(), known["flop_ratio"].min(), 0.8])
    high = np.nanmax([ratio["flop_ratio_hi"].max(), known["flop_ratio"].max(), 1.25])
    ax.set_xlim(min(low, high**-0.55) / 1.04, max(high, low**-0.55) * 1.04)
    others = styles[pairs[0][1]].name if len(pairs) == 1 else "other"
    for x, side, text in (
        (0.02, "left", f"← {others}\nneeds fewer"),
        (0.98, "right", f"{styles[pairs[0][0]].name} →\nneeds fewer"),
    ):
        ax.text(x, 0.985, text, transform=ax.transAxes, ha=side, va="top", size=8.5, color=SOFT, linespacing=1.2)


@themed
def loss_vs_flops(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """All runs faint and the frontier bold (left); FLOPs for equal loss, on the same loss axis (right)."""
    context = base_context(tables, config.get("base_context"))
    runs = good_runs(tables)
    runs = runs[runs["context_length"] == context]
    front = tables.table("fits/pareto", "arch", "context_length", "num_flops", "val_loss")
    front = front[front["context_length"] == context]
    whole, known, ratio = _ratios(tables, context)
    if runs.empty:
        return empty_sheet(TITLE, f"no fit: no run with a loss at context {count(context)}")
    archs, styles = order_archs(runs["arch"]), arch_styles(tables.archs)
    level = interval_percent(config)
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
        _ratio_panel(right, ratio, known, styles)
        log_axis(right, "x", lambda value: f"{plain(value)}×")
        sheet.note(
            f"Runs at context {count(context)}. Right: read across from the loss axis. Band: {level:g} % bootstrap "
            "interval."
        )
        _note_gaps(sheet, whole, known, ratio)
    log_axis(left, "x", flops)
    log_axis(left, "y", plain)
    right.tick_params(labelleft=False)
    left.set_xlabel("training compute H [FLOPs]")
    left.set_ylabel("validation loss [nat/token], log scale")
    compared = [] if whole.empty else [styles[other].name for _, other in _pairs(whole)]
    against = styles[whole["arch"].iloc[0]].name if compared else "another"
    right.set_xlabel(f"FLOPs of {compared[0] if len(compared) == 1 else 'the other'} / FLOPs of {against} [×]")
    left.legend(handles=entries, loc="upper right", borderaxespad=0.8, labelspacing=0.45)
    left.set_title("Loss against compute")
    right.set_title("Compute for equal loss")
    return sheet.finish()
