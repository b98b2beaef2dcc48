"""Bootstrap of training runs within cells, and percentile intervals.

A cell is a group of runs that the design holds together: a FLOP budget, or a token/param ratio. Every cell draws from
its own random stream, seeded by the cell's name, so the numbers depend neither on the order of rows nor on which other
cells exist.
"""

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
MIN_SURVIVING_SHARE = 0.5


def cell_generator(seed: int, *cell: Hashable) -> np.random.Generator:
    """Return the random generator of one cell.

    Args:
        seed: seed of the study.
        cell: what names the cell, e.g. ("xlstm", 2048, "6e+18"); compared by its string.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in cell).encode()).digest()
    words = np.frombuffer(digest, dtype=np.uint32).tolist()
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))


def bootstrap_counts(num_runs: int, num_resamples: int, generator: np.random.Generator) -> Array:
    """Return how often each run is drawn, shape (num_resamples, num_runs); every row sums to `num_runs`.

    Source: Efron & Tibshirani 1993, the bootstrap of pairs.
    """
    share = np.full(num_runs, 1.0 / num_runs)
    return generator.multinomial(num_runs, share, size=num_resamples).astype(np.float64)


def stratified_counts(
    cells: Sequence[Hashable], num_resamples: int, seed: int, *stream: Hashable, min_distinct: int = 1
) -> Array:
    """Return bootstrap counts that keep the number of runs of each cell.

    Args:
        cells: the cell of each run, length n.
        num_resamples: number of resamples R.
        seed: seed of the study.
        stream: name of the analysis; part of each cell's stream.
        min_distinct: fewest distinct runs a resample may hold (e.g. the number of parameters of the fit).

    Returns:
        Counts of shape (R, n); rows with fewer than `min_distinct` distinct runs are NaN.
    """
    labels = np.asarray([str(cell) for cell in cells], dtype=object)
    counts = np.zeros((num_resamples, len(labels)))
    for label in sorted(set(labels)):
        members = np.flatnonzero(labels == label)
        counts[:, members] = bootstrap_counts(len(members), num_resamples, cell_generator(seed, *stream, label))
    counts[(counts > 0).sum(axis=1) < min_distinct] = np.nan
    return counts


def percentile_interval(samples: ArrayLike, confidence: float) -> tuple[float, float]:
    """Return the central percentile interval of the finite samples.

    Args:
        samples: one statistic per resample, NaN where the resample had no value.
        confidence: level, e.g. 0.95.

    Returns:
        (lo, hi), or (NaN, NaN) if fewer than half of the resamples have a value.
    """
    samples = np.asarray(samples, dtype=np.float64)
    finite = samples[np.isfinite(samples)]
    if finite.size < max(2.0, MIN_SURVIVING_SHARE * samples.size):
        return float("nan"), float("nan")
    tail = 0.5 * (1.0 - confidence)
    lo, hi = np.quantile(finite, [tail, 1.0 - tail])
    return float(lo), float(hi)


def refill(samples: Array, generator: np.random.Generator) -> Array:
    """Return `samples`, shape (R, ...), with its failed rows (any NaN) replaced by draws from the rows that survived.

    Cells are resampled independently, so each may be conditioned on its own survival; without this, a law over k cells
    would keep only the resamples in which all k survive. All rows are NaN if fewer than half survive.
    """
    flat = samples.reshape(len(samples), -1)
    good = np.flatnonzero(np.isfinite(flat).all(axis=1))
    if good.size < max(2.0, MIN_SURVIVING_SHARE * len(samples)):
        return np.full_like(samples, np.nan)
    filled = samples.copy()
    failed = np.setdiff1d(np.arange(len(samples)), good)
    filled[failed] = samples[generator.choice(good, size=failed.size)]
    return filled
