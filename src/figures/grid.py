"""Every context of a study side by side: runs by size, tokens and loss; IsoFLOP curves; power laws."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from .isoflop import VARIABLES, draw_cell
from .optimal import SYMBOLS, draw_law, exponent_text
from .sheet import Sheet, arch_marks, empty_sheet, hollow_mark, log_axis, mark, say
from .style import arch_styles, count, flops, nested, plain, sequential, si, themed
from .tables import Tables, good_runs, interval_percent, order_archs, pick, reasons, select, tagged

MAP_TITLE = "Where the loss is low: every run by model size and tokens"
CURVES_TITLE = "IsoFLOP curves at every context"
LAWS_TITLE = "Compute-optimal size and tokens at every context"


def _width(columns: int) -> float:
    return max(7.0, 3.3 * columns)


def loss_map_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Every run with its loss: N, D, H and the set it belongs to."""
    columns = ["run_id", "arch", "context_length", "experiment_set", "num_params", "num_tokens", "num_flops"]
    return good_runs(tables)[[*columns, "val_loss"]]


@themed
def loss_map(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """N against D, coloured by the validation loss; a row an architecture, a column a context."""
    runs = loss_map_data(tables, config)
    if runs.empty:
        return empty_sheet(MAP_TITLE, "no runs: none has a loss")
    archs, styles = order_archs(runs["arch"]), arch_styles(tables.archs)
    contexts = sorted(runs["context_length"].unique())
    losses = runs["val_loss"].astype(float)
    low, high = losses.min(), losses.quantile(0.99)
    norm = LogNorm(low, high if high > low else 1.01 * low)
    colours = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.0, 0.92, 256)))
    sheet = Sheet(
        MAP_TITLE,
        f"{len(runs)} runs; the colour is the validation loss at the end of training, darker is lower.",
        nrows=len(archs),
        ncols=len(contexts),
        width=_width(len(contexts)) + 0.8,
        row_height=2.8,
        sharex=True,
        sharey=True,
    )
    for i, arch in enumerate(archs):
        for j, context in enumerate(contexts):
            ax = sheet.axes[i, j]
            here = runs[(runs["arch"] == arch) & (runs["context_length"] == context)]
            here = here.sort_values("val_loss", ascending=False)
            points = ax.scatter(
                here["num_params"],
                here["num_tokens"],
                c=here["val_loss"].astype(float),
                cmap=colours,
                norm=norm,
                s=28,
                marker=styles[arch].marker,
                edgecolors="white",
                lw=0.3,
                zorder=3,
            )
            points.set_gid(f"runs-{arch}-{context}")
            ax.set_title(f"{styles[arch].name}, context {count(context)}", color=styles[arch].colour)
            if here.empty:
                say(ax, "no runs", blank=False)
    for i, row in enumerate(sheet.axes):
        for j, ax in enumerate(row):
            log_axis(ax, "x", si)
            log_axis(ax, "y", si)
            if i == len(archs) - 1:
                ax.set_xlabel(VARIABLES["num_params"])
            if j == 0:
                ax.set_ylabel(VARIABLES["num_tokens"])
    bar = sheet.fig.colorbar(
        ScalarMappable(norm, colours), ax=list(sheet.axes.flat), pad=0.015, aspect=35, extend="max"
    )
    bar.outline.set_visible(False)
    log_axis(bar.ax, "y", plain)
    bar.set_label("validation loss [nat/token], log scale")
    return sheet.finish()


@themed
def isoflop_contexts(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Loss against N at every context that has a budget: parabolas and minima, one colour a budget."""
    runs = good_runs(tables)
    runs = runs[runs["isoflop_tag"].notna()]
    fits = tagged(tables.table("fits/isoflop", "arch", "context_length", "isoflop_tag", "variable", "x_opt", "status"))
    if runs.empty:
        return empty_sheet(CURVES_TITLE, "no fit: no run with a loss belongs to a FLOP budget")
    archs, styles = order_archs(runs["arch"]), arch_styles(tables.archs)
    contexts = sorted(runs["context_length"].unique())
    colours = sequential(runs["isoflop_tag"])
    level = interval_percent(config)
    sheet = Sheet(
        CURVES_TITLE,
        "Every point is a training run, every colour one compute budget; the diamond is the minimum of its parabola.",
        nrows=len(archs),
        ncols=len(contexts),
        width=_width(len(contexts)),
        row_height=2.8,
        sharex=True,
        sharey=True,
    )
    failed = 0
    for i, arch in enumerate(archs):
        for j, context in enumerate(contexts):
            ax = sheet.axes[i, j]
            for budget, cell_runs in select(runs, arch=arch, context_length=context).groupby("isoflop_tag"):
                keys = {"arch": arch, "context_length": context, "isoflop_tag": budget}
                cell = pick(fits, **keys, variable="num_params")
                failed += not draw_cell(ax, cell_runs, cell, "num_params", colours[budget], styles[arch])
            ax.set_title(f"{styles[arch].name}, context {count(context)}", color=styles[arch].colour)
            if not ax.has_data():
                say(ax, "no runs of a budget", blank=False)
            elif fits.empty:
                say(ax, f"no fit: {reasons(fits)}", blank=False)
    for i, row in enumerate(sheet.axes):
        for j, ax in enumerate(row):
            log_axis(ax, "x", si)
            if i == len(archs) - 1:
                ax.set_xlabel(VARIABLES["num_params"])
            if j == 0:
                ax.set_ylabel("validation loss [nat/token]")
    sheet.handles = [mark(f"{flops(b)} FLOPs", colour, "", line="-", lw=3) for b, colour in colours.items()]
    sheet.handles.append(mark(f"minimum, {level:g} % interval", "#bbbbbb", "D", mec="#222222"))
    if failed:
        sheet.handles.append(hollow_mark(f"no usable minimum ({failed} budgets)"))
    return sheet.finish()


@themed
def power_laws(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """N*(H) and D*(H) at every context: minima, power laws with bands, exponents in the legends."""
    cells = tagged(tables.table("fits/isoflop", "flops_mean", "x_opt", "status"))
    laws = select(tables.table("fits/power_laws", "exponent", "status"), predictor="flops")
    bands = select(tables.table("fits/power_law_bands"), predictor="flops")
    if cells.empty:
        return empty_sheet(LAWS_TITLE, f"no fit: {reasons(cells)}")
    level = interval_percent(config)
    archs, styles = order_archs(cells["arch"]), arch_styles(tables.archs)
    contexts = sorted(cells["context_length"].unique())
    sheet = Sheet(
        LAWS_TITLE,
        "Minima of the IsoFLOP curves against training compute, a column a context; bars and bands are "
        f"{level:g} % bootstrap intervals.",
        nrows=2,
        ncols=len(contexts),
        width=_width(len(contexts)),
        row_height=2.9,
        sharex=True,
        sharey="row",
    )
    hollow, beyond = 0, False
    for i, (variable, label) in enumerate(VARIABLES.items()):
        for j, context in enumerate(contexts):
            ax, entries = sheet.axes[i, j], []
            for k, arch in enumerate(archs):
                style, keys = styles[arch], {"arch": arch, "context_length": context, "variable": variable}
                gid = f"{arch}-{variable}-{context}"
                drawn = draw_law(ax, select(cells, **keys), select(bands, **keys), style, gid, nested(k, 50))
                beyond, hollow = beyond | drawn[0], hollow + drawn[1]
                law = select(laws, **keys)
                text = "no fit"
                if exponent := exponent_text(law, "H"):
                    budgets = int(law.iloc[0]["num_points"])
                    text = f"∝ {exponent}" + (f", {budgets} budgets" if budgets > 0 else "")
                entries.append(mark(f"{SYMBOLS[variable]} {text}", style.colour, style.marker, line="-"))
            here = select(cells, context_length=context, variable=variable)
            if not (here["x_opt"] > 0).any():
                say(ax, f"no fit: {reasons(here)}", blank=False)
            else:
                ax.legend(handles=entries, loc="upper left", borderaxespad=0.4, handlelength=1.4, fontsize=8)
            if i == 0:
                ax.set_title(f"context {count(context)}")
            if j == 0:
                ax.set_ylabel(
                    f"{SYMBOLS[variable]}, best {label.split(' [')[0].rsplit(' ', 1)[0]} [{label.split('[')[1]}"
                )
            if i == 1:
                ax.set_xlabel("training compute H [FLOPs]")
    found = cells[cells["x_opt"] > 0]
    for row, variable in zip(sheet.axes, VARIABLES):
        if (found["variable"] == variable).any():
            row[0].set_yscale("log")
            lo, hi = row[0].get_ylim()
            row[0].set_ylim(lo, hi * (hi / lo) ** (0.06 + 0.11 * len(archs)))
            for ax in row:
                log_axis(ax, "y", si)
        else:
            row[0].set_yticks([])
    for ax in sheet.axes.flat if len(found) else ():
        log_axis(ax, "x", flops)
    sheet.handles = arch_marks(styles, archs, line="-")
    if beyond:
        sheet.note("Dashed: the power law carried on beyond the largest budget measured; not checked by any run.")
    if hollow:
        sheet.handles.append(hollow_mark("unusable minimum, not in the fit"))
    return sheet.finish()
