"""Robust fit of the runtime model in logarithms, batched over starts and resamples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TERMS = ("flops", "bytes", "constant", "block", "sequence")
#: costs run between these multiples of the cost that alone would explain the median time
BOUNDS = (np.log(1e-7), np.log(1e3))
START_SHARES = (0.8, 0.1, 0.01)
NUM_STARTS = 32
NUM_FINALISTS = 6
MAX_ITERATIONS = 150
MAX_STEP = 2.0
MIN_STEP = 1e-9


@dataclass(frozen=True)
class Design:
    """n measurements: ``terms`` (n, 5) are FLOPs, bytes, 1, blocks, sequences, each over its ``scale`` (5,), so that a
    cost of 1 in any one term explains the median time; ``log_time`` (n,) is ln t [s]."""

    terms: Array
    scale: Array
    log_time: Array
    norm_p: float

    @classmethod
    def of(
        cls, flops: Array, num_bytes: Array, num_blocks: Array, batch_size: Array, time_s: Array, norm_p: float
    ) -> Design:
        raw = np.stack([flops, num_bytes, np.ones_like(flops), num_blocks, batch_size], axis=1)
        scale = np.exp(np.median(np.log(raw) - np.log(time_s)[:, None], axis=0))
        return cls(raw / scale, scale, np.log(time_s), norm_p)

    def subset(self, keep: NDArray[np.bool_]) -> Design:
        """The measurements of a mask (n,), in the same scale."""
        return replace(self, terms=self.terms[keep], log_time=self.log_time[keep])

    @property
    def floor(self) -> Array:
        """Smallest cost that a fit can reach, (5,)."""
        return np.exp(BOUNDS[0]) / self.scale

    def costs(self, theta: Array) -> Array:
        """theta (..., 5) -> cost of a unit of each term [s / FLOP, s / byte, s, s / block, s / sequence]."""
        return np.exp(theta) / self.scale

    def predict_costs(self, costs: Array) -> Array:
        """costs (5,) -> times (n,) [s]."""
        with np.errstate(divide="ignore"):
            return np.exp(_forward(self, np.log(costs * self.scale)[None])[0][0])


@dataclass(frozen=True)
class Solution:
    """Log costs: theta (5,), or (R, 5) for R resamples, −inf for terms that are not in the fit; ``finalists`` (k, 5)
    are the best distinct solutions."""

    theta: Array
    objective: Array
    finalists: Array


def _forward(design: Design, theta: Array) -> tuple[Array, Array]:
    """theta (S, 5) -> ln t̂ (S, n) and ∂ ln t̂ / ∂ theta (S, n, 5)."""
    p, term = design.norm_p, np.exp(theta)[:, None, :] * design.terms
    with np.errstate(divide="ignore", invalid="ignore"):
        log_term = p * (theta[:, None, :2] + np.log(design.terms[:, :2]))
        log_sum = np.logaddexp(log_term[..., 0], log_term[..., 1])
        share = np.nan_to_num(np.exp(log_term - log_sum[..., None]))
    roof = np.exp(log_sum / p)
    parts = np.concatenate([roof[..., None] * share, term[..., 2:]], axis=-1)
    total = roof + term[..., 2:].sum(-1)
    return np.log(total), parts / total[..., None]


def elasticities(design: Design, theta: Array) -> Array:
    """∂ ln t̂ / ∂ ln cost of each measurement and term, (n, 5): the share of the time that a term accounts for."""
    return _forward(design, theta[None])[1][0]


def _huber(residual: Array, delta: float) -> Array:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def _descend(
    design: Design, theta: Array, counts: Array, active: NDArray[np.bool_], delta: float
) -> tuple[Array, Array]:
    """Levenberg-Marquardt on reweighted squares: theta (S, 5), counts (S, n) -> theta, objective (S,)."""
    theta = theta.copy()
    prediction, jacobian = _forward(design, theta)
    residual = prediction - design.log_time
    objective = (counts * _huber(residual, delta)).sum(-1)
    damping = np.full(len(theta), 1e-2)
    moving = np.ones(len(theta), dtype=bool)
    for _ in range(MAX_ITERATIONS):
        s = np.flatnonzero(moving)
        if not len(s):
            break
        weight = counts[s] * np.minimum(1.0, delta / np.maximum(np.abs(residual[s]), 1e-300))
        weighted = jacobian[s] * weight[..., None]
        hessian = np.einsum("sni,snj->sij", weighted, jacobian[s])
        gradient = np.einsum("sni,sn->si", weighted, residual[s])
        diagonal = np.einsum("sii->si", hessian)
        ridge = damping[s, None] * (diagonal + 1e-6 * diagonal.max(-1, keepdims=True) + 1e-12) + 1e-14
        step = -np.linalg.solve(hessian + ridge[:, :, None] * np.eye(len(TERMS)), gradient[..., None])[..., 0]
        trial = theta[s] + np.clip(step, -MAX_STEP, MAX_STEP)
        trial[:, active] = np.clip(trial[:, active], *BOUNDS)
        trial_prediction, trial_jacobian = _forward(design, trial)
        trial_residual = trial_prediction - design.log_time
        trial_objective = (counts[s] * _huber(trial_residual, delta)).sum(-1)
        better = trial_objective <= objective[s]
        moved = np.abs(trial[:, active] - theta[s][:, active]).max(-1)
        gain = objective[s] - trial_objective
        t = s[better]
        theta[t], residual[t], jacobian[t] = trial[better], trial_residual[better], trial_jacobian[better]
        objective[t] = trial_objective[better]
        damping[s] = np.clip(damping[s] * np.where(better, 0.3, 5.0), 1e-10, 1e10)
        finished = better & ((moved < MIN_STEP) | (gain <= 1e-12 * np.maximum(objective[s], 1e-300)) & (moved < 1e-3))
        moving[s[finished | (damping[s] >= 1e10)]] = False
    return theta, objective


def _grid(design: Design, active: NDArray[np.bool_], delta: float) -> Array:
    """The best starts (S, 5) of those that give every term a large, a small or a tiny share of the time."""
    choices = [np.log(START_SHARES) if on else np.array([-np.inf]) for on in active]
    grid = np.array(list(itertools.product(*choices)))
    objective = _huber(_forward(design, grid)[0] - design.log_time, delta).sum(-1)
    return grid[np.argsort(objective, kind="stable")[:NUM_STARTS]]


def solve(
    design: Design,
    active: NDArray[np.bool_],
    huber_delta: float,
    counts: Array | None = None,
    starts: Array | None = None,
) -> Solution:
    """Minimise Σ counts · Huber(ln t̂ − ln t) over the log costs of the active terms.

    Args:
        design: n measurements.
        active: (5,), which terms are in the fit.
        huber_delta: threshold of the Huber loss, in ln time.
        counts: (R, n), how often each resample holds each measurement; None fits the measurements once.
        starts: (k, 5) log costs to start from; None takes the best of a grid.
    """
    starts = _grid(design, active, huber_delta) if starts is None else starts
    weights = np.ones((1, len(design.log_time))) if counts is None else counts
    R, S = len(weights), len(starts)
    theta, objective = _descend(design, np.tile(starts, (R, 1)), np.repeat(weights, S, axis=0), active, huber_delta)
    theta, objective = theta.reshape(R, S, -1), objective.reshape(R, S)
    order = np.argsort(objective, axis=1, kind="stable")
    best = np.take_along_axis(theta, order[:, :1, None], axis=1)[:, 0]
    finalists = theta[0, order[0]]
    distinct = [0]
    for i in range(1, S):
        near = [np.allclose(finalists[i][active], finalists[j][active], atol=0.3) for j in distinct]
        if len(distinct) < NUM_FINALISTS and not any(near):
            distinct.append(i)
    if counts is None:
        return Solution(best[0], objective.min(axis=1)[0], finalists[distinct])
    return Solution(best, objective.min(axis=1), finalists[distinct])
