"""What the runtime model leaves over: predicted over measured times, over all sizes, batches and prefills."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .inference import NAMES
from .sheet import Sheet, empty_sheet, log_axis, mark, say, thin
from .style import INK, SOFT, arch_styles, count, sequential, themed
from .tables import Tables, one_device, order_archs, reasons, select

TITLE = "How well the runtime model fits: predicted over measured time"
REACHES = (1.25, 1.5, 2.0, 4.0, 8.0)  # ends of the axis; what lies beyond the largest is drawn on the edge
SPREAD = 1.5  # over this factor the sizes of a prefill lie side by side


def runtime_residuals_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Measured and predicted times and their ratio, one row a measurement and quantity, by the fit to all of them."""
    columns = ("arch", "quantity", "device", "batch_size", "prefill_length", "measured_s", "predicted_s", "held_out")
    rows = tables.table("inference/runtime_predictions", *columns)
    rows = one_device(rows[~rows["held_out"].astype(bool)], config)
    rows = rows[[column for column in (*columns, "num_params") if column in rows and column != "held_out"]]
    ratio = rows["predicted_s"].astype(float) / rows["measured_s"].astype(float)
    return rows.assign(predicted_over_measured=ratio)


def _places(rows: pd.DataFrame) -> tuple[pd.Series, float]:
    """Where measurements lie on the axis of prefills, sizes side by side; a prefill of 0 at half the shortest."""
    lengths = rows["prefill_length"].astype(float)
    zero = lengths[lengths > 0].min() / 2
    order = rows["num_params"].rank(method="dense") if "num_params" in rows else pd.Series(1.0, index=rows.index)
    share = (order - 1) / max(order.max() - 1, 1) - 0.5
    return lengths.where(lengths > 0, zero) * SPREAD**share, zero


def _ratios(ax: Axes, rows: pd.DataFrame, reach: float, colours: Mapping[float, Any], marker: str, gid: str) -> None:
    """Ratios of the measurements, within 1 / reach to reach; a line through the means of each prefill; their error."""
    places, zero = _places(rows)
    ratio = rows["predicted_over_measured"].clip(1 / reach, reach)
    tints = [colours[batch] for batch in rows["batch_size"]]
    ax.scatter(places, ratio, c=tints, s=13, marker=marker, lw=0, alpha=0.85, zorder=3).set_gid(gid)
    means = np.exp(np.log(ratio).groupby(rows["prefill_length"]).mean())
    ax.plot(means.index.where(means.index > 0, zero), means, color=INK, lw=1.2, zorder=4)
    error = np.abs(rows["predicted_over_measured"] - 1).mean()
    text = f"mean absolute error {100 * error:.1f} % of {len(rows)}"
    ax.text(0.98, 0.95, text, transform=ax.transAxes, ha="right", va="top", size=8.5, color=SOFT, zorder=5)


@themed
def runtime_residuals(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Predicted over measured time against the prefill; a row a quantity, a column an architecture."""
    rows = runtime_residuals_data(tables, config)
    models = tables.table("inference/runtime_model", "arch", "quantity", "status")
    tables.table("inference/measurements", "arch")
    if rows.empty:
        return empty_sheet(TITLE, f"no fit of the runtime model: {reasons(models)}")
    archs, styles = order_archs(rows["arch"]), arch_styles(tables.archs)
    quantities = [name for name in NAMES if (rows["quantity"] == name).any()]
    colours = sequential(rows["batch_size"])
    largest = np.exp(np.abs(np.log(rows["predicted_over_measured"])).quantile(0.995))
    reach = next((end for end in REACHES if end >= largest), REACHES[-1])
    sheet = Sheet(
        TITLE,
        f"Every measurement on {rows['device'].iloc[0]}: all prefills, model sizes (side by side, small to large) and "
        "batches (colour). Above 1 the model is too slow; line: mean of a prefill.",
        nrows=len(quantities),
        ncols=len(archs),
        row_height=2.6,
        sharex=True,
        sharey=True,
    )
    lengths = sorted(length for length in rows["prefill_length"].unique() if length > 0)
    for i, quantity in enumerate(quantities):
        for j, arch in enumerate(archs):
            ax, mine = sheet.axes[i, j], select(rows, quantity=quantity, arch=arch)
            known = select(models, quantity=quantity, arch=arch)
            if mine.empty and known.empty:
                ax.set_visible(False)
                continue
            ax.set_title(f"{styles[arch].name}, {NAMES[quantity]}", color=styles[arch].colour)
            ax.axhline(1, color=INK, lw=0.9, zorder=2)
            if mine.empty:
                say(ax, f"no fit: {reasons(known)}", blank=False)
                continue
            _ratios(ax, mine, reach, colours, styles[arch].marker, f"residuals-{quantity}-{arch}")
    ends = (1 / reach, 1, reach)
    zeros = [min(lengths) / 2] if (rows["prefill_length"] == 0).any() else []
    for ax in sheet.axes.flat:
        ax.set_yscale("log")
        ax.set_ylim(1 / reach / 1.04, reach * 1.04)
        log_axis(ax, "x", lambda value: "0" if value in zeros else count(value), [*zeros, *thin(lengths, 5)])
        log_axis(ax, "y", lambda value: f"{value:.3g}×", ends if reach < 2 else (0.125, 0.25, 0.5, 1, 2, 4, 8))
    for ax in sheet.axes[-1]:
        ax.set_xlabel("prefill length [tokens]")
    for row in sheet.axes:
        first = next(ax for ax in row if ax.get_visible())
        first.set_ylabel("predicted / measured [×]")
        first.tick_params(labelleft=True)
    batches = list(colours)
    shown = (
        batches if len(batches) <= 7 else [batches[k] for k in np.linspace(0, len(batches) - 1, 7).round().astype(int)]
    )
    sheet.handles = [mark(f"batch {count(batch)}", colours[batch], "o", mew=0) for batch in shown]
    return sheet.finish()
