"""Leave-future-out: laws fitted on the smaller budgets, judged on the next one they have not seen.

For every architecture and context the budgets are taken in order. Power laws through the minima of the first k (at
least 2, as many as `power_law.min_points`) predict N*, D* and L* of budget k + 1. Loss surfaces at the base context are
fitted to all runs with less compute than the largest budget, and predict the loss of each of its runs.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .loss_surface import LossSurface
from .power_law import MINIMA, fit_lines, minima_draws
from .resampling import cell_generator, percentile_interval, refill, stratified_counts
from .surface_fit import bootstrap_surface, fit_surface
from .surface_tables import base_context
from .tables import budget_cells, make_table

Array = NDArray[np.float64]
#: a run belongs to the past of a budget if it has less than this share of the budget's FLOPs
PAST_SHARE = 0.75
#: resamples of a surface, at most
SURFACE_RESAMPLES = 200
#: few starts of the paper's grid: those scaled to the data find the same end points
_GRID = {"a": [0, 10], "b": [0, 10], "e": [0], "alpha": [0.5], "beta": [0.5], "gamma": [1]}


def fit_forecasts(
    isoflop: pd.DataFrame,
    resamples: pd.DataFrame,
    runs: pd.DataFrame,
    config: Mapping[str, Any],
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Predict every budget from the smaller ones.

    A power law's prediction is covered if 0 lies in the interval of ln predicted − ln observed over resamples of the
    budgets fitted and of the budget predicted. A run's loss is covered if it lies in the interval of the predicted loss
    times exp(a residual of the fit), both resampled.

    Args:
        isoflop, resamples: the tables of `isoflop.fit_isoflop`.
        runs: usable runs.
        config: the group `fitting`.
        progress: called with a line before each surface.

    Returns:
        The table `forecasts` of docs/tables.md; empty where no architecture has three budgets.
    """
    rows = [*_power_laws(isoflop, resamples, config), *_surfaces(isoflop, runs, config, progress)]
    return make_table("forecasts", rows, runs)


def _power_laws(isoflop: pd.DataFrame, resamples: pd.DataFrame, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    draws = minima_draws(resamples)
    fewest = max(2, int(config["power_law"]["min_points"]))
    for quantity, (parabola, column) in MINIMA.items():
        cells = isoflop[(isoflop["variable"] == parabola) & (isoflop["status"] == "ok")]
        for (arch, context), group in cells.groupby(["arch", "context_length"], sort=True):
            group = group.sort_values("flops_mean")
            x = np.log10(group["flops_mean"].to_numpy(dtype=np.float64))
            y = np.log(group[column].to_numpy(dtype=np.float64))
            tags = group["isoflop_tag"]
            pick = 0 if column == "x_opt" else 1
            refilled = [_draw(draws[arch, context, tag, parabola], config["seed"], arch, context, tag) for tag in tags]
            sampled = np.log([draw[:, pick] for draw in refilled])  # [budgets, resamples]
            for k in range(fewest, len(group)):
                lines = fit_lines(x[:k], np.vstack([y[:k], sampled[:k].T]))
                ahead = lines[:, 0] + lines[:, 1] * x[k]
                gap = percentile_interval(ahead[1:] - sampled[k], config["confidence"])
                lo, hi = percentile_interval(ahead[1:], config["confidence"])
                seen = percentile_interval(sampled[k], config["confidence"])
                row = {"arch": arch, "context_length": context, "law": "power_law", "quantity": quantity}
                row |= {"isoflop_tag": group["isoflop_tag"].iloc[k], "flops_mean": group["flops_mean"].iloc[k]}
                row |= {"num_points": k, "num_held_out": 1, "predicted": np.exp(ahead[0]), "observed": np.exp(y[k])}
                row |= {"predicted_lo": np.exp(lo), "predicted_hi": np.exp(hi)}
                row |= {"observed_lo": np.exp(seen[0]), "observed_hi": np.exp(seen[1])}
                row["error"] = float(np.expm1(ahead[0] - y[k]))
                if np.isfinite(gap).all():
                    row |= {"coverage": float(gap[0] <= 0 <= gap[1]), "status": "ok", "detail": f"{k} smaller budgets."}
                else:
                    row |= {"status": "no_interval", "detail": "Too few resamples have a minimum in the sampled range."}
                yield row


def _draw(samples: Array, seed: int, *cell: Any) -> Array:
    return refill(samples, cell_generator(seed, "forecast", *cell))


def _surfaces(
    isoflop: pd.DataFrame,
    runs: pd.DataFrame,
    config: Mapping[str, Any],
    progress: Callable[[str], None] | None,
) -> Iterator[dict[str, Any]]:
    context = base_context(runs, config)
    settings = {**config["surface"], "init_grid": _GRID}
    budgets = isoflop[(isoflop["context_length"] == context) & (isoflop["variable"] == "num_params")]
    for arch, group in budgets.groupby("arch", sort=True):
        last = group.sort_values("flops_mean").iloc[-1]
        mine = runs[(runs["arch"] == arch) & (runs["context_length"] == context)]
        past = mine[mine["num_flops"] < PAST_SHARE * last["flops_mean"]]
        future = mine[(mine["experiment_set"] == "isoflop") & (mine["isoflop_tag"] == last["isoflop_tag"])]
        if len(group) < 3 or future.empty:
            continue
        for form in config["surface"]["forms"]:
            if progress is not None:
                progress(f"forecast: {arch}, context {context}, {form}")
            row = {"arch": arch, "context_length": context, "law": f"surface_{form}", "quantity": "val_loss"}
            row |= {"isoflop_tag": last["isoflop_tag"], "flops_mean": last["flops_mean"], "num_points": len(past)}
            yield row | {"num_held_out": len(future)} | _surface(arch, past, future, form, settings, config)


def _surface(
    arch: str,
    past: pd.DataFrame,
    future: pd.DataFrame,
    form: str,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Prediction, errors and coverage of the losses of `future` by a surface fitted to `past`."""
    fit = fit_surface(past["num_params"], past["num_tokens"], past["val_loss"], settings, form=form)
    if fit.surface is None:
        return {"status": fit.status.value, "detail": fit.detail}
    sizes = future["num_params"].to_numpy(dtype=np.float64), future["num_tokens"].to_numpy(dtype=np.float64)
    observed = future["val_loss"].to_numpy(dtype=np.float64)
    predicted = fit.surface.predict(*sizes)
    row = {"predicted": predicted.mean(), "observed": observed.mean(), "status": fit.status.value, "detail": fit.detail}
    row["error"] = float(np.abs(predicted / observed - 1).mean())
    residuals = np.log(past["val_loss"].to_numpy(dtype=np.float64)) - np.log(
        fit.surface.predict(past["num_params"], past["num_tokens"])
    )
    number = min(int(config["num_resamples"]), SURFACE_RESAMPLES)
    stream = ("forecast", arch, form)
    counts = stratified_counts(budget_cells(past), number, config["seed"], *stream, min_distinct=fit.problem.lower.size)
    samples, survivors = bootstrap_surface(fit, counts, settings)
    good = samples[np.isfinite(samples).all(axis=1)]
    if survivors < number / 2:
        return row | {"detail": f"{fit.detail} {survivors} of {number} resamples converged: no interval."}
    ahead = np.array([LossSurface(*sample[:6]).predict(*sizes) for sample in good])  # [resamples, runs]
    noise = cell_generator(config["seed"], *stream, "noise").choice(residuals, size=ahead.shape)
    bounds = np.array([percentile_interval(column, config["confidence"]) for column in (ahead * np.exp(noise)).T])
    row["coverage"] = float(((bounds[:, 0] <= observed) & (observed <= bounds[:, 1])).mean())
    row["predicted_lo"], row["predicted_hi"] = percentile_interval(ahead.mean(axis=1), config["confidence"])
    return row
