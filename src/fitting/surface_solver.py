"""Batched damped Newton for the Huber fit of the loss surface.

Minimises, for many starts or bootstrap resamples at once,

    F(theta) = sum_i w_i * Huber_delta(log L_i - f_i(theta)),
    f = logsumexp(gamma * logsumexp(a - alpha * n, b - beta * d), e)

with theta = (a, b, e, alpha, beta[, gamma]) and n, d the centred log N, log D. The form is that of Hoffmann et al.
2022, section D.2, with the outer exponent gamma of "xLSTM Scaling Laws" added. Gradient and Hessian are analytic.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_MAX_BACKTRACKS = 4


@dataclass(frozen=True)
class SurfaceProblem:
    """Data and box of one loss-surface fit.

    Attributes:
        log_params: centred ln N, shape (n,).
        log_tokens: centred ln D, shape (n,).
        log_loss: ln of the loss in nat/token, shape (n,).
        huber_delta: threshold of the Huber penalty, in units of ln loss.
        lower, upper: box of theta, shape (P,); P = 5 fixes gamma at 1, P = 6 frees it.
    """

    log_params: Array
    log_tokens: Array
    log_loss: Array
    huber_delta: float
    lower: Array
    upper: Array

    def _forward(self, theta: Array) -> tuple[Array, ...]:
        a, b, e, alpha, beta = (theta[:, j, None] for j in range(5))
        gamma = theta[:, 5, None] if theta.shape[1] == 6 else 1.0
        u = a - alpha * self.log_params  # [B, n]
        v = b - beta * self.log_tokens
        s = _logaddexp(u, v)
        f = _logaddexp(gamma * s, e)
        return u, s, f, gamma

    def predict(self, theta: Array) -> Array:
        """Return ln L at the data, shape (B, n), for parameters `theta` of shape (B, P)."""
        return self._forward(theta)[2]

    def value(self, theta: Array, weights: Array) -> Array:
        """Return the objective, shape (B,); `weights` has shape (B, n) or (1, n)."""
        return (weights * self._huber(self.log_loss - self.predict(theta))).sum(axis=1)

    def _huber(self, residual: Array) -> Array:
        size = np.abs(residual)
        clipped = np.minimum(size, self.huber_delta)
        return clipped * (size - 0.5 * clipped)

    def jacobian(self, theta: Array) -> Array:
        """Return d ln L / d theta, shape (B, n, P)."""
        return self._tangents(theta)[0]

    def _tangents(self, theta: Array) -> tuple[Array, ...]:
        u, s, f, gamma = self._forward(theta)
        p = np.exp(u - s)  # share of the parameter term
        q = 1.0 - p
        reducible = np.exp(gamma * s - f)
        shape = (*u.shape, theta.shape[1])
        slope_s, cross = np.zeros(shape), np.zeros(shape)
        slope_s[..., 0], slope_s[..., 1] = p, q
        slope_s[..., 3], slope_s[..., 4] = -p * self.log_params, -q * self.log_tokens
        cross[..., 0], cross[..., 1] = 1.0, -1.0
        cross[..., 3], cross[..., 4] = -self.log_params, self.log_tokens
        slope_t = slope_s * gamma[..., None] if theta.shape[1] == 6 else slope_s.copy()
        if theta.shape[1] == 6:
            slope_t[..., 5] = s
        contrast = slope_t.copy()
        contrast[..., 2] = -1.0
        jacobian = reducible[..., None] * slope_t
        jacobian[..., 2] = 1.0 - reducible
        return jacobian, contrast, cross, slope_s, reducible, p * q * gamma, f

    def derivatives(self, theta: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
        """Return objective (B,), gradient (B, P), exact Hessian (B, P, P) and its majoriser (B, P, P).

        The majoriser is the Gauss-Newton matrix with the weights min(1, delta / |r|) of iteratively reweighted
        least squares.
        """
        jacobian, contrast, cross, slope_s, reducible, mix, f = self._tangents(theta)
        residual = self.log_loss - f
        size = np.abs(residual)
        value = (weights * self._huber(residual)).sum(axis=1)
        psi = weights * np.clip(residual, -self.huber_delta, self.huber_delta)
        gradient = -np.einsum("bi,bij->bj", psi, jacobian)

        irls = weights * np.minimum(1.0, self.huber_delta / np.maximum(size, 1e-300))
        jacobian_t = np.swapaxes(jacobian, 1, 2)
        majoriser = (jacobian_t * irls[:, None, :]) @ jacobian
        inside = np.where(size < self.huber_delta, weights, 0.0)
        hessian = (jacobian_t * inside[:, None, :]) @ jacobian
        hessian -= (np.swapaxes(contrast, 1, 2) * (psi * reducible * (1.0 - reducible))[:, None, :]) @ contrast
        hessian -= (np.swapaxes(cross, 1, 2) * (psi * reducible * mix)[:, None, :]) @ cross
        if theta.shape[1] == 6:
            row = np.einsum("bi,bij->bj", psi * reducible, slope_s)
            hessian[:, 5, :] -= row
            hessian[:, :, 5] -= row
        return value, gradient, hessian, majoriser


@dataclass(frozen=True)
class NewtonResult:
    """Where each problem of a batch ended.

    Attributes:
        theta: parameters, shape (B, P).
        value: objective, shape (B,).
        converged: whether the projected Newton step predicts no further gain, shape (B,).
    """

    theta: Array
    value: Array
    converged: NDArray[np.bool_]

    def take(self, index: NDArray[np.intp]) -> "NewtonResult":
        """Return the problems at `index`."""
        return NewtonResult(self.theta[index], self.value[index], self.converged[index])


def minimise(
    problem: SurfaceProblem, theta: Array, weights: Array, *, max_iterations: int, tolerance: float = 1e-12
) -> NewtonResult:
    """Run a damped, projected Newton method on every row of `theta`.

    Args:
        problem: data, threshold and box.
        theta: starts, shape (B, P).
        weights: multiplicity of each run, shape (B, n) or (1, n).
        max_iterations: steps a problem may take.
        tolerance: stop when the predicted decrease is below `tolerance` times the objective.

    Returns:
        The end points; their objective never exceeds that of the (clipped) start.
    """
    theta = np.clip(theta, problem.lower, problem.upper)
    weights = np.broadcast_to(weights, (len(theta), weights.shape[1]))
    value = problem.value(theta, weights)
    value[~np.isfinite(value)] = np.inf
    converged = np.zeros(len(theta), dtype=bool)
    damping = np.ones(len(theta))
    active = np.flatnonzero(np.isfinite(value))
    floor = 1e-22 * weights.shape[1]
    for _ in range(max_iterations):
        if active.size == 0:
            break
        here, rows = theta[active], weights[active]
        _, gradient, hessian, majoriser = problem.derivatives(here, rows)
        pinned = ((here <= problem.lower) & (gradient > 0)) | ((here >= problem.upper) & (gradient < 0))
        gradient, curvature, majoriser, scale = _scaled(gradient, hessian, majoriser, pinned)
        moved = np.zeros(active.size, dtype=bool)
        trying = np.arange(active.size)
        for _ in range(_MAX_BACKTRACKS):
            matrix = curvature[trying] + damping[active[trying], None, None] * majoriser[trying]
            step = -np.linalg.solve(matrix, gradient[trying][..., None])[..., 0]
            gain = -(step * gradient[trying]).sum(axis=1)
            trial = np.clip(here[trying] + step / scale[trying], problem.lower, problem.upper)
            trial_value = problem.value(trial, rows[trying])
            target = active[trying]
            done = gain <= tolerance * value[target] + floor
            better = trial_value < value[target]
            theta[target[better]], value[target[better]] = trial[better], trial_value[better]
            converged[target[done]] = True
            moved[trying[better]] = True
            damping[target[better]] *= 0.2
            damping[target[~better]] *= 8.0
            trying = trying[~better & ~done]
            if trying.size == 0:
                break
        stuck = ~moved & (damping[active] > 1e12)
        damping = np.maximum(damping, 1e-9)
        active = active[~converged[active] & ~stuck]
    return NewtonResult(theta, value, converged)


def _scaled(
    gradient: Array, hessian: Array, majoriser: Array, pinned: NDArray[np.bool_]
) -> tuple[Array, Array, Array, Array]:
    """Scale by the majoriser's diagonal, pin variables at the box, make the Hessian positive (absolute eigenvalues)."""
    diagonal = np.einsum("bjj->bj", majoriser)
    largest = diagonal.max(axis=1, keepdims=True)
    scale = np.sqrt(np.maximum(diagonal, 1e-12 * largest) + 1e-290)
    outer = scale[:, :, None] * scale[:, None, :]
    free = ~pinned
    both = free[:, :, None] & free[:, None, :]
    identity = np.eye(gradient.shape[1])
    hessian = np.where(both, hessian / outer, 0.0)
    values, vectors = np.linalg.eigh(hessian)
    curvature = (vectors * np.abs(values)[:, None, :]) @ np.swapaxes(vectors, 1, 2)
    curvature += 1e-13 * identity
    majoriser = np.where(both, majoriser / outer, 0.0) + 1e-3 * identity
    return np.where(free, gradient / scale, 0.0), curvature, majoriser, scale


def _logaddexp(x: Array, y: Array) -> Array:
    """Return ln(exp x + exp y) (faster on large batches than np.logaddexp)."""
    return np.maximum(x, y) + np.log1p(np.exp(-np.abs(x - y)))
