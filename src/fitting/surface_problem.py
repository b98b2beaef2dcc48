"""The Huber fit of the loss surface as a problem: its unknowns, and its objective with analytic derivatives.

    F = sum_i w_i * Huber_delta(ln L_i - f_i),    f = logsumexp(gamma * logsumexp(ln A - alpha n, ln B - beta d), e)

(the logsumexp form of Hoffmann et al. 2022, section D.2, with the outer exponent gamma of "xLSTM Scaling Laws"), n and
d the centred ln N and ln D. The unknowns are eta = (gamma ln A, gamma ln B, e, gamma alpha, gamma beta[, gamma]): the
reducible loss is then the 1/gamma-norm of two power laws, so gamma only rounds the place where they cross, and the
valley along which alpha, beta, ln A and ln B trade against gamma becomes straight. With gamma = 1 nothing changes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


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
