"""The roofline of inference: FLOPs per byte of prefill and of generation, the device's ridge, and what was reached."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sheet import Sheet, arch_marks, empty_sheet, log_axis, mark, say
from .style import INK, SOFT, ArchStyle, arch_styles, count, flops, nested, si, themed
from .tables import Tables, one_device, order_archs, reasons, select

TITLE = "Roofline: prefill computes, generation reads memory"
PHASES = {"prefill": "-", "generation": (0, (4, 2))}
AXES = {"context": ("prefill_length", "context [tokens]"), "batch": ("batch_size", "batch [sequences]")}
KEYS = ("arch", "model", "num_params", "device", "phase", "against")
INTENSITY = "arithmetic intensity [FLOP/byte]"


def _chosen(tables: Tables, config: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Roofline, crossings and peaks of one device; of the two first the largest model of each architecture."""
    rows = tables.table(
        "inference/roofline", *KEYS, "batch_size", "prefill_length", "intensity", "flops_per_s", "ridge"
    )
    crossings = tables.table("inference/crossings", *KEYS, "crossing", "status", "detail")
    device = tables.table("inference/device", "device", "quantity", "value", "source", "method")
    if rows.empty:
        return rows, crossings, device
    rows = one_device(rows, config)
    name = rows["device"].iloc[0] if len(rows) else config["device"]
    crossings, device = (frame[frame["device"] == name] for frame in (crossings, device))
    measured = rows["against"] == "measured"
    models = rows[~measured].groupby("arch")["num_params"].max()
    largest = rows["num_params"] == rows["arch"].map(models)
    return rows[measured | largest], crossings[crossings["num_params"] == crossings["arch"].map(models)], device


def roofline_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Where the models that are drawn cross the ridge."""
    return _chosen(tables, config)[1]


def _curves(ax: Axes, rows: pd.DataFrame, against: str, styles: Mapping[str, ArchStyle], archs: list[str]) -> None:
    """Intensities against context or batch; one line a phase and value of the other, the larger one thinner."""
    column, label = AXES[against]
    other = "batch_size" if against == "context" else "prefill_length"
    for arch in archs:
        for phase, dashes in PHASES.items():
            lines = select(rows, arch=arch, phase=phase, against=against)
            for k, (value, line) in enumerate(lines.groupby(other)):
                line = line.sort_values(column)
                (drawn,) = ax.plot(
                    line[column], line["intensity"], color=styles[arch].colour, ls=dashes, lw=1.8 - 0.8 * k,
                    alpha=1.0 if k == 0 else 0.7, zorder=3,
                )  # fmt: skip
                drawn.set_gid(f"{phase}-{against}-{arch}-{value:g}")
    ax.set_xlabel(label)
    log_axis(ax, "x", count, [x for x in (1, 16, 256, 4096, 65536, 1048576) if x >= rows[column].min()])
    log_axis(ax, "y", lambda value: f"{value:g}")


def _reached(
    ax: Axes, rows: pd.DataFrame, phase: str, styles: Mapping, archs: list[str], peak: float, rate: float
) -> None:
    """FLOP/s of the measurements under the roof."""
    mine = rows[(rows["against"] == "measured") & (rows["phase"] == phase)]
    for k, arch in enumerate(archs):
        points = mine[mine["arch"] == arch]
        ax.scatter(
            points["intensity"], points["flops_per_s"], s=nested(k, 26), marker=styles[arch].marker,
            color=styles[arch].colour, alpha=0.7, lw=0, zorder=3,
        ).set_gid(f"reached-{phase}-{arch}")  # fmt: skip
    ax.set_title(f"Reached in {phase}")
    ax.set_xlabel(INTENSITY)
    if mine.empty:
        say(ax, "no measurement", blank=False)
        return
    if np.isfinite(peak) and np.isfinite(rate):
        x = np.geomspace(mine["intensity"].min() / 2, max(mine["intensity"].max() * 2, 4 * peak / rate), 200)
        ax.plot(x, np.minimum(peak, rate * x), color=INK, lw=1.2, zorder=2)[0].set_gid(f"roof-{phase}")
    log_axis(ax, "x", lambda value: f"{value:g}")
    log_axis(ax, "y", flops)


def _crossed(row: Any) -> str:
    """Where one curve crosses the ridge, in a few words."""
    at = f"batch {count(row.batch_size)}" if row.against == "context" else f"prefill {count(row.prefill_length)}"
    what = {"context": "tokens", "batch": "sequences"}[row.against]
    if row.status in ("rises", "falls"):
        side = "above" if row.status == "rises" else "below"
        return f"{at}: {side} the ridge from {count(row.crossing)} {what} on"
    reach = f"at most {row.intensity_max:.3g}" if row.status == "below" else f"at least {row.intensity_min:.3g}"
    return f"{at}: {row.status} it at any number of {what} ({reach})"


@themed
def roofline(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Intensity of both phases against context and batch with the ridge; below, the FLOP/s that were reached."""
    rows, crossings, device = _chosen(tables, config)
    if rows.empty:
        return empty_sheet(TITLE, f"no measurement: {reasons(rows)}")
    archs, styles = order_archs(rows["arch"]), arch_styles([*tables.archs, *rows["arch"]])
    best = device.groupby("quantity")["value"].max()
    peak, rate = (float(best.get(name, np.nan)) for name in ("flops_per_s", "bytes_per_s"))
    ridge = float(rows["ridge"].iloc[0])
    curves = rows[rows["against"] != "measured"]
    name = str(rows["device"].iloc[0])
    sheet = Sheet(
        TITLE,
        f"Above: FLOPs per byte of the largest models on {name}; above the ridge a phase is bound by computing, below "
        "it by memory. Below: the FLOP/s of every measurement, under the roof of both.",
        nrows=2,
        ncols=2,
        width=9.0,
        row_height=3.0,
    )
    for ax, against in zip(sheet.axes[0], AXES):
        _curves(ax, curves[curves["against"] == against], against, styles, archs)
        ax.set_ylabel(INTENSITY)
        ax.set_title(f"Against the {against}")
        if np.isfinite(ridge):
            ax.axhline(ridge, color=INK, lw=1.2, zorder=2).set_gid(f"ridge-{against}")
    for ax, phase in zip(sheet.axes[1], PHASES):
        _reached(ax, rows, phase, styles, archs, peak, rate)
        ax.set_ylabel("rate [FLOP/s]")
    sheet.handles = arch_marks(styles, archs, line="-")
    sheet.handles += [mark(phase, SOFT, "", line=dashes) for phase, dashes in PHASES.items()]
    sheet.handles.append(mark("ridge and roof of the device", INK, "", line="-"))
    for against, other, what in (("context", "batch_size", "batch"), ("batch", "prefill_length", "a prefill")):
        values = sorted(curves.loc[curves["against"] == against, other].unique())
        ends = " (thick) and ".join(count(value) for value in values)
        sheet.note(f"Against the {against}: {what} of {ends}{' (thin)' if len(values) > 1 else ''}.")
    if np.isfinite(ridge):
        how = ", ".join(dict.fromkeys(f"{row.source}: {row.method}" for row in device.itertuples()))
        sheet.note(f"Ridge {ridge:.3g} FLOP/byte = {flops(peak)} FLOP/s / {flops(rate)} byte/s ({how}).")
    else:
        sheet.note("No ridge: nothing is known of the device's peaks.")
    for (arch, phase), found in crossings.groupby(["arch", "phase"], sort=False):
        if phase in PHASES and np.isfinite(ridge):
            parts = "; ".join(_crossed(row) for row in found.itertuples())
            sheet.note(f"{styles[arch].name} of {si(found['num_params'].iloc[0])} parameters, {phase}: {parts}.")
    return sheet.finish()
