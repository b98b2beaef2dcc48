"""The parametric loss surface (approach 3 of Hoffmann et al. 2022, section 3.3, with an outer exponent).

L(N, D) = E + (A / N^alpha + B / D^beta)^gamma, with gamma = 1 (Hoffmann et al. 2022, eq. 2) or free ("xLSTM Scaling
Laws", parametric fit).
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LossSurface:
    """L(N, D) = E + (A / N^alpha + B / D^beta)^gamma, in nat/token, with N in parameters and D in tokens."""

    A: float
    B: float
    E: float
    alpha: float
    beta: float
    gamma: float = 1.0

    def predict(self, num_params: ArrayLike, num_tokens: ArrayLike) -> Array:
        """Return the loss in nat/token; inputs broadcast."""
        n, d = np.log(np.asarray(num_params, dtype=np.float64)), np.log(np.asarray(num_tokens, dtype=np.float64))
        inner = np.logaddexp(np.log(self.A) - self.alpha * n, np.log(self.B) - self.beta * d)
        return self.E + np.exp(self.gamma * inner)

    @property
    def exponent_params(self) -> float:
        """Return beta / (alpha + beta), the exponent of N*(C) (Hoffmann et al. 2022, eq. 4)."""
        return _ratio(self.beta, self.alpha + self.beta)

    @property
    def exponent_tokens(self) -> float:
        """Return alpha / (alpha + beta), the exponent of D*(C) (Hoffmann et al. 2022, eq. 4)."""
        return _ratio(self.alpha, self.alpha + self.beta)

    def compute_optimal(self, flops: ArrayLike, flops_per_param_token: float = 6.0) -> tuple[Array, Array]:
        """Return (N*, D*) that minimise the loss under C = k N D.

        N* = G (C/k)^(beta/(alpha+beta)), D* = (C/k) / N*, G = (alpha A / (beta B))^(1/(alpha+beta)) (Hoffmann et al.
        2022, eq. 4); gamma does not matter, as the outer power is monotone.

        Args:
            flops: budget C [FLOPs].
            flops_per_param_token: k of the constraint.
        """
        product = np.asarray(flops, dtype=np.float64) / flops_per_param_token
        log_scale = np.log(self.alpha * self.A) - np.log(self.beta * self.B)
        num_params = np.exp(log_scale / (self.alpha + self.beta)) * product**self.exponent_params
        return num_params, product / num_params

    def optimal_loss(self, flops: ArrayLike, flops_per_param_token: float = 6.0) -> Array:
        """Return the loss at the compute-optimal N*, D* of a budget [FLOPs]."""
        return self.predict(*self.compute_optimal(flops, flops_per_param_token))


SURFACE_FIELDS = tuple(field.name for field in fields(LossSurface))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
