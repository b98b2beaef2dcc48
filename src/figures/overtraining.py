"""Over-training: the loss against compute at a fixed number of tokens per parameter."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .sheet import Sheet, arch_marks, empty_sheet, hollow_mark, log_axis, mark, say
from .style import FAILED, arch_styles, count, flops, plain, sequential, themed
from .tables import Tables, good_runs, interval_percent, order_archs, reasons, select, tagged

TITLE = "Over-training: does the slope stay the same when a model sees more tokens?"


def overtraining_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Runs of the token/param sets beside the fitted loss of their ratio."""
    runs = good_runs(tables)
    runs = runs[runs["ratio_tag"].notna()]
    fits = tagged(tables.table("fits/overtraining"), "ratio_tag")
    keys = ["arch", "context_length", "ratio_tag"]
    kept = runs[["run_id", *keys, "num_params", "num_tokens", "num_flops", "val_loss"]]
    joined = kept.merge(fits[[*keys, "slope", "intercept", "status"]], on=keys, how="left")
    joined["fitted_loss"] = np.exp(joined["slope"] * np.log(joined["num_flops"].astype(float)) + joined["intercept"])
    return joined.rename(columns={"status": "fit_status"})


def _lines(ax: Axes, rows: pd.DataFrame, colours: Mapping[float, Any], marker: str, arch: str) -> bool:
    failed = False
    for ratio, group in rows.groupby("ratio_tag"):
        group = group.sort_values("num_flops")
        fine = bool((group["fit_status"] == "ok").all())
        failed |= not fine
        tint = colours[ratio] if fine else FAILED
        points = ax.scatter(
            group["num_flops"],
            group["val_loss"],
            s=30,
            marker=marker,
            zorder=3,
            facecolors=[tint] if fine else "none",
            edgecolors="white" if fine else FAILED,
            lw=0.5 if fine else 1.1,
        )
        points.set_gid(f"runs-{arch}-{ratio:g}")
        if np.isfinite(group["fitted_loss"]).all():
            ax.plot(group["num_flops"], group["fitted_loss"], color=tint, ls="-" if fine else (0, (4, 3)), zorder=2)
    return failed


def _slopes(ax: Axes, fits: pd.DataFrame, archs: list[str], styles: Mapping, ratios: list[float]) -> None:
    place = {ratio: i for i, ratio in enumerate(ratios)}
    for k, arch in enumerate(archs):
        style, shift = styles[arch], 0.16 * (k - (len(archs) - 1) / 2)
        for fine, rows in ((True, fits[fits["status"] == "ok"]), (False, fits[fits["status"] != "ok"])):
            rows = rows[(rows["arch"] == arch) & np.isfinite(rows["slope"].astype(float))]
            y = [place[ratio] + shift for ratio in rows["ratio_tag"]]
            tint = style.colour if fine else FAILED
            bounds = rows[["slope_lo", "slope_hi"]].astype(float)
            ax.hlines(y, bounds["slope_lo"], bounds["slope_hi"], color=tint, lw=1.5, zorder=2)
            points = ax.scatter(
                rows["slope"],
                y,
                s=38,
                marker=style.marker,
                facecolors=tint if fine else "none",
                edgecolors="white" if fine else FAILED,
                lw=0.6 if fine else 1.2,
                zorder=3,
            )
            points.set_gid(f"slopes-{arch}-{'ok' if fine else 'failed'}")
    ax.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    ax.set_ylim(-0.6, len(ratios) - 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(False, axis="y")


@themed
def overtraining(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Loss against FLOPs at fixed D/N with power laws, and the slope of each ratio with its interval."""
    fits = tagged(tables.table("fits/overtraining", "ratio_tag", "slope", "intercept", "status"), "ratio_tag")
    rows = overtraining_data(tables, config)
    if rows.empty:
        return empty_sheet(TITLE, "no fit: the study has no run at a fixed token/param ratio")
    context = int(rows["context_length"].mode().iloc[0])
    rows, fits = select(rows, context_length=context), select(fits, context_length=context)
    archs, styles = order_archs(rows["arch"]), arch_styles(tables.archs)
    ratios = sorted(set(rows["ratio_tag"]) | set(fits["ratio_tag"].dropna()))
    colours = sequential(ratios)
    level = interval_percent(config)
    sheet = Sheet(
        TITLE,
        f"Runs at context {count(context)} with a fixed number of tokens per parameter D/N (colour); lines are "
        f"power laws $L∝H^{{slope}}$. Right: the slopes with {level:g} % intervals; equal slopes: parallel lines.",
        ncols=len(archs) + 1,
        width=3.6 * (len(archs) + 1),
        row_height=3.7,
    )
    failed = False
    limits = (rows["num_flops"].min() / 1.4, rows["num_flops"].max() * 1.4)
    losses = (rows["val_loss"].min() * 0.98, rows["val_loss"].max() * 1.02)
    for ax, arch in zip(sheet.axes[0], archs):
        failed |= _lines(ax, rows[rows["arch"] == arch], colours, styles[arch].marker, arch)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set(xlim=limits, ylim=losses, xlabel="training compute H [FLOPs]")
        log_axis(ax, "x", flops)
        log_axis(ax, "y", plain)
        ax.set_title(styles[arch].name, color=styles[arch].colour)
        if fits[fits["arch"] == arch].empty:
            say(ax, f"no fit: {reasons(fits[fits['arch'] == arch])}", blank=False)
    sheet.axes[0, 0].set_ylabel("validation loss [nat/token], log scale")
    last = sheet.axes[0, -1]
    last.set_title("Slope of each ratio")
    if np.isfinite(fits["slope"].astype(float)).any():
        _slopes(last, fits, archs, styles, ratios)
        last.set_xlabel("slope d ln L / d ln H [1]")
        last.set_ylabel("tokens per parameter D/N [1]")
        entries = arch_marks(styles, archs, line="-")
        sheet.handles += entries
    else:
        say(last, f"no fit: {reasons(fits)}")
    sheet.handles += [mark(f"D/N = {ratio:g}", colour, "", line="-", lw=3) for ratio, colour in colours.items()]
    if failed:
        sheet.handles.append(hollow_mark("ratio without a usable fit"))
        sheet.note(f"Hollow and grey: ratios without a usable fit ({reasons(fits)}).")
    return sheet.finish()
