"""IsoFLOP parabolas (approach 2 of Hoffmann et al. 2022, section 3.2).

Per architecture, context and FLOP budget the loss is a second-degree polynomial of x = log10 N, or of x = log10 D,
fitted by ordinary least squares; its vertex is the compute-optimal N* or D* and the loss L*.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .resampling import bootstrap_counts, cell_generator, percentile_interval
from .tables import make_table

Array = NDArray[np.float64]
VARIABLES = ("num_params", "num_tokens")
_FLAT = 1e-9  # curvature below this share of the loss is rounding, not a parabola


class IsoflopStatus(StrEnum):
    """How a parabola's fit ended."""

    OK = "ok"
    TOO_FEW_RUNS = "too_few_runs"
    NO_MINIMUM = "no_minimum"
    OUTSIDE_RANGE = "outside_range"


def weighted_parabolas(x: Array, y: Array, weights: Array) -> Array:
    """Return the least-squares coefficients (a, b, c) of y = a x² + b x + c for each row of weights.

    Args:
        x, y: data, shape (n,).
        weights: non-negative weights, shape (R, n).

    Returns:
        Shape (R, 3); NaN where fewer than three distinct x carry weight.
    """
    groups = (x[:, None] == np.unique(x)[None, :]).astype(np.float64)  # [n, distinct]
    solvable = ((weights @ groups) > 0).sum(axis=1) >= 3
    coefficients = np.full((len(weights), 3), np.nan)
    if not solvable.any():
        return coefficients
    powers = x[:, None] ** np.arange(5)  # [n, 5]
    moments = weights[solvable] @ powers
    right = (weights[solvable] * y) @ powers[:, :3]
    index = np.arange(3)
    normal = moments[:, index[:, None] + index[None, :]]  # [R, 3, 3]
    solution = np.linalg.solve(normal, right[..., None])[..., 0]
    coefficients[solvable] = solution[:, ::-1]
    return coefficients


def fit_isoflop(runs: pd.DataFrame, config: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit every cell's parabola in log10 N and in log10 D, and bootstrap the runs within the cell.

    N* and D* of one cell share their resamples. A resample without a minimum inside the sampled range is left out and
    counted; if fewer than half remain, the interval is NaN. With few runs a bootstrap of pairs covers too little
    (simulated at 95 %: 0.57 with 4 runs, 0.89 with 5, 0.93 with 20).

    Args:
        runs: usable runs (`tables.usable_runs`).
        config: the group `fitting`.

    Returns:
        The tables `isoflop` and `isoflop_resamples` of docs/tables.md.
    """
    rows, resamples = [], []
    members = runs[(runs["experiment_set"] == "isoflop") & runs["isoflop_tag"].notna()]
    for (arch, context, tag), cell in members.groupby(["arch", "context_length", "isoflop_tag"], sort=True):
        column = config["isoflop"].get("weight_column")
        weights = np.ones(len(cell)) if column is None else cell[column].to_numpy(dtype=np.float64)
        key = {"arch": arch, "context_length": context, "isoflop_tag": tag}
        key["flops_mean"] = float(np.average(cell["num_flops"], weights=weights))
        generator = cell_generator(config["seed"], "isoflop", arch, context, tag)
        counts = bootstrap_counts(len(cell), config["num_resamples"], generator) * weights
        for variable in VARIABLES:
            row, optima = _fit_cell(cell, variable, weights, counts, config)
            rows.append(key | {"variable": variable} | row)
            if optima is not None:
                frame = pd.DataFrame({"resample": np.arange(len(optima)), "x_opt": optima[:, 0]})
                frame["loss_opt"] = optima[:, 1]
                resamples.append(frame.assign(**key, variable=variable))
    stacked = pd.concat(resamples, ignore_index=True) if resamples else []
    return make_table("isoflop", rows, runs), make_table("isoflop_resamples", stacked, runs)


def _fit_cell(
    cell: pd.DataFrame, variable: str, weights: Array, counts: Array, config: Mapping[str, Any]
) -> tuple[dict[str, Any], Array | None]:
    """Return one row of `isoflop` and the (x_opt, loss_opt) of its resamples, or None without a valid fit."""
    x = np.log10(cell[variable].to_numpy(dtype=np.float64))
    y = cell["val_loss"].to_numpy(dtype=np.float64)
    row: dict[str, Any] = {"num_runs": len(cell), "x_min": 10 ** x.min(), "x_max": 10 ** x.max(), "resamples_ok": 0}
    distinct = len(np.unique(x))
    needed = max(int(config["isoflop"]["min_runs"]), 3)
    if len(cell) < needed or distinct < 3:
        detail = f"{len(cell)} runs with {distinct} distinct {variable}; needs {needed} runs and 3 distinct values."
        return row | {"status": IsoflopStatus.TOO_FEW_RUNS, "detail": detail}, None

    middle, half = 0.5 * (x.max() + x.min()), 0.5 * (x.max() - x.min())
    z = (x - middle) / half  # in [-1, 1], so the normal equations are well-conditioned
    a, b, c = weighted_parabolas(z, y, weights[None, :])[0]
    residual = y - (a * z * z + b * z + c)
    spread = weights @ (y - np.average(y, weights=weights)) ** 2
    row["r2"] = float(1.0 - weights @ residual**2 / spread) if spread > 0 else np.nan
    row |= {"a": a / half**2, "b": b / half - 2 * a * middle / half**2}
    row["c"] = c - b * middle / half + a * (middle / half) ** 2
    z_opt, loss_opt = _vertices(np.array([[a, b, c]]), inside=False)[0]
    if not np.isfinite(z_opt):
        detail = f"The parabola in log10 {variable} has no positive curvature (a = {row['a']:.3g})."
        return row | {"status": IsoflopStatus.NO_MINIMUM, "detail": detail}, None
    if abs(z_opt) > 1.0:
        side = "below" if z_opt < 0 else "above"
        where = f"10^{middle + half * z_opt:.4g}"
        detail = f"The minimum, {variable} = {where}, lies {side} the sampled range."
        return row | {"status": IsoflopStatus.OUTSIDE_RANGE, "detail": detail}, None

    optima = _vertices(weighted_parabolas(z, y, counts), inside=True)
    optima[:, 0] = 10 ** (middle + half * optima[:, 0])
    survivors = int(np.isfinite(optima[:, 0]).sum())
    confidence = config["confidence"]
    row |= {"x_opt": 10 ** (middle + half * z_opt), "loss_opt": loss_opt, "resamples_ok": survivors}
    row["x_opt_lo"], row["x_opt_hi"] = percentile_interval(optima[:, 0], confidence)
    row["loss_opt_lo"], row["loss_opt_hi"] = percentile_interval(optima[:, 1], confidence)
    detail = f"{survivors} of {len(optima)} resamples have a minimum inside the sampled range."
    if np.isnan(row["x_opt_lo"]):
        detail += " Fewer than half: no interval."
    return row | {"status": IsoflopStatus.OK, "detail": detail}, optima


def _vertices(coefficients: Array, *, inside: bool) -> Array:
    """Return (x_opt, y_opt) of parabolas (a, b, c) over [-1, 1], shape (R, 2); NaN without a minimum (inside)."""
    a, b, c = coefficients.T
    with np.errstate(invalid="ignore", divide="ignore"):
        x_opt = np.where(a > _FLAT * np.abs(c), -b / (2 * a), np.nan)
        if inside:
            x_opt[np.abs(x_opt) > 1.0] = np.nan
        return np.column_stack([x_opt, c - a * x_opt**2])
