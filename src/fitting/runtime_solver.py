"""The runtime model's formula and its robust fit in logarithms, batched over starts and resamples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from xlstm_scaling.accounting.caches import EDGE, memory_share

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
#: one cost each: of a FLOP, a byte or a score [s]; ``wait`` is a number of streams, ``cache`` one of bytes; the last
#: four are overheads [s]
TERMS = (
    *("linear_flops", "weight_bytes", "mixing_flops", "scores", "state_bytes", "wait", "cache", "activation_bytes"),
    *("constant", "block", "batched_block", "sequence"),
)
LINEAR = slice(0, 2)
MIXING = slice(2, 5)
WAIT, CACHE = TERMS.index("wait"), TERMS.index("cache")
WEIGHT, STATE = TERMS.index("weight_bytes"), TERMS.index("state_bytes")
REST = slice(7, len(TERMS))
#: terms that stretch or shorten others instead of adding to the time
FACTORS = (WAIT, CACHE)
#: costs run between these multiples of the cost that alone would explain the median time
BOUNDS = (np.log(1e-7), np.log(1e3))
#: starts: the wait in medians of the streams, the cache in medians of the bytes of a call, and the share of the time of
#: a term that least squares leaves out
START_WAITS = (0.1, 1.0, 10.0)
START_CACHES = (0.3, 3.0)
START_SHARE = 0.02
NUM_SCATTERED = 9
#: all starts go this many steps, the best of them to the end
FIRST_ITERATIONS = 12
NUM_FINALISTS = 3
#: weight of what is known of the cache: (error of ln t / error of ln bytes)², say 0.06 and 0.35
PRIOR = 0.03
MAX_ITERATIONS = 150
MAX_STEP = 2.0
MIN_STEP = 1e-9
NO_ERROR = 1e-12  # objective of a fit without residuals


@dataclass(frozen=True)
class Design:
    """n measurements: ``terms`` (n, K) are the counts of `TERMS`, each over its ``scale`` (K,), so that a cost of 1 in
    any one term explains the median time (``wait``: doubles the mixing at the median of the streams; ``cache``: holds
    the median of a call's bytes); ``log_time`` (n,) is ln t [s]; ``least`` and ``most`` (K,) are the least and the
    largest log costs that are allowed."""

    terms: Array
    scale: Array
    log_time: Array
    norm_p: float
    least: Array
    most: Array

    @classmethod
    def of(
        cls,
        counts: Array,
        time_s: Array,
        norm_p: float,
        peaks: Array | None = None,
        cache_bytes: tuple[float, float] | None = None,
    ) -> Design:
        """counts (n, K) in the order of `TERMS`; a term that is 0 throughout cannot be fitted; peaks (K,): of rates;
        cache_bytes: what the cache holds at least and at most."""
        over = np.where(np.isin(np.arange(len(TERMS)), FACTORS), 1.0, time_s[:, None])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(counts > 0, np.log(counts) - np.log(over), np.nan)
        present = (counts > 0).any(axis=0)
        scale = np.ones(len(TERMS))
        scale[present] = np.exp(np.nanmedian(ratio[:, present], axis=0))
        least = np.full(len(TERMS), BOUNDS[0])
        if peaks is not None:
            known = np.isfinite(peaks)
            least[known] = np.maximum(BOUNDS[0], np.log(scale[known] / peaks[known]))
        most = np.full(len(TERMS), BOUNDS[1])
        if cache_bytes is not None:
            least[CACHE], most[CACHE] = np.log(np.array(cache_bytes) * scale[CACHE])
        return cls(counts / scale, scale, np.log(time_s), norm_p, least, most)

    def subset(self, keep: Mask) -> Design:
        """The measurements of a mask (n,), in the same scale."""
        return replace(self, terms=self.terms[keep], log_time=self.log_time[keep])

    def expected(self, theta: Array) -> tuple[Array, Array]:
        """What a cache (S,) away from the middle of what is known of it costs, and the derivative: a normal prior of
        log bytes, for measurements of which none lies near the edge."""
        away = theta[:, CACHE] - (self.least[CACHE] + self.most[CACHE]) / 2
        away = np.where(np.isfinite(away) & self.has_cache, away, 0.0)
        return 0.5 * PRIOR * away**2, PRIOR * away

    @property
    def has_cache(self) -> bool:
        """Whether it is known what the cache holds."""
        return bool(self.most[CACHE] < BOUNDS[1])

    def at_peak(self, theta: Array) -> Mask:
        """Which rates (K,) are at the peak of the device."""
        rate = ~np.isin(np.arange(len(TERMS)), FACTORS)
        return rate & (self.least > BOUNDS[0]) & np.isfinite(theta) & (theta < self.least + 1e-6)

    def costs(self, theta: Array) -> Array:
        """theta (..., K) -> cost of a unit of each term [s], of ``wait`` a number of streams, of ``cache`` bytes."""
        return np.exp(theta) / self.scale

    def predict_costs(self, costs: Array) -> Array:
        """costs (K,) -> times (n,) [s]."""
        return predict(self.terms * self.scale, costs, self.norm_p)


@dataclass(frozen=True)
class Solution:
    """Log costs: theta (K,), or (R, K) for R resamples, −inf for terms that are not in the fit; ``finalists`` (k, K)
    are the best distinct solutions."""

    theta: Array
    objective: Array
    finalists: Array


def predict(counts: Array, costs: Array, norm_p: float) -> Array:
    """counts (n, K), costs (K,) -> times (n,) [s]; a cost of 0 leaves its term out."""
    with np.errstate(divide="ignore"):
        return np.exp(_forward(counts, norm_p, np.log(costs)[None])[0][0])


def _forward(terms: Array, norm_p: float, theta: Array) -> tuple[Array, Array]:
    """theta (S, K) -> ln t̂ (S, n) and ∂ ln t̂ / ∂ theta (S, n, K)."""
    part = np.exp(theta)[:, None, :] * terms
    missed = memory_share(part[..., CACHE])
    part[..., WEIGHT] *= missed
    part[..., STATE] *= missed
    larger = np.maximum(part[..., LINEAR].max(-1), np.finfo(float).tiny)
    power = (part[..., LINEAR] / larger[..., None]) ** norm_p
    total_power = power.sum(-1)
    roof = larger * total_power ** (1 / norm_p)
    share = power / np.maximum(total_power, np.finfo(float).tiny)[..., None]
    delay = part[..., WAIT] ** norm_p
    wait = (1 + delay) ** (1 / norm_p)
    part[..., LINEAR] = roof[..., None] * share
    part[..., MIXING] *= wait[..., None]
    mixing = part[..., MIXING].sum(-1)
    total = np.maximum(roof + mixing + part[..., REST].sum(-1), np.finfo(float).tiny)
    part[..., WAIT] = mixing * delay / (1 + delay)
    part[..., CACHE] = -EDGE * (1 - missed) * (part[..., WEIGHT] + part[..., STATE])
    return np.log(total), part / total[..., None]


def elasticities(design: Design, theta: Array) -> Array:
    """∂ ln t̂ / ∂ ln cost of each measurement and term, (n, K): the share of the time that a term accounts for."""
    return _forward(design.terms, design.norm_p, theta[None])[1][0]


def _huber(residual: Array, delta: float) -> Array:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def _descend(
    design: Design, theta: Array, counts: Array, active: Mask, delta: float, iterations: int = MAX_ITERATIONS
) -> tuple[Array, Array]:
    """Levenberg-Marquardt on reweighted squares: theta (S, K), counts (S, n) -> theta, objective (S,)."""
    theta, K, lower, upper = theta.copy(), int(active.sum()), design.least[active], design.most[active]
    prediction, jacobian = _forward(design.terms, design.norm_p, theta)
    residual, jacobian = prediction - design.log_time, jacobian[..., active]
    objective = (counts * _huber(residual, delta)).sum(-1) + design.expected(theta)[0]
    cache = int(active[:CACHE].sum())  # its place among the active terms, if it is one
    damping = np.full(len(theta), 1e-2)
    moving = np.ones(len(theta), dtype=bool)
    for _ in range(iterations):
        s = np.flatnonzero(moving)
        if not len(s):
            break
        weight = counts[s] * np.minimum(1.0, delta / np.maximum(np.abs(residual[s]), 1e-300))
        weighted = (jacobian[s] * weight[..., None]).swapaxes(1, 2)
        hessian = weighted @ jacobian[s]
        gradient = (weighted @ residual[s][..., None])[..., 0]
        if active[CACHE] and design.has_cache:
            gradient[:, cache] += design.expected(theta[s])[1]
            hessian[:, cache, cache] += PRIOR
        here = theta[s][:, active]
        pinned = (here <= lower) & (gradient > 0) | (here >= upper) & (gradient < 0)  # at a bound, and bound there
        gradient = np.where(pinned, 0.0, gradient)
        hessian = np.where(pinned[:, :, None] | pinned[:, None, :], 0.0, hessian)
        diagonal = np.einsum("sii->si", hessian)
        ridge = damping[s, None] * (diagonal + 1e-6 * diagonal.max(-1, keepdims=True) + 1e-12) + 1e-14
        step = -np.linalg.solve(hessian + ridge[:, :, None] * np.eye(K), gradient[..., None])[..., 0]
        trial = theta[s]
        trial[:, active] = np.clip(trial[:, active] + np.clip(step, -MAX_STEP, MAX_STEP), lower, upper)
        trial_prediction, trial_jacobian = _forward(design.terms, design.norm_p, trial)
        trial_residual = trial_prediction - design.log_time
        trial_objective = (counts[s] * _huber(trial_residual, delta)).sum(-1) + design.expected(trial)[0]
        better = trial_objective <= objective[s]
        moved = np.abs(trial[:, active] - here).max(-1)
        gain = objective[s] - trial_objective
        t = s[better]
        theta[t], residual[t], jacobian[t] = trial[better], trial_residual[better], trial_jacobian[better][..., active]
        objective[t] = trial_objective[better]
        damping[s] = np.clip(damping[s] * np.where(better, 0.3, 5.0), 1e-10, 1e10)
        finished = better & ((moved < MIN_STEP) | (gain <= 1e-10 * np.maximum(objective[s], NO_ERROR)) & (moved < 1e-2))
        moving[s[finished | (damping[s] >= 1e10)]] = False
    return theta, objective


def _starts(design: Design, active: Mask) -> Array:
    """Log costs (S, K) to start from: least relative squares of the sum of all terms, at several waits and caches; and
    around."""
    waits = np.log(START_WAITS) if active[WAIT] else [-np.inf]
    caches = np.clip(np.log(START_CACHES), design.least[CACHE], design.most[CACHE]) if active[CACHE] else [-np.inf]
    summed = np.flatnonzero(active & ~np.isin(np.arange(len(TERMS)), FACTORS))
    found = []
    for wait, cache in itertools.product(waits, caches):
        columns = design.terms.copy()
        columns[:, MIXING] *= 1 + np.exp(wait) * columns[:, [WAIT]]
        columns[:, [WEIGHT, STATE]] *= memory_share(np.exp(cache) * columns[:, [CACHE]])
        relative = columns[:, summed] * np.exp(-design.log_time)[:, None]
        cost, _ = nnls(relative / np.abs(relative).max(axis=0), np.ones(len(relative)))
        cost /= np.abs(relative).max(axis=0)
        theta = np.full(len(TERMS), -np.inf)
        least = START_SHARE / np.maximum(relative.max(axis=0), 1e-300)
        theta[summed] = np.log(np.maximum(cost, least))
        theta[WAIT], theta[CACHE] = wait, cache
        found.append(theta)
    generator = np.random.default_rng(0)
    scattered = [found[k % len(found)] + generator.normal(0, 1, len(TERMS)) for k in range(NUM_SCATTERED)]
    return np.clip(np.array(found + scattered), np.where(active, design.least, -np.inf), design.most)


def solve(
    design: Design, active: Mask, huber_delta: float, counts: Array | None = None, starts: Array | None = None
) -> Solution:
    """Minimise Σ counts · Huber(ln t̂ − ln t) over the log costs of the active terms.

    Args:
        design: n measurements.
        active: (K,), which terms are in the fit.
        huber_delta: threshold of the Huber loss, in ln time.
        counts: (R, n), how often each resample holds each measurement; None fits the measurements once.
        starts: (k, K) log costs to start from; None finds some.
    """
    weights = np.ones((1, len(design.log_time))) if counts is None else counts
    if starts is None:
        starts = _starts(design, active)
        ones = np.ones((len(starts), len(design.log_time)))
        found, objective = _descend(design, starts, ones, active, huber_delta, FIRST_ITERATIONS)
        starts = _distinct(found[np.argsort(objective, kind="stable")], active)
    starts = np.where(active, starts, -np.inf)
    R, S = len(weights), len(starts)
    theta, objective = _descend(design, np.tile(starts, (R, 1)), np.repeat(weights, S, axis=0), active, huber_delta)
    theta, objective = theta.reshape(R, S, -1), objective.reshape(R, S)
    order = np.argsort(objective, axis=1, kind="stable")
    best = np.take_along_axis(theta, order[:, :1, None], axis=1)[:, 0]
    finalists = _distinct(theta[0, order[0]], active)
    if counts is None:
        return Solution(best[0], objective.min(axis=1)[0], finalists)
    return Solution(best, objective.min(axis=1), finalists)


def _distinct(theta: Array, active: Mask) -> Array:
    """The first of log costs (S, K) that differ from those before them, `NUM_FINALISTS` at most."""
    kept = [0]
    for i in range(1, len(theta)):
        near = (np.allclose(theta[i][active], theta[j][active], atol=0.3) for j in kept)
        if len(kept) < NUM_FINALISTS and not any(near):
            kept.append(i)
    return theta[kept]
