"""The envelope of training curves (approach 1 of Hoffmann et al. 2022, section 3.1).

At each of many FLOP values the run with the least loss so far gives N(H) and D(H); power laws through these points
give the exponents. Curves whose learning rate has not yet decayed lie above what a run of that length would reach, so
this is a check on the IsoFLOP minima, not a replacement. A FLOP value counts only where the best run lies strictly
between the smallest and the largest model that reach it: elsewhere the optimum is outside of what was trained.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .power_law import fit_lines
from .resampling import bootstrap_counts, cell_generator, percentile_interval
from .tables import FitError, make_table

Array = NDArray[np.float64]
VARIABLES = ("num_params", "num_tokens", "loss")
_COLUMNS = ("arch", "context_length", "run_id", "num_params", "tokens", "flops", "loss")


class EnvelopeStatus(StrEnum):
    """How an envelope's fit ended."""

    OK = "ok"
    TOO_FEW_RUNS = "too_few_runs"


def interpolate_curves(curves: pd.DataFrame, grid: Array) -> tuple[Array, Array, Array]:
    """Return loss and tokens of every run at every FLOP value, and N of every run.

    Args:
        curves: points of one architecture and context: run_id, num_params, tokens, flops, loss.
        grid: FLOP values, shape (g,).

    Returns:
        Loss (m, g) and tokens (m, g), NaN where a run has no curve there, and num_params (m,), runs sorted by id.
        Loss is linear in ln H between points; tokens are proportional to H within a run.
    """
    losses, tokens, params = [], [], []
    for _, curve in curves.groupby("run_id", sort=True):
        curve = curve.sort_values("flops")
        x = np.log(curve["flops"].to_numpy(dtype=float))
        inside = (np.log(grid) >= x[0] - 1e-12) & (np.log(grid) <= x[-1] + 1e-12)
        loss = np.interp(np.log(grid), x, curve["loss"].to_numpy(dtype=float))
        seen = np.exp(np.interp(np.log(grid), x, np.log(curve["tokens"].to_numpy(dtype=float))))
        losses.append(np.where(inside, loss, np.nan))
        tokens.append(np.where(inside, seen, np.nan))
        params.append(float(curve["num_params"].iloc[0]))
    return np.array(losses), np.array(tokens), np.array(params)


def fit_envelope(curves: pd.DataFrame | None, config: Mapping[str, Any], labels: pd.DataFrame) -> pd.DataFrame:
    """Fit the envelope's power laws per architecture and context, with whole curves resampled.

    Args:
        curves: tidy points with the columns arch, context_length, run_id, num_params [1], tokens [1], flops [FLOPs],
            loss [nat/token]; rows that are not finite and positive are ignored. None gives an empty table.
        config: the group `fitting`.
        labels: the table of runs.

    Returns:
        The table `envelope` of docs/tables.md; variable `loss` is the envelope itself.

    Raises:
        FitError: a column of `curves` is absent.
    """
    if curves is None or curves.empty:
        return make_table("envelope", [], labels)
    missing = [column for column in _COLUMNS if column not in curves.columns]
    if missing:
        raise FitError(f"the training curves lack the columns {missing}")
    numbers = curves[list(_COLUMNS[3:])].to_numpy(dtype=np.float64, na_value=np.nan)
    clean = curves[(np.isfinite(numbers) & (numbers > 0)).all(axis=1)]
    rows: list[dict[str, Any]] = []
    for (arch, context), group in clean.groupby(["arch", "context_length"], sort=True):
        generator = cell_generator(config["seed"], "envelope", arch, context)
        for row in _fit_group(group, config, generator):
            rows.append({"arch": arch, "context_length": context} | row)
    return make_table("envelope", rows, labels)


def _fit_group(group: pd.DataFrame, config: Mapping[str, Any], generator: np.random.Generator) -> list[dict[str, Any]]:
    settings = config["envelope"]
    needed = max(2, int(settings["min_points"]))
    grid = np.geomspace(group["flops"].min(), group["flops"].max(), int(settings["num_bins"]))
    loss, tokens, params = interpolate_curves(group, grid)
    shared = np.isfinite(loss).sum(axis=0) >= int(settings["min_runs_per_bin"])
    loss, tokens, x = loss[:, shared], tokens[:, shared], np.log10(grid[shared])
    loss = np.where(np.isfinite(loss), loss, np.inf)
    best, bracketed = _winners(loss, params)
    winners, num_points = np.unique(best[bracketed]).size, int(bracketed.sum())
    if winners < needed:
        detail = f"{winners} of {len(params)} curves lie on the bracketed envelope; needs {needed}."
        return [
            {"variable": variable, "num_points": num_points, "status": EnvelopeStatus.TOO_FEW_RUNS, "detail": detail}
            for variable in VARIABLES
        ]
    counts = bootstrap_counts(len(params), int(config["num_resamples"]), generator)
    lines = _envelope_lines(x, loss, tokens, params, np.ones(len(params)), needed)
    samples = np.array([_envelope_lines(x, loss, tokens, params, drawn, needed) for drawn in counts])  # [R, 3, 2]
    rows = []
    for j, variable in enumerate(VARIABLES):
        lo, hi = percentile_interval(samples[:, j, 1], config["confidence"])
        row = {"variable": variable, "log10_coefficient": lines[j, 0], "exponent": lines[j, 1]}
        row |= {"exponent_lo": lo, "exponent_hi": hi, "num_points": num_points, "status": EnvelopeStatus.OK}
        row["detail"] = f"{winners} of {len(params)} curves lie on the bracketed envelope."
        if np.isnan(lo):
            row["detail"] += " Too few resamples keep enough curves on it: no interval."
        rows.append(row)
    return rows


def _winners(loss: Array, params: Array) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the best run at each FLOP value and whether smaller and larger models reach it too, both shape (g,)."""
    if loss.shape[1] == 0:
        return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=bool)
    best, reached = loss.argmin(axis=0), np.isfinite(loss)
    smallest = np.where(reached, params[:, None], np.inf).min(axis=0)
    largest = np.where(reached, params[:, None], -np.inf).max(axis=0)
    return best, (smallest < params[best]) & (params[best] < largest)


def _envelope_lines(x: Array, loss: Array, tokens: Array, params: Array, drawn: Array, needed: int) -> Array:
    """Return (log10 coefficient, exponent) of N, D and L against H, shape (3, 2); NaN with too few winning curves."""
    present = np.where(drawn[:, None] > 0, loss, np.inf)
    best, covered = _winners(present, params)
    column = np.arange(x.size)
    if np.unique(best[covered]).size < needed:
        return np.full((3, 2), np.nan)
    best, column, x = best[covered], column[covered], x[covered]
    y = np.log10([params[best], tokens[best, column], loss[best, column]])  # [3, points]
    return fit_lines(x, y)
