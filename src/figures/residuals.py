"""What the runtime model leaves over: predicted against measured times, over all batches and prefills."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .inference import NAMES
from .optimal import select
from .sheet import Sheet, empty_sheet, log_axis, mark, say
from .style import INK, SOFT, arch_styles, count, seconds, sequential, themed
from .tables import Tables, order_archs, reasons

TITLE = "How well the runtime model fits: predicted over measured time"
REACH = 8.0  # the axis ends here; what lies beyond is drawn on the edge


def runtime_residuals_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Measured and predicted times and their ratio, one row a measurement and quantity, by the fit to all of them."""
    columns = ("arch", "quantity", "device", "batch_size", "prefill_length", "measured_s", "predicted_s", "held_out")
    rows = tables.table("inference/runtime_predictions", *columns)
    rows = rows[~rows["held_out"].astype(bool)]
    if len(rows):
        device = config.get("device") or rows["device"].value_counts().index[0]
        rows = rows[rows["device"] == device]
    rows = rows[[column for column in (*columns, "num_params") if column in rows and column != "held_out"]]
    ratio = rows["predicted_s"].astype(float) / rows["measured_s"].astype(float)
    return rows.assign(predicted_over_measured=ratio)


@themed
def runtime_residuals(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Predicted over measured time against the measured time; a row a quantity, a column an architecture."""
    rows = runtime_residuals_data(tables, config)
    models = tables.table("inference/runtime_model", "arch", "quantity", "status")
    tables.table("inference/measurements", "arch")
    if rows.empty:
        return empty_sheet(TITLE, f"no fit of the runtime model: {reasons(models)}")
    archs, styles = order_archs(rows["arch"]), arch_styles(tables.archs)
    quantities = [name for name in NAMES if (rows["quantity"] == name).any()]
    colours = sequential(rows["batch_size"])
    sheet = Sheet(
        TITLE,
        f"Every measurement on {rows['device'].iloc[0]}, all model sizes, batches (colour) and prefills; 1 is a "
        "perfect fit, above it the model is too slow.",
        nrows=len(quantities),
        ncols=len(archs),
        row_height=2.6,
        sharex="row",
        sharey=True,
    )
    for i, quantity in enumerate(quantities):
        for j, arch in enumerate(archs):
            ax, mine = sheet.axes[i, j], select(rows, quantity=quantity, arch=arch)
            ax.set_title(f"{styles[arch].name}, {NAMES[quantity]}", color=styles[arch].colour)
            ax.set_xlabel(f"measured {NAMES[quantity]} [s]")
            ax.axhline(1, color=INK, lw=0.9, zorder=2)
            if mine.empty:
                say(ax, f"no fit: {reasons(select(models, quantity=quantity, arch=arch))}", blank=False)
                continue
            ax.scatter(
                mine["measured_s"],
                mine["predicted_over_measured"].clip(1 / REACH, REACH),
                c=[colours[batch] for batch in mine["batch_size"]],
                s=16,
                marker=styles[arch].marker,
                lw=0,
                alpha=0.85,
                zorder=3,
            ).set_gid(f"residuals-{quantity}-{arch}")
            near = np.abs(np.log(mine["predicted_over_measured"])) < np.log(1.25)
            ax.text(
                0.98,
                0.95,
                f"{100 * near.mean():.0f} % of {len(mine)} within a factor 1.25",
                transform=ax.transAxes,
                ha="right",
                va="top",
                size=8.5,
                color=SOFT,
                zorder=5,
            )
    for ax in sheet.axes.flat:
        ax.set_yscale("log")
        ax.set_ylim(1 / REACH / 1.1, REACH * 1.1)
        log_axis(ax, "x", seconds)
        log_axis(ax, "y", lambda value: f"{value:g}×", (0.125, 0.25, 0.5, 1, 2, 4, 8))
    for row in sheet.axes:
        row[0].set_ylabel("predicted / measured [×]")
    batches = list(colours)
    shown = (
        batches if len(batches) <= 7 else [batches[k] for k in np.linspace(0, len(batches) - 1, 7).round().astype(int)]
    )
    sheet.handles = [mark(f"batch {count(batch)}", colours[batch], "o", mew=0) for batch in shown]
    return sheet.finish()
