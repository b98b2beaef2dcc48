"""Pareto frontier of loss against training FLOPs, and the FLOPs that two architectures need for equal loss.

The ratio is read off the lower convex hull of the frontier in (ln H, ln L). The frontier itself is a staircase that
steps down within one IsoFLOP budget, where a ratio would compare a good run with a poor one of equal FLOPs.
"""

from collections.abc import Mapping
from enum import StrEnum
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.accounting import ordered

from .resampling import percentile_interval, stratified_counts
from .tables import make_table

Array = NDArray[np.float64]


class ParetoStatus(StrEnum):
    """Whether a FLOP ratio has an interval."""

    OK = "ok"
    NO_INTERVAL = "no_interval"


def frontier_mask(flops: Array, loss: Array, tolerance: float = 0.0) -> NDArray[np.bool_]:
    """Return which runs no other run beats: none has a lower or equal loss at fewer or equal FLOPs.

    Args:
        flops, loss: shape (n,); an infinite loss marks an absent run. Of equal runs the first counts.
        tolerance: FLOPs that differ by less than this share count as equal; runs of one budget differ by up to a step.
    """
    order = np.lexsort((loss, flops))
    sorted_loss, sorted_flops = loss[order], flops[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_loss)[:-1]])
    last = np.searchsorted(sorted_flops, sorted_flops * (1 + tolerance), side="right") - 1
    beaten = np.minimum.accumulate(sorted_loss)[last] < sorted_loss
    mask = np.zeros(len(flops), dtype=bool)
    mask[order] = (sorted_loss < before) & ~beaten
    return mask


def convex_frontier(flops: Array, loss: Array) -> tuple[Array, Array]:
    """Return (ln H, ln L) of the lower convex hull of the frontier, by rising H (Andrew 1979, monotone chain)."""
    mask = frontier_mask(flops, loss)
    order = np.argsort(flops[mask])
    hull: list[tuple[float, float]] = []
    for x, y in zip(np.log(flops[mask][order]).tolist(), np.log(loss[mask][order]).tolist()):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    points = np.array(hull).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def flops_at_loss(flops: Array, loss: Array, targets: Array) -> Array:
    """Return the FLOPs at which the convex frontier of the runs reaches each loss of `targets`, shape (t,).

    Between the hull's runs ln H is linear in ln L; NaN outside its range of losses.
    """
    x, y = convex_frontier(flops, loss)
    if x.size == 0:
        return np.full(len(targets), np.nan)
    log_targets, slack = np.log(targets), 1e-12
    inside = (log_targets >= y[-1] - slack) & (log_targets <= y[0] + slack)
    return np.where(inside, np.exp(np.interp(log_targets, y[::-1], x[::-1])), np.nan)


def fit_pareto(runs: pd.DataFrame, config: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find the frontiers and, for every pair of architectures, over the losses that both frontiers span, the ratio of
    the second's FLOPs to the first's.

    Runs are resampled within budgets and ratios; a resample whose frontier does not reach a loss is left out there, and
    the interval is NaN if fewer than half remain (`no_interval`). A resample can only lose frontier runs, so at the
    ends of the range, where one run decides, the interval says little.

    Args:
        runs: usable runs (`tables.usable_runs`).
        config: the group `fitting`.

    Returns:
        The tables `pareto` and `pareto_ratio` of docs/tables.md.
    """
    columns = ["arch", "context_length", "run_id", "num_flops", "num_params", "num_tokens", "val_loss"]
    frontiers, tolerance = [], float(config["pareto"]["flops_tolerance"])
    for _, cell in runs.groupby(["arch", "context_length"], sort=True):
        flops, loss = (cell[name].to_numpy(dtype=float) for name in ("num_flops", "val_loss"))
        frontiers.append(cell.loc[frontier_mask(flops, loss, tolerance), columns].sort_values("num_flops"))
    rows: list[dict[str, Any]] = []
    for context, cell in runs.groupby("context_length", sort=True):
        for pair in combinations(ordered(cell["arch"]), 2):
            rows += _ratios(int(context), {arch: cell[cell["arch"] == arch] for arch in pair}, config)
    stacked = pd.concat(frontiers, ignore_index=True) if frontiers else []
    return make_table("pareto", stacked, runs), make_table("pareto_ratio", rows, runs)


def _ratios(context: int, pair: Mapping[str, pd.DataFrame], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    data = {
        arch: tuple(group[name].to_numpy(dtype=float) for name in ("num_flops", "val_loss"))
        for arch, group in pair.items()
    }
    edges = [loss[frontier_mask(flops, loss)] for flops, loss in data.values()]
    low, high = max(edge.min() for edge in edges), min(edge.max() for edge in edges)
    if not low < high:
        return []
    targets = np.geomspace(low, high, int(config["pareto"]["ratio_points"]))
    first, second = pair
    flops = {arch: flops_at_loss(*data[arch], targets) for arch in pair}
    samples = {arch: resampled_flops_at_loss(pair[arch], targets, config, context, arch) for arch in pair}
    ratios = samples[second] / samples[first]  # [R, t]
    rows = []
    for j, target in enumerate(targets):
        row = {"arch": first, "other": second, "context_length": context, "val_loss": target}
        row |= {"flops": flops[first][j], "flops_other": flops[second][j]}
        row["flop_ratio"] = row["flops_other"] / row["flops"]
        row["flop_ratio_lo"], row["flop_ratio_hi"] = percentile_interval(ratios[:, j], config["confidence"])
        known = np.isfinite(row["flop_ratio_lo"])
        rows.append(row | {"status": ParetoStatus.OK if known else ParetoStatus.NO_INTERVAL})
    return rows


def resampled_flops_at_loss(
    runs: pd.DataFrame, targets: Array, config: Mapping[str, Any], context: int, arch: str
) -> Array:
    """Return the FLOPs at which the convex frontier of every resample reaches each loss of `targets`, shape (R, t).

    Args:
        runs: usable runs of one architecture and context, drawn within budgets and token/param ratios.
        targets: losses [nat/token], shape (t,).
        config: the group `fitting`: num_resamples and seed.
        context, arch: of the runs; they name the random stream.
    """
    flops, loss = (runs[name].to_numpy(dtype=float) for name in ("num_flops", "val_loss"))
    tags = [runs[name].astype(object).fillna("").astype(str) for name in ("isoflop_tag", "ratio_tag")]
    cells = runs["experiment_set"].astype(str) + " " + tags[0] + " " + tags[1]
    counts = stratified_counts(list(cells), int(config["num_resamples"]), config["seed"], "pareto", arch, context)
    samples = np.empty((len(counts), len(targets)))
    for r, drawn in enumerate(counts > 0):
        samples[r] = flops_at_loss(flops[drawn], loss[drawn], targets)
    return samples
