"""Over-training: loss against training FLOPs at a fixed token/param ratio.

ln L = slope · ln H + intercept per ratio, by ordinary least squares; the claim is that the slopes are alike (Gadre et
al. 2024, "Language models scale reliably with over-training"; "xLSTM Scaling Laws", over-training section).
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


class OvertrainingStatus(StrEnum):
    """How a slope's fit ended."""

    OK = "ok"
    TOO_FEW_RUNS = "too_few_runs"


def weighted_slopes(x: Array, y: Array, weights: Array) -> Array:
    """Return the least-squares slope for each row of weights.

    Args:
        x, y: data, shape (n,).
        weights: shape (R, n).

    Returns:
        Shape (R,); NaN where fewer than two distinct x carry weight.
    """
    groups = (x[:, None] == np.unique(x)[None, :]).astype(np.float64)
    solvable = ((weights @ groups) > 0).sum(axis=1) >= 2
    total = weights.sum(axis=1)
    x_mean, y_mean = (weights @ x) / total, (weights @ y) / total
    dx, dy = x - x_mean[:, None], y - y_mean[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (weights * dx * dy).sum(axis=1) / (weights * dx * dx).sum(axis=1)
    return np.where(solvable, slope, np.nan)


def fit_overtraining(runs: pd.DataFrame, config: Mapping[str, Any]) -> pd.DataFrame:
    """Fit the slope of every architecture, context and token/param ratio, with runs resampled within the ratio.

    Args:
        runs: usable runs (`tables.usable_runs`).
        config: the group `fitting`.

    Returns:
        The table `overtraining` of docs/tables.md.
    """
    rows = []
    members = runs[(runs["experiment_set"] == "tokenparam") & runs["ratio_tag"].notna()]
    for (arch, context, tag), cell in members.groupby(["arch", "context_length", "ratio_tag"], sort=True):
        row = {"arch": arch, "context_length": context, "ratio_tag": tag, "num_runs": len(cell)}
        x, y = np.log(cell["num_flops"].to_numpy(dtype=float)), np.log(cell["val_loss"].to_numpy(dtype=float))
        needed, distinct = max(2, int(config["overtraining"]["min_runs"])), len(np.unique(x))
        if len(cell) < needed or distinct < 2:
            detail = f"{len(cell)} runs with {distinct} distinct FLOPs; needs {needed} runs and 2 distinct FLOPs."
            rows.append(row | {"status": OvertrainingStatus.TOO_FEW_RUNS, "detail": detail})
            continue
        slope = weighted_slopes(x, y, np.ones((1, len(x))))[0]
        generator = cell_generator(config["seed"], "overtraining", arch, context, tag)
        samples = weighted_slopes(x, y, bootstrap_counts(len(x), config["num_resamples"], generator))
        row |= {"slope": slope, "intercept": y.mean() - slope * x.mean(), "status": OvertrainingStatus.OK}
        row["slope_lo"], row["slope_hi"] = percentile_interval(samples, config["confidence"])
        row["detail"] = f"{np.isfinite(samples).sum()} of {len(samples)} resamples have two distinct FLOPs."
        rows.append(row)
    return make_table("overtraining", rows, runs)
