"""Batched damped Newton for the Huber fit of the loss surface, with analytic first and second derivatives.

For many starts, resamples and thresholds at once it minimises

    F = sum_i w_i * Huber_delta(ln L_i - f_i),    f = logsumexp(gamma * logsumexp(ln A - alpha n, ln B - beta d), e)

(the logsumexp form of Hoffmann et al. 2022, section D.2, with the outer exponent gamma of "xLSTM Scaling Laws"), n and
d the centred ln N and ln D. The unknowns are eta = (gamma ln A, gamma ln B, e, gamma alpha, gamma beta[, gamma]): the
reducible loss is then the 1/gamma-norm of two power laws, so gamma only rounds the place where they cross, and the
valley along which alpha, beta, ln A and ln B trade against gamma becomes straight. With gamma = 1 nothing changes.
Above 1 the valley bends in eta too: there a step changes gamma at a fixed gamma z / x, z the smaller of the two terms.

A step is taken in the amplitudes A, B, E, not in their logarithms: L is linear in them (gamma = 1), and a term that has
nearly vanished comes back in one step instead of crawling up an exponential.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ELEMENTS = 16_384  # (problems, runs) elements worked on at once: what fits in cache with all intermediates
_TINY = 1e-300


def _keep_memory() -> None:
    """Have glibc keep freed memory: once a large block was freed it returns only larger ones to the system.

    Otherwise every intermediate above 128 KiB is mapped and faulted in anew, which costs as much as the arithmetic.
    """
    np.empty(1 << 21)  # 16 MiB, freed at once


def to_eta(theta: Array) -> Array:
    """Return eta (see module) of theta = (ln A, ln B, e, alpha, beta[, gamma]), shape (..., P)."""
    eta = np.array(theta, dtype=np.float64)
    if eta.shape[-1] == 6:
        eta[..., [0, 1, 3, 4]] *= eta[..., 5:]
    return eta


def to_theta(eta: Array) -> Array:
    """Return theta of eta, the inverse of `to_eta`."""
    theta = np.array(eta, dtype=np.float64)
    if theta.shape[-1] == 6:
        theta[..., [0, 1, 3, 4]] /= theta[..., 5:]
    return theta


def stretch(eta: Array, gamma: Array | float) -> Array:
    """Return the points of nearly the same loss at other gamma, shape (..., 6), where gamma is large.

    With x the larger and z the smaller term, (x + z)^gamma = x^gamma (1 + z / x)^gamma is x^gamma exp(gamma z / x) but
    for terms of order 1 / gamma: x^gamma and gamma z are kept.
    """
    moved = np.array(eta, dtype=np.float64)
    ratio = gamma / moved[..., 5]
    first = moved[..., 0] >= moved[..., 1]
    for larger, j in ((first, 0), (~first, 1)):
        other = 1 - j
        moved[larger, other] = ratio[larger] * (moved[larger, other] - moved[larger, 5] * np.log(ratio[larger]))
        moved[larger, 3 + other] *= ratio[larger]
    moved[..., 5] = gamma
    return moved


@dataclass(frozen=True)
class SurfaceProblem:
    """Data and box of a loss-surface fit.

    Attributes:
        log_params: centred ln N, shape (n,).
        log_tokens: centred ln D, shape (n,).
        log_loss: ln of the loss in nat/token, shape (n,).
        lower, upper: box of eta, shape (P,); P = 5 fixes gamma at 1, P = 6 frees it.
    """

    log_params: Array
    log_tokens: Array
    log_loss: Array
    lower: Array
    upper: Array

    @cached_property
    def _moments(self) -> tuple[Array, ...]:
        """Powers of -n and -d that the sums over runs need: (n,), (n, 2), (n, 2), (n, 3), (n, 3), (n, 4)."""
        one, n, d = np.ones_like(self.log_params), self.log_params, self.log_tokens
        stacks = ((one, -n), (one, -d), (one, -n, n * n), (one, -d, d * d), (one, -n, -d, n * d))
        return (one, *(np.column_stack(stack) for stack in stacks))

    def _forward(self, eta: Array) -> tuple[Array, ...]:
        """Return shares p and q, ln S, ln(x / z), share of the reducible loss, ln L; each (B, n). `eta`: (P, B)."""
        columns = eta[:, :, None]
        u = columns[0] - columns[3] * self.log_params
        v = columns[1] - columns[4] * self.log_tokens
        gamma = 1.0
        if len(eta) == 6:
            gamma = columns[5]
            u /= gamma
            v /= gamma
        contrast = u - v
        ratio = np.exp(-np.minimum(np.abs(contrast), 100.0))  # no denormal numbers: they are slow
        larger = 1.0 / (1.0 + ratio)
        inner = np.maximum(u, v) + np.log1p(ratio)  # not ln(larger): gamma multiplies the error
        first = contrast >= 0
        smaller = ratio * larger
        p, q = np.where(first, larger, smaller), np.where(first, smaller, larger)
        reducible = np.exp(gamma * inner)
        loss = reducible + np.exp(columns[2])
        entropy = inner - p * u - q * v if len(eta) == 6 else inner
        return p, q, entropy, contrast, reducible / loss, np.log(loss)

    def predict(self, eta: Array) -> Array:
        """Return ln L at the data, shape (B, n), for `eta` of shape (B, P)."""
        return self._forward(np.asarray(eta).T)[-1]

    def value(self, eta: Array, delta: Array | float, weights: Array | None = None) -> Array:
        """Return the objective, shape (B,), for `eta` (B, P), `delta` () or (B,), `weights` (B, n), (n,) or None."""
        residual = self.log_loss - self.predict(eta)
        size = np.abs(residual)
        clipped = np.minimum(size, np.broadcast_to(delta, len(eta))[:, None])
        huber = clipped * (size - 0.5 * clipped)
        return (huber if weights is None else huber * weights).sum(axis=1)

    def jacobian(self, eta: Array) -> Array:
        """Return d ln L / d eta, shape (B, n, P), for `eta` of shape (B, P)."""
        p, q, entropy, _, share, _ = self._forward(np.asarray(eta).T)
        slopes = [p, q, (1.0 - share) / share, -p * self.log_params, -q * self.log_tokens, entropy]
        return np.stack([share * slope for slope in slopes[: np.shape(eta)[1]]], axis=2)

    def derivatives(
        self, eta: Array, delta: Array | float, weights: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Return objective, gradient, Hessian and majoriser for a batch that lies along the LAST axis.

        Amplitudes count as relative amplitudes: the first three coordinates are the relative changes of A (gamma-th
        power of its own retraction, see `_retract`), B and E at `eta`; the gradient is the same as for logarithms.

        Args:
            eta: shape (P, B).
            delta: Huber threshold, shape () or (B,).
            weights: weight of each run, shape (B, n), (n,) or None for ones.

        Returns:
            Objective (B,), gradient (P, B), Hessian (P, P, B), and the Gauss-Newton matrix (P, P, B) with the weights
            min(1, delta / |r|) of iteratively reweighted least squares (Huber & Ronchetti 2009, section 7.8).
        """
        size_p, batch = eta.shape
        one, n1, d1, n2, d2, cross = self._moments
        p, q, entropy, contrast, share, log_loss = self._forward(eta)
        residual = self.log_loss - log_loss
        size = np.abs(residual)
        delta = np.broadcast_to(delta, batch)[:, None]
        clipped = np.minimum(size, delta)
        huber = clipped * (size - 0.5 * clipped)
        irls = clipped / np.maximum(size, 1e-30)
        inside = (size < delta).astype(np.float64)
        if weights is not None:
            huber *= weights
            irls *= weights
            inside *= weights
        psi = irls * residual
        floor = 1.0 - share
        pull = psi * share
        mixed = share * floor
        pp, pq, qq = p * p, p * q, q * q

        gradient = np.empty((size_p, batch))
        gradient[[0, 3]] = -((pull * p) @ n1).T
        gradient[[1, 4]] = -((pull * q) @ d1).T
        gradient[2] = -(psi * floor) @ one
        if size_p == 6:
            gradient[5] = -(pull * entropy) @ one

        def gauss_newton(both: Array, mix: Array, constant: Array) -> Array:
            matrix = np.empty((size_p, size_p, batch))
            matrix[0, 0], matrix[0, 3], matrix[3, 3] = ((both * pp) @ n2).T
            matrix[1, 1], matrix[1, 4], matrix[4, 4] = ((both * qq) @ d2).T
            matrix[0, 1], matrix[1, 3], matrix[0, 4], matrix[3, 4] = ((both * pq) @ cross).T
            matrix[0, 2], matrix[2, 3] = ((mix * p) @ n1).T
            matrix[1, 2], matrix[2, 4] = ((mix * q) @ d1).T
            matrix[2, 2] = constant @ one
            if size_p == 6:
                rounded = both * entropy
                matrix[5, 5] = (rounded * entropy) @ one
                matrix[0, 5], matrix[3, 5] = ((rounded * p) @ n1).T
                matrix[1, 5], matrix[4, 5] = ((rounded * q) @ d1).T
                matrix[2, 5] = (mix * entropy) @ one
            return matrix

        majoriser = gauss_newton(irls * share * share, irls * mixed, irls * floor * floor)
        bend = psi * mixed
        hessian = gauss_newton(inside * share * share - bend, inside * mixed + bend, (inside + psi) * floor * floor)
        if size_p == 6:
            pull = pull / eta[5][:, None]
        kink = pull * pq
        _, down_n, down_nn = (kink @ n2).T
        _, down_d, down_dd = (kink @ d2).T
        hessian[0, 0] += (pull * pp) @ one  # a relative change of A, not of ln A
        hessian[1, 1] += (pull * qq) @ one
        hessian[0, 3] -= down_n
        hessian[3, 3] -= down_nn
        hessian[1, 4] -= down_d
        hessian[4, 4] -= down_dd
        for (i, j), term in zip(((0, 1), (1, 3), (0, 4), (3, 4)), (kink @ cross).T):
            hessian[i, j] += term
        if size_p == 6:
            tilted = kink * contrast
            hessian[[0, 3], 5] += (tilted @ n1).T
            hessian[[1, 4], 5] -= (tilted @ d1).T
            hessian[5, 5] -= (tilted * contrast) @ one
        for matrix in (hessian, majoriser):
            for i in range(size_p):
                matrix[i, :i] = matrix[:i, i]
        return huber @ one, gradient, hessian, majoriser


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
