"""The effect of the training context on the compute-optimal model."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .isoflop import VARIABLES, draw_cell
from .optimal import draw_band, draw_minima, exponent_text
from .sheet import Sheet, empty_sheet, hollow_mark, log_axis, mark, say
from .style import INK, arch_styles, count, flops, nested, sequential, si, themed
from .tables import Tables, good_runs, interval_percent, order_archs, pick, reasons, select, tagged

TITLE = "Context: how the best model size moves with the length trained on"


def context_budget(tables: Tables, wanted: float | None = None) -> float:
    """The budget to compare contexts at: `wanted`, or the one fitted at the most contexts (the largest of those)."""
    if wanted:
        return float(wanted)
    cells = tagged(tables.table("fits/isoflop", "arch", "context_length", "status"))
    cells = cells[cells["variable"] == "num_params"]
    if cells.empty:
        return float("nan")
    rank = cells.groupby("isoflop_tag").agg(
        fitted=("status", lambda status: int((status == "ok").sum())), contexts=("context_length", "nunique")
    )
    rank["tag"] = rank.index
    return float(rank.sort_values(["contexts", "fitted", "tag"]).index[-1])


def context_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Runs at the compared budget, all contexts."""
    budget = context_budget(tables, config.get("context_budget"))
    runs = good_runs(tables)
    kept = ["run_id", "arch", "context_length", "isoflop_tag", "num_params", "num_tokens", "num_flops", "val_loss"]
    return runs.loc[runs["isoflop_tag"] == budget, kept]


def _against_context(ax: Axes, tables: Tables, cells: pd.DataFrame, budget: float, archs: list[str]) -> int:
    styles, hollow, entries = arch_styles(tables.archs), 0, []
    keys = {"variable": "num_params", "predictor": "context_length", "isoflop_tag": budget}
    laws = select(tagged(tables.table("fits/power_laws", "exponent")), **keys)
    bands = select(tagged(tables.table("fits/power_law_bands", "value")), **keys)
    for k, arch in enumerate(archs):
        style = styles[arch]
        draw_band(ax, select(bands, arch=arch), style, f"context-law-{arch}")
        hollow += draw_minima(
            ax, select(cells, arch=arch), "context_length", style, f"context-minima-{arch}", nested(k, 64)
        )
        exponent = exponent_text(select(laws, arch=arch), "T")
        text = f"N* ∝ {exponent}" if exponent else "no power law"
        entries.append(mark(f"{style.name}: {text}", style.colour, style.marker, line="-"))
    log_axis(ax, "x", count, sorted(cells["context_length"].unique()))
    log_axis(ax, "y", si)
    lo, hi = ax.get_ylim()
    ax.set_ylim(lo, hi * (hi / lo) ** (0.08 + 0.1 * len(archs)))
    log_axis(ax, "y", si)
    ax.legend(handles=entries, loc="upper left")
    return hollow


@themed
def context(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """IsoFLOP curves at one budget over contexts per architecture, and N* against the context."""
    budget = context_budget(tables, config.get("context_budget"))
    runs = context_data(tables, config)
    cells = tagged(tables.table("fits/isoflop", "x_opt", "status"))
    cells = select(cells, variable="num_params", isoflop_tag=budget)
    if runs.empty:
        return empty_sheet(TITLE, f"no fit: {reasons(cells)}")
    archs, styles = order_archs(runs["arch"]), arch_styles(tables.archs)
    contexts = sequential(runs["context_length"])
    level = interval_percent(config)
    sheet = Sheet(
        TITLE,
        f"IsoFLOP curves at {flops(budget)} FLOPs, one colour a training context T; right: the size at their minimum "
        f"with its {level:g} % bootstrap interval.",
        ncols=len(archs) + 1,
        width=3.6 * (len(archs) + 1),
        row_height=3.7,
    )
    hollow = False
    limits = (runs["val_loss"].min(), runs["val_loss"].max())
    margin = 0.06 * (limits[1] - limits[0])
    for ax, arch in zip(sheet.axes[0], archs):
        mine = runs[runs["arch"] == arch]
        for length, cell_runs in mine.groupby("context_length"):
            cell = pick(cells, arch=arch, context_length=length)
            hollow |= not draw_cell(ax, cell_runs, cell, "num_params", contexts[length], styles[arch])
        ax.set_ylim(limits[0] - margin, limits[1] + margin)
        ax.set_xscale("log")
        ax.set_xlim(runs["num_params"].min() / 1.2, runs["num_params"].max() * 1.2)
        ax.set_title(styles[arch].name, color=styles[arch].colour)
        ax.set_xlabel(VARIABLES["num_params"])
        log_axis(ax, "x", si)
        if cells[cells["arch"] == arch].empty:
            say(ax, f"no fit: {reasons(cells[cells['arch'] == arch])}", blank=False)
    sheet.axes[0, 0].set_ylabel("validation loss [nat/token]")
    last = sheet.axes[0, -1]
    last.set_title("Best size against context")
    if len(contexts) < 2:
        say(last, "no fit: the study has one context only")
    elif cells["x_opt"].isna().all():
        say(last, f"no fit: {reasons(cells)}")
    else:
        hollow |= bool(_against_context(last, tables, cells, budget, archs))
        last.set_xlabel("training context T [tokens]")
        last.set_ylabel("optimal model size N* [parameters]")
    sheet.handles = [mark(f"T = {count(c)}", colour, "", line="-", lw=3) for c, colour in contexts.items()]
    sheet.handles.append(mark(f"minimum, {level:g} % interval", "#bbbbbb", "D", mec=INK))
    if hollow:
        sheet.handles.append(hollow_mark("no usable minimum"))
        sheet.note(f"Hollow and grey, no usable minimum: {reasons(cells, 3)}.")
    return sheet.finish()
