"""Batched damped Newton for the Huber fit of the loss surface (`surface_problem`), for many starts, resamples and
thresholds at once.

A step is taken in the amplitudes A, B, E, not in their logarithms: L is linear in them (gamma = 1), and a term that has
nearly vanished comes back in one step instead of crawling up an exponential. Where gamma is above 1 the valley bends in
eta too: there a step changes gamma at a fixed gamma z / x, z the smaller of the two terms.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .surface_problem import SurfaceProblem, stretch

Array = NDArray[np.float64]
_ELEMENTS = 16_384  # (problems, runs) elements worked on at once: what fits in cache with all intermediates
_TINY = 1e-300


def _keep_memory() -> None:
    """Have glibc keep freed memory: once a large block was freed it returns only larger ones to the system.

    Otherwise every intermediate above 128 KiB is mapped and faulted in anew, which costs as much as the arithmetic.
    """
    np.empty(1 << 21)  # 16 MiB, freed at once


@dataclass(frozen=True)
class Descent:
    """Where each problem of a batch ended.

    Attributes:
        eta: end points, shape (B, P).
        value: objective, shape (B,); inf where it could not be evaluated.
        converged: the Newton step from the end point predicts a relative gain below the tolerance, shape (B,).
    """

    eta: Array
    value: Array
    converged: NDArray[np.bool_]

    def take(self, index: NDArray[np.intp]) -> "Descent":
        """Return the problems at `index`."""
        return Descent(self.eta[index], self.value[index], self.converged[index])


def descend(
    problem: SurfaceProblem,
    eta: Array,
    delta: Array | float,
    weights: Array | None = None,
    *,
    max_iterations: int = 300,
    tolerance: float = 1e-12,
    damping: float = 1.0,
    held: Iterable[int] = (),
) -> Descent:
    """Run a damped, projected Newton method from every row of `eta`.

    The matrix is Hessian + lambda * majoriser, and (1 + lambda) * majoriser where that is not positive definite. A step
    that does not lower the objective raises lambda (Levenberg-Marquardt). Problems that have ended leave the batch and
    others take their place, so a slow one holds up nobody.

    Args:
        problem: data and box.
        eta: starts, shape (B, P).
        delta: Huber threshold, shape () or (B,).
        weights: weight of each run, shape (n,), (B, n) or None.
        max_iterations: steps a problem may take.
        tolerance: stop when the Newton step predicts a decrease below `tolerance` times the objective (the Newton
            decrement: the gradient measured by the inverse Hessian, so a flat valley does not hide a slope).
        damping: lambda of the first step; less than 1 where the starts are nearly minima.
        held: indices of the unknowns that keep their start's values.

    Returns:
        The end points; their objective never exceeds that of the (clipped) start.
    """
    count = len(eta)
    _keep_memory()
    delta = np.broadcast_to(np.asarray(delta, dtype=np.float64), count)
    if weights is not None and np.ndim(weights) == 2:
        weights = np.broadcast_to(weights, (count, len(problem.log_loss)))
    with np.errstate(all="ignore"):
        return _descend(problem, np.asarray(eta), delta, weights, max_iterations, tolerance, damping, list(held))


def _descend(
    problem: SurfaceProblem,
    start: Array,
    delta: Array,
    weights: Array | None,
    max_iterations: int,
    tolerance: float,
    first_damping: float,
    held: list[int],
) -> Descent:
    count, size = start.shape
    lower, upper = problem.lower[:, None], problem.upper[:, None]
    ended = Descent(np.clip(start, problem.lower, problem.upper), np.full(count, np.inf), np.zeros(count, bool))
    width = int(np.clip(_ELEMENTS // len(problem.log_loss), 16, 1024))
    smallest = 1e-22 * len(problem.log_loss)
    diagonal = np.arange(size)
    state: list[Array] = []  # row, iteration, damping, eta, objective, gradient, Hessian, majoriser; batch last
    waiting = 0

    def evaluate(rows: NDArray[np.intp], eta: Array) -> tuple[Array, ...]:
        mine = weights[rows] if weights is not None and weights.ndim == 2 else weights
        return problem.derivatives(eta, delta[rows], mine)

    while waiting < count or (state and state[0].size):
        room = width - (state[0].size if state else 0)
        if waiting < count and (room >= width // 4 or count - waiting <= room):
            rows = np.arange(waiting, min(waiting + room, count))
            waiting = rows[-1] + 1
            eta = ended.eta[rows].T.copy()
            fresh = [rows, np.zeros(rows.size, int), np.full(rows.size, first_damping), eta]
            fresh += evaluate(rows, eta)
            ended.value[rows] = np.where(np.isfinite(fresh[4]), fresh[4], np.inf)
            fresh = [part[..., np.isfinite(fresh[4])] for part in fresh]
            state = [np.concatenate(pair, axis=-1) for pair in zip(state, fresh)] if state else fresh
            continue
        rows, iteration, damping, eta, value, gradient, hessian, majoriser = state
        straight = size == 6 and (eta[5] > 1.0).any()
        if straight:
            gradient, hessian, majoriser = _straighten(eta, gradient, hessian, majoriser)
        pinned = ((eta <= lower) & (gradient > 0)) | ((eta >= upper) & (gradient < 0))
        pinned[held] = True
        scale = majoriser[diagonal, diagonal]
        scale = np.sqrt(np.maximum(scale, 1e-12 * scale.max(axis=0)) + _TINY)
        slope = np.where(pinned, 0.0, gradient / scale)
        step, definite = _solve(_matrix(hessian + damping * majoriser, scale, damping, pinned), slope)
        weak = np.flatnonzero(~definite)
        if weak.size:
            other = (1.0 + damping[weak]) * majoriser[..., weak]
            other = _matrix(other, scale[:, weak], damping[weak], pinned[:, weak])
            step[:, weak] = _solve(other, slope[:, weak])[0]
        decrement = -(step * slope).sum(axis=0)
        done = (decrement <= tolerance * value + smallest) & (damping <= 0.1) & definite
        trial = _retract(eta, step / scale)
        if straight:
            curved = eta[5] > 1.0
            gamma = np.clip(trial[5], np.where(curved, np.maximum(0.3 * eta[5], lower[5]), lower[5]), upper[5])
            trial[5] = eta[5]
            trial = np.where(curved, stretch(trial.T, gamma).T, trial)
            trial[5] = gamma
        trial = np.clip(trial, lower, upper)
        tried = (trial, *evaluate(rows, trial))
        better = tried[1] < value
        for k, new in enumerate(tried, start=3):
            state[k] = np.where(better, new, state[k])
        state[1] = iteration + 1
        damping = state[2] = np.where(better, np.maximum(0.2 * damping, 1e-9), 8.0 * damping)
        leaving = done | (state[1] >= max_iterations) | (damping > 1e12)
        if leaving.any():
            gone = rows[leaving]
            ended.eta[gone], ended.value[gone] = state[3][:, leaving].T, state[4][leaving]
            ended.converged[gone] = done[leaving]
            state = [part[..., ~leaving] for part in state]
    return ended


def _matrix(matrix: Array, scale: Array, damping: Array, pinned: NDArray[np.bool_]) -> Array:
    """Scale rows and columns, add a little damping of its own to each variable, take the pinned ones out."""
    matrix = matrix / (scale[:, None] * scale)
    free = ~pinned
    diagonal = np.arange(len(scale))
    matrix[diagonal, diagonal] += 1e-3 * damping + 1e-13
    matrix *= free[:, None] & free
    matrix[diagonal, diagonal] += pinned
    return matrix


def _straighten(eta: Array, gradient: Array, hessian: Array, majoriser: Array) -> tuple[Array, Array, Array]:
    """Return derivatives with respect to unknowns whose gamma, where it is above 1, moves as in `stretch`.

    With j the smaller term, its amplitude is gamma (k - ln gamma) and its exponent gamma times another: for a large
    gamma the loss hardly depends on gamma at fixed k, while in eta it has a valley that bends.
    """
    gamma = eta[5]
    first = eta[0] >= eta[1]
    hessian, majoriser, gradient = hessian.copy(), majoriser.copy(), gradient.copy()
    shear, bend = np.zeros_like(eta), np.zeros_like(eta)
    for smaller, j in (((gamma > 1.0) & ~first, 0), ((gamma > 1.0) & first, 1)):
        shear[j] = np.where(smaller, eta[j] / gamma - 1.0, 0.0)
        shear[3 + j] = np.where(smaller, eta[3 + j] / gamma, 0.0)
        bend[[j, 3 + j]] = np.where(smaller, gradient[[j, 3 + j]] / gamma, 0.0)
    for matrix in (hessian, majoriser):
        image = (matrix * shear).sum(axis=1)
        corner = matrix[5, 5] + 2.0 * image[5] + (shear * image).sum(axis=0)
        matrix[5] += image
        matrix[5, 5] = corner
    hessian[5] += bend
    hessian[5, :2] += bend[:2] * shear[:2]  # gamma moves the logarithm of the amplitude, the other step the amplitude
    hessian[5, 5] += (bend[:2] * (shear[:2] ** 2 - 1.0)).sum(axis=0)
    hessian[:, 5], majoriser[:, 5] = hessian[5], majoriser[5]
    gradient[5] += (shear * gradient).sum(axis=0)
    return gradient, hessian, majoriser


def _retract(eta: Array, step: Array) -> Array:
    """Return the point reached by relative steps in A, B (each at its own gamma) and E and plain steps in the rest."""
    moved = eta + step
    power = eta[5] if len(eta) == 6 else 1.0
    moved[:2] = eta[:2] + power * np.log(np.maximum(1.0 + step[:2] / power, 0.1))
    moved[2] = eta[2] + np.log(np.maximum(1.0 + step[2], 1e-9))
    return moved


def _solve(matrix: Array, gradient: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Solve matrix @ step = -gradient by L D Lᵀ for a batch along the last axis; also, whether D was positive.

    Pivots that are not positive are replaced, so that the step is finite and goes down. `matrix` is overwritten.
    """
    size = len(matrix)
    step = -gradient
    columns: list[Array] = []
    definite = np.ones(matrix.shape[2], dtype=bool)
    for j in range(size):
        pivot = matrix[j, j]
        positive = pivot > 1e-14
        if not positive.all():
            definite &= positive
            pivot = np.where(positive, pivot, np.maximum(np.abs(pivot), 1e-3))
        column = matrix[j, j + 1 :] / pivot
        matrix[j + 1 :, j + 1 :] -= column[:, None] * matrix[j, j + 1 :]
        step[j + 1 :] -= column * step[j]
        step[j] /= pivot
        columns.append(column)
    for j in reversed(range(size - 1)):
        step[j] -= (columns[j] * step[j + 1 :]).sum(axis=0)
    return step, definite
