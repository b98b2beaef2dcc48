"""Compute-optimal model size and tokens against the training budget."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .isoflop import VARIABLES
from .sheet import Sheet, empty_sheet, hollow_mark, log_axis, mark, say, whiskers
from .style import FAILED, ArchStyle, arch_styles, count, flops, interval, nested, power, si, themed
from .tables import Tables, base_context, interval_percent, order_archs, reasons, select, tagged

TITLE = "Compute-optimal size and tokens grow as powers of the budget"
SYMBOLS = {"num_params": "N*", "num_tokens": "D*"}


def draw_band(ax: Axes, band: pd.DataFrame, style: ArchStyle, gid: str, last: float = np.inf) -> bool:
    """Line and shaded interval of `fits/power_law_bands`, dashed beyond `last`; whether any of it lies there."""
    band = band.sort_values("predictor_value")
    ax.fill_between(
        band["predictor_value"], band["value_lo"], band["value_hi"], color=style.colour, alpha=0.15, lw=0, zorder=1
    )
    inside = band[band["predictor_value"] <= last]
    outside = band[band["predictor_value"] >= inside["predictor_value"].max()] if len(inside) else band
    ax.plot(inside["predictor_value"], inside["value"], color=style.colour, lw=1.8, zorder=2)[0].set_gid(gid)
    if len(outside) > 1:
        ax.plot(outside["predictor_value"], outside["value"], color=style.colour, lw=1.3, ls=(0, (4, 3)), zorder=2)
    return len(outside) > 1


def draw_minima(ax: Axes, cells: pd.DataFrame, x: str, style: ArchStyle, gid: str, area: float = 42) -> int:
    """Minima with whiskers, hollow where the status is not ok; returns how many of those were drawn."""
    usable = cells[np.isfinite(cells["x_opt"].astype(float)) & (cells["x_opt"] > 0)]
    for fine, group in ((True, usable[usable["status"] == "ok"]), (False, usable[usable["status"] != "ok"])):
        tint = style.colour if fine else FAILED
        if fine:
            for row in group.itertuples():
                whiskers(ax, getattr(row, x), row.x_opt, y_range=(row.x_opt_lo, row.x_opt_hi), colour=tint)
        points = ax.scatter(
            group[x],
            group["x_opt"],
            s=area,
            marker=style.marker,
            facecolors=[tint] if fine else "none",
            edgecolors="white" if fine else FAILED,
            linewidths=0.7 if fine else 1.2,
            zorder=5,
        )
        points.set_gid(f"{gid}-{'ok' if fine else 'failed'}")
    return int((usable["status"] != "ok").sum())


def draw_law(
    ax: Axes, cells: pd.DataFrame, band: pd.DataFrame, style: ArchStyle, gid: str, area: float
) -> tuple[bool, int]:
    """Minima against the budget and the power law through them; whether it goes on beyond them, and `draw_minima`."""
    last = 1.001 * cells.loc[cells["status"] == "ok", "flops_mean"].max()
    beyond = draw_band(ax, band, style, f"law-{gid}", last)
    return beyond, draw_minima(ax, cells, "flops_mean", style, f"minima-{gid}", area)


def exponent_text(laws: pd.DataFrame, base: str) -> str:
    """The base raised to the exponent of the one law, with its interval; nothing where it has no usable fit."""
    if laws.empty or laws.iloc[0]["status"] != "ok":
        return ""
    row = laws.iloc[0]
    return power(base, row["exponent"], row["exponent_lo"], row["exponent_hi"])


@themed
def compute_optimal(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """N*(H) and D*(H): minima with intervals, power laws with bootstrap bands, exponents in the legends."""
    context = base_context(tables, config.get("base_context"))
    cells = select(tagged(tables.table("fits/isoflop", "flops_mean", "x_opt", "status")), context_length=context)
    laws = select(tables.table("fits/power_laws", "exponent", "status"), context_length=context, predictor="flops")
    bands = select(tables.table("fits/power_law_bands"), context_length=context, predictor="flops")
    if cells.empty:
        return empty_sheet(TITLE, f"no fit: {reasons(cells)}")
    level = interval_percent(config)
    archs, styles = order_archs(cells["arch"]), arch_styles(tables.archs)
    sheet = Sheet(
        TITLE,
        f"Minima of the IsoFLOP curves at context {count(context)} against training compute; bars and bands are "
        f"{level:g} % bootstrap intervals.",
        ncols=2,
        row_height=3.9,
    )
    hollow, beyond = 0, False
    for ax, (variable, label) in zip(sheet.axes[0], VARIABLES.items()):
        entries = []
        for k, arch in enumerate(archs):
            style, keys = styles[arch], {"arch": arch, "variable": variable}
            mine, band = select(cells, **keys), select(bands, **keys)
            drawn = draw_law(ax, mine, band, style, f"{arch}-{variable}", nested(k, 64))
            beyond, hollow = beyond | drawn[0], hollow + drawn[1]
            law = select(laws, **keys)
            exponent = exponent_text(law, "H")
            text = f"{SYMBOLS[variable]} ∝ {exponent}" if exponent else f"no fit: {reasons(law)}"
            entries.append(mark(f"{style.name}:  {text}", style.colour, style.marker, line="-"))
        if not ax.has_data() or select(cells, variable=variable)["x_opt"].isna().all():
            say(ax, f"no fit: {reasons(select(cells, variable=variable))}")
        else:
            log_axis(ax, "x", flops)
            log_axis(ax, "y", si)
            lo, hi = ax.get_ylim()
            ax.set_ylim(lo, hi * (hi / lo) ** (0.1 + 0.09 * len(archs)))
            log_axis(ax, "y", si)
        ax.legend(handles=entries, loc="upper left", borderaxespad=0.6, handlelength=2.2)
        ax.set_xlabel("training compute H [FLOPs]")
        ax.set_ylabel(f"compute-optimal {label}".replace(f" {SYMBOLS[variable][0]} [", f" {SYMBOLS[variable]} ["))
    if beyond:
        sheet.note("Dashed: the power law carried on beyond the largest budget measured; not checked by any run.")
    if hollow:
        sheet.handles.append(hollow_mark("minimum outside the sampled range or otherwise unusable; not in the fit"))
        sheet.note(f"Hollow and grey: {hollow} minima left out of the power laws ({reasons(cells, 3)}).")
    gaps = []
    for row in laws[laws["arch"].astype(str).str.contains(" - ")].itertuples():
        if row.variable in SYMBOLS and row.status == "ok":
            pair = " − ".join(styles[name].name if name in styles else name for name in str(row.arch).split(" - "))
            gaps.append(f"{SYMBOLS[row.variable]} {interval(row.exponent, row.exponent_lo, row.exponent_hi)} ({pair})")
    if gaps:
        sheet.note("Difference of the exponents: " + ", ".join(gaps) + ".")
    return sheet.finish()
