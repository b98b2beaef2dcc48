"""Which model to take: best loss against budget, and which architecture wins where."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from xlstm_scaling.accounting import ARCHITECTURES
from xlstm_scaling.accounting.hardware import DEVICES
from xlstm_scaling.planning import PlanningError
from xlstm_scaling.planning.laws import TABLES
from xlstm_scaling.planning.maps import (
    advantages,
    best_losses,
    ladders,
    limits_of,
    round_contexts,
    study_laws,
    swept_budget,
)
from xlstm_scaling.planning.runtime import Roofline, Runtime, runtime_of_table

from .sheet import Sheet, empty_sheet, log_axis, mark
from .style import ArchStyle, arch_styles, count, flops, seconds, themed
from .tables import Tables, interval_percent, order_archs

TITLE = "The best model for a budget, a context and a latency limit"
#: grid: budgets of the curves, budgets and limits of the maps
CURVE_POINTS, MAP_POINTS, LIMIT_POINTS = 15, 7, 9
#: budgets go on to this multiple of the largest measured, contexts to that
BEYOND_FLOPS, BEYOND_CONTEXT = 100.0, 4
SURE = 0.95
#: share of the cells whose advantage is coloured in full, and the bounds of what counts as full [nat/token]
SATURATED, FULL = 0.15, (0.02, 0.5)


def study_runtime(tables: Tables, archs: list[str]) -> Runtime:
    """The runtime model of the study's first device, where it has one of every architecture; else a roofline."""
    if "inference/runtime_model" in tables:
        try:
            found = runtime_of_table(tables["inference/runtime_model"], None, "inference/runtime_model")
        except PlanningError:
            found = None
        if found is not None and all((arch, "ttft") in found.rows for arch in archs):
            return found
    return Roofline(DEVICES["H100"])


def choice_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Every search that is drawn: `planning.maps.COLUMNS`, and the panel it is in."""
    for name in TABLES:
        tables.table(f"fits/{name}")
    try:
        laws = study_laws(tables, config.get("confidence") or 0.95)
    except PlanningError:
        return pd.DataFrame(columns=["panel"])
    known = [law for arch, law in laws.archs.items() if arch in ARCHITECTURES]
    if not known or any("num_flops" not in law.ranges for law in known):
        return pd.DataFrame(columns=["panel"])
    runtime = study_runtime(tables, [law.arch for law in known])
    swept = swept_budget(laws, tables["fits/isoflop"])
    least = min(law.ranges["num_flops"][0] for law in known)
    contexts = round_contexts(
        min(law.ranges["context_length"][0] for law in known),
        BEYOND_CONTEXT * max(law.ranges["context_length"][1] for law in known),
    )
    ends, shapes = (least, BEYOND_FLOPS * swept), ladders(laws)
    parts = {"budget": best_losses(laws, shapes, [known[0].base_context], np.geomspace(*ends, CURVE_POINTS))}
    parts["context"] = best_losses(laws, shapes, contexts, np.geomspace(*ends, MAP_POINTS))
    for name, budget in (("limit", swept), ("limit, 10 times the budget", 10 * swept)):
        times = best_losses(laws, shapes, [contexts[0], contexts[-1]], [budget], runtime=runtime)["ttft_s"]
        limits = [times.min() / 3, times.max()]
        parts[name] = best_losses(laws, shapes, contexts, [budget], limits_of(limits, LIMIT_POINTS), runtime)
    return pd.concat([part.assign(panel=name) for name, part in parts.items()], ignore_index=True)


@themed
def choice(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Loss against budget with intervals; maps of the architectures' difference over context, budget and limit."""
    table = choice_data(tables, config)
    if table.empty:
        return empty_sheet(TITLE, "no fit: no loss surface converged of an architecture that can be counted")
    archs, styles = order_archs(table["arch"]), arch_styles(tables.archs)
    maps = [name for name in table["panel"].unique() if name != "budget"] if len(archs) > 1 else []
    runtime = study_runtime(tables, archs)
    level = interval_percent(config)
    sheet = Sheet(
        TITLE,
        "The best shape that can be built, by the study's loss surface at every context; bands are "
        f"{level:g} % bootstrap intervals." + (" Maps: whose loss is lower, and by how much." if maps else ""),
        nrows=2 if maps else 1,
        ncols=2 if maps else 1,
        row_height=3.6,
    )
    axes = list(sheet.axes.flat)
    _curves(axes[0], table[table["panel"] == "budget"], archs, styles, sheet)
    if maps:
        pair = archs[:2]
        ends = [styles[pair[1]].colour, "#ffffff", styles[pair[0]].colour]
        colours = LinearSegmentedColormap.from_list("pair", ends, N=255).with_extremes(bad="#d9dcdf")
        gaps = advantages(table[table["panel"] != "budget"], *pair)["advantage"].abs()
        widest = gaps[np.isfinite(gaps)].quantile(1 - SATURATED)
        norm = TwoSlopeNorm(0.0, *(sign * float(np.clip(np.nan_to_num(widest), *FULL)) for sign in (-1, 1)))
        for ax, name in zip(axes[1:], maps):
            image = _map(ax, name, table[table["panel"] == name], pair, colours, norm)
        bar = sheet.fig.colorbar(image, ax=axes[1:], shrink=0.5, pad=0.02, extend="both")
        bar.set_label(f"loss of {styles[pair[1]].name} − {styles[pair[0]].name} [nat/token]")
        sheet.note(
            f"Dot: not sure which is better (less than {SURE:.0%} of paired resamples). Grey: no model of either keeps "
            "the limit; full colour: of one only. Prompts fill the context. Dashed: beyond the budgets and contexts "
            "measured; there the law is extrapolated."
        )
        sheet.note(f"Times: {runtime.about}.")
        if len(archs) > 2:
            sheet.note(f"Maps compare {styles[pair[0]].name} and {styles[pair[1]].name} only.")
    left_out = [styles[arch].name for arch in tables.archs if arch not in archs]
    if left_out:
        sheet.note(f"Left out, as they have no law or cannot be counted: {', '.join(left_out)}.")
    return sheet.finish()


def _curves(ax: Axes, table: pd.DataFrame, archs: list[str], styles: Mapping[str, ArchStyle], sheet: Sheet) -> None:
    context = table["context_length"].iloc[0]
    for arch in archs:
        mine, style = table[table["arch"] == arch].sort_values("flops"), styles[arch]
        inside = mine["beyond_flops"] <= 1
        edge = mine[~inside.shift(1, fill_value=True) | ~inside | ~inside.shift(-1, fill_value=True)]
        ax.fill_between(mine["flops"], mine["loss_lo"], mine["loss_hi"], color=style.colour, alpha=0.18, lw=0)
        ax.plot(mine.loc[inside, "flops"], mine.loc[inside, "loss"], color=style.colour)[0].set_gid(f"choice-{arch}")
        ax.plot(edge["flops"], edge["loss"], color=style.colour, ls=(0, (4, 3)), lw=1.3)
        sheet.handles.append(mark(style.name, style.colour, style.marker, line="-", ms=0))
    ax.set_title(f"best loss, context {count(context)}")
    ax.set_xlabel("training compute H [FLOPs]")
    ax.set_ylabel("loss [nat/token]")
    log_axis(ax, "x", flops)


def _map(
    ax: Axes,
    name: str,
    table: pd.DataFrame,
    pair: list[str],
    colours: LinearSegmentedColormap,
    norm: TwoSlopeNorm,
) -> Any:
    """One map: context across, budget or limit upwards; the mesh."""
    vertical = "flops" if name == "context" else "max_ttft_s"
    cells = advantages(table, *pair)
    grid = cells.pivot_table(index=vertical, columns="context_length", values="advantage", dropna=False)
    sure = cells.pivot_table(index=vertical, columns="context_length", values="probability_first", dropna=False)
    x, y = grid.columns.to_numpy(dtype=float), grid.index.to_numpy(dtype=float)
    found = grid.to_numpy(dtype=float)
    shown = np.ma.masked_invalid(np.clip(found, norm.vmin, norm.vmax))
    image = ax.pcolormesh(_edges(x), _edges(y), shown, cmap=colours, norm=norm)
    image.set_gid(f"map-{name}")
    chance = sure.reindex(index=grid.index, columns=grid.columns).to_numpy(dtype=float)
    unsure = np.isfinite(found) & (chance > 1 - SURE) & (chance < SURE)
    rows, columns = np.nonzero(unsure)
    ax.scatter(x[columns], y[rows], s=14, facecolors="white", edgecolors="#444444", linewidths=0.8)
    log_axis(ax, "x", count, x[:: -(-len(x) // 4)])
    log_axis(ax, "y", flops if vertical == "flops" else seconds)
    ax.grid(False)
    seen = table["context_length"][table["beyond_context"] <= 1].max()
    if np.isfinite(seen):
        ax.axvline(seen * np.sqrt(2), color="#444444", lw=0.9, ls=(0, (4, 3)))
    ax.set_xlabel("context [tokens]")
    if vertical == "flops":
        inside = table.loc[table.groupby("flops")["beyond_flops"].transform("max") <= 1, "flops"]
        outside = table.loc[table.groupby("flops")["beyond_flops"].transform("max") > 1, "flops"]
        if len(inside) and len(outside):
            ax.axhline(np.sqrt(inside.max() * outside.min()), color="#444444", lw=0.9, ls=(0, (4, 3)))
        ax.set_ylabel("training compute H [FLOPs]")
        ax.set_title("no limit of times")
    else:
        ax.set_ylabel("limit of the time to first token [s]")
        ax.set_title(f"limited prefill, {flops(table['flops'].iloc[0])} FLOPs")
    return image


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of cells around values that are even in their logarithms."""
    logs = np.log(values)
    step = (logs[-1] - logs[0]) / max(len(logs) - 1, 1) or 1.0
    return np.exp(np.append(logs - step / 2, logs[-1] + step / 2))
