"""The fitted loss surface L(N, D) against the runs."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .isoflop import VARIABLES
from .sheet import Sheet, empty_sheet, log_axis, mark, say
from .style import SOFT, ArchStyle, arch_styles, count, interval, plain, sequential, si, themed
from .tables import Tables, base_context, fine, good_runs, order_archs, reasons, select

TITLE = "The fitted loss surface L(N, D) against the runs"
BOUND = ["A", "B", "E", "alpha", "beta", "gamma"]


def surface_loss(fit: pd.Series, num_params: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """L = E + (A / N^α + B / D^β)^γ of one row of `fits/surface` [nat/token]."""
    inner = fit["A"] / num_params ** fit["alpha"] + fit["B"] / num_tokens ** fit["beta"]
    return fit["E"] + inner ** fit["gamma"]


def surface_row(tables: Tables, arch: str, context: int, config: Mapping[str, Any]) -> tuple[pd.Series | None, str]:
    """The fit to draw: the wanted subset, form and δ if it is usable, else the first that is; and why if none is."""
    fits = select(tables.table("fits/surface", "subset", "form", "huber_delta", *BOUND, "status"), arch=arch)
    here = select(fits, context_length=context)
    fits = here if len(here) else fits
    usable = fits[fine(fits["status"]) & np.isfinite(fits[BOUND].astype(float)).all(axis=1)]
    if usable.empty:
        return None, reasons(fits)
    wanted = {"subset": "all", "form": "gamma_free", "huber_delta": 1e-3, **dict(config.get("surface") or {})}
    closeness = sum((usable[key] == wanted[key]).astype(int) for key in ("subset", "form"))
    distance = np.abs(np.log10(usable["huber_delta"].astype(float) / float(wanted["huber_delta"])))
    order = pd.DataFrame({"closeness": -closeness, "distance": distance}).sort_values(["closeness", "distance"])
    return usable.loc[order.index[0]], ""


def slice_sizes(runs: pd.DataFrame, most: int = 6) -> list[float]:
    """Sizes to slice at: those trained on the most amounts of tokens, at most `most`, spread over log N."""
    sizes = runs.groupby("num_params")["num_tokens"].nunique()
    for fewest in (2, 1):
        usable = np.array(sizes.index[sizes >= fewest], dtype=float)
        if len(usable) >= min(3, len(sizes)):
            break
    grid = np.geomspace(usable.min(), usable.max(), min(most, len(usable)))
    return sorted({float(usable[np.abs(np.log(usable / value)).argmin()]) for value in grid})


def nearest_size(size: float, sizes: Iterable[float], reach: float = 0.12) -> float | None:
    """The size of `sizes` nearest to `size`, or None where it is further off than `reach` in ln N."""
    best = min(sizes, key=lambda other: abs(np.log(other / size)))
    return best if abs(np.log(best / size)) <= reach else None


def surface_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """The slices drawn: `arch, num_params, num_tokens, fitted_loss`, each over the tokens near its runs."""
    context = base_context(tables, config.get("base_context"))
    runs = good_runs(tables)
    runs = runs[runs["context_length"] == context]
    parts = []
    for arch in order_archs(runs["arch"]):
        fit, _ = surface_row(tables, arch, context, config)
        mine = runs[runs["arch"] == arch]
        if fit is None or mine.empty:
            continue
        for key in slice_sizes(runs):
            near = mine[[nearest_size(size, [key]) is not None for size in mine["num_params"]]]
            if near.empty:
                continue
            size = float(near["num_params"].median())
            tokens = np.geomspace(near["num_tokens"].min() / 1.3, near["num_tokens"].max() * 1.3, 60)
            loss = surface_loss(fit, np.full_like(tokens, size), tokens)
            parts.append(pd.DataFrame({"arch": arch, "num_params": size, "num_tokens": tokens, "fitted_loss": loss}))
    return pd.concat(parts) if parts else pd.DataFrame(columns=["arch", "num_params", "num_tokens", "fitted_loss"])


def _slices(ax: Axes, runs: pd.DataFrame, lines: pd.DataFrame, style: ArchStyle, colours: Mapping[float, Any]) -> None:
    keys = [nearest_size(size, colours) for size in runs["num_params"]]
    apart = np.array([key is None for key in keys])
    ax.scatter(
        runs["num_tokens"][apart], runs["val_loss"][apart], color="#d5d8db", s=12, marker=style.marker, lw=0, zorder=1
    ).set_gid(f"others-{style.name}")
    points = ax.scatter(
        runs["num_tokens"][~apart],
        runs["val_loss"][~apart],
        c=[colours[key] for key in keys if key is not None],
        s=26,
        marker=style.marker,
        edgecolors="white",
        lw=0.4,
        zorder=3,
    )
    points.set_gid(f"runs-{style.name}")
    for size, line in lines.groupby("num_params"):
        tint = colours[nearest_size(size, colours, np.inf)]
        ax.plot(line["num_tokens"], line["fitted_loss"], color=tint, lw=1.7, zorder=2)


def _predicted(ax: Axes, tables: Tables, context: int, fits: Mapping[str, pd.Series], styles: Mapping) -> list[Any]:
    predictions = tables.table("fits/surface_predictions", "val_loss", "predicted_loss")
    entries = []
    for arch, fit in fits.items():
        rows = select(predictions, arch=arch, subset=fit["subset"], form=fit["form"])
        rows = select(rows, context_length=context) if (rows["context_length"] == context).any() else rows
        style = styles[arch]
        points = ax.scatter(
            rows["val_loss"], rows["predicted_loss"], s=18, marker=style.marker, color=style.colour, alpha=0.6, lw=0
        )
        points.set_gid(f"predicted-{arch}")
        error = np.sqrt(np.mean(np.log(rows["predicted_loss"] / rows["val_loss"]) ** 2))
        entries.append(mark(f"{style.name}: rms error {100 * error:.1f} %", style.colour, style.marker))
    if ax.has_data():
        lo, hi = ax.get_xlim()
        ax.plot([lo, hi], [lo, hi], color=SOFT, lw=1, ls=(0, (4, 3)), zorder=1)
        ax.set_xlim(lo, hi)
    return entries


@themed
def loss_surface(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Slices of L(N, D) at fixed N per architecture with the runs, and predicted against measured losses."""
    context = base_context(tables, config.get("base_context"))
    runs = good_runs(tables)
    runs = runs[runs["context_length"] == context]
    if runs.empty:
        return empty_sheet(TITLE, f"no fit: no run with a loss at context {count(context)}")
    archs, styles = order_archs(runs["arch"]), arch_styles(tables.archs)
    found = {arch: surface_row(tables, arch, context, config) for arch in archs}
    fits = {arch: fit for arch, (fit, _) in found.items() if fit is not None}
    lines = surface_data(tables, config)
    sheet = Sheet(
        TITLE,
        rf"$L=E+(A/N^{{\alpha}}+B/D^{{\beta}})^{{\gamma}}$ at context {count(context)}. Left: lines are the surface at "
        "a fixed model size N, points the runs of that size. Right: what the surface predicts for each run.",
        ncols=len(archs) + 1,
        width=3.6 * (len(archs) + 1),
        row_height=3.7,
    )
    colours = sequential(slice_sizes(runs))
    losses = (runs["val_loss"].min() * 0.98, runs["val_loss"].max() * 1.02)
    for ax, arch in zip(sheet.axes[0], archs):
        fit, why = found[arch]
        _slices(ax, runs[runs["arch"] == arch], lines[lines["arch"] == arch], styles[arch], colours)
        ax.set_ylim(*losses)
        log_axis(ax, "x", si)
        log_axis(ax, "y", plain)
        ax.set_title(styles[arch].name, color=styles[arch].colour)
        ax.set_xlabel(VARIABLES["num_tokens"])
        if fit is None:
            say(ax, f"no fit: {why}", blank=False)
            continue
        parts = (("E", "E"), ("alpha", "α"), ("beta", "β"), ("gamma", "γ"))
        values = [
            f"{symbol} = {interval(fit[key], fit.get(f'{key}_lo', np.nan), fit.get(f'{key}_hi', np.nan))}"
            for key, symbol in parts
            if not (key == "gamma" and fit["form"] == "gamma_fixed")
        ]
        form = "γ = 1" if fit["form"] == "gamma_fixed" else "γ free"
        sheet.note(
            f"{styles[arch].name}: {', '.join(values)}; form {form}, runs: {fit['subset']}, "
            f"Huber δ = {fit['huber_delta']:g}, {int(fit['num_runs'])} runs."
        )
    sheet.axes[0, 0].set_ylabel("validation loss [nat/token], log scale")
    last = sheet.axes[0, -1]
    entries = _predicted(last, tables, context, fits, styles)
    last.set_title("Predicted against measured")
    last.set_xlabel("measured loss [nat/token]")
    last.set_ylabel("predicted loss [nat/token]")
    if entries:
        last.legend(handles=entries, loc="upper left", handletextpad=0.2)
    else:
        say(last, "no fit: " + (found[archs[0]][1] or "no predictions"))
    sheet.handles = [mark(f"N ≈ {si(size)}", colour, "o", line="-") for size, colour in colours.items()]
    sheet.handles.append(mark("runs of other sizes", "#d5d8db", "o", ms=4))
    return sheet.finish()
