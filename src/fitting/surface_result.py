"""What a fit of the loss surface is: its status, its numbers, and how two forms of it compare."""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import erf

from .loss_surface import SURFACE_FIELDS, LossSurface
from .surface_problem import SurfaceProblem

Array = NDArray[np.float64]
FORMS = ("gamma_fixed", "gamma_free")
#: what the resamples of a surface hold
SAMPLED = (*SURFACE_FIELDS, "exponent_params", "exponent_tokens")


class SurfaceStatus(StrEnum):
    """How a surface fit ended; only `converged` parameters should be read as estimates."""

    CONVERGED = "converged"
    MAX_ITER = "max_iter"
    BOUND_HIT = "bound_hit"
    UNIDENTIFIED = "unidentified"
    TOO_FEW_RUNS = "too_few_runs"


@dataclass(frozen=True)
class SurfaceFit:
    """One fit and what it needs to be continued (resamples).

    Attributes:
        status, detail: how it ended, and a sentence.
        huber_delta: threshold of the Huber penalty, in units of ln loss.
        surface: the fitted surface; None without a fit.
        objective: weighted sum of Huber losses.
        rmse_log, r2_log: of ln loss, weighted.
        log_likelihood, aic, bic: of the Huber distribution (`huber_log_likelihood`).
        num_starts: starts of the grid; num_starts_agree: those that end within `agree_rtol` of the best objective.
        num_distinct: starts that were left to follow after the amplitudes had been fitted.
        condition_number: of the Gauss-Newton Hessian JᵀJ with columns of unit length, at centred ln N, ln D.
        ends: distinct end points of this rung and the best of those above, best first, within the box, eta of (K, P).
        problem, weights, centre: what was minimised; weights (n,) or None, centre the means of ln N and ln D.
    """

    status: SurfaceStatus
    detail: str
    huber_delta: float = np.nan
    surface: LossSurface | None = None
    objective: float = np.nan
    rmse_log: float = np.nan
    r2_log: float = np.nan
    log_likelihood: float = np.nan
    aic: float = np.nan
    bic: float = np.nan
    num_starts: int = 0
    num_starts_agree: int = 0
    num_distinct: int = 0
    condition_number: float = np.nan
    ends: Array | None = None
    problem: SurfaceProblem | None = None
    weights: Array | None = None
    centre: tuple[float, float] = (np.nan, np.nan)


def huber_log_likelihood(residual: ArrayLike, delta: float, weights: ArrayLike | None = None) -> tuple[float, float]:
    """Return the log-likelihood of residuals under the Huber distribution, at its best scale, and that scale s.

    The density exp(-Huber_delta(r) / s) / Z(s) has the Huber estimate as its maximum-likelihood estimate for every s
    (Huber & Ronchetti 2009, section 4.5: Huber's least favourable distribution), so what minimises the objective F also
    maximises -F / s - W ln Z(s), W the sum of weights. With delta = infinity it is the normal distribution of variance
    s, with delta -> 0 the Laplace distribution of scale s / delta;

        Z(s) = sqrt(2 pi s) erf(delta / sqrt(2 s)) + 2 (s / delta) exp(-delta^2 / (2 s)).

    Args:
        residual: of ln loss, shape (n,).
        delta: Huber threshold, in units of ln loss.
        weights: how often each residual counts, shape (n,).

    Returns:
        Log-likelihood [nat], and s; (inf, 0) where every residual is zero.
    """
    size = np.abs(np.asarray(residual, dtype=np.float64))
    count = np.ones_like(size) if weights is None else np.asarray(weights, dtype=np.float64)
    clipped = np.minimum(size, delta)
    total, number = float(count @ (clipped * (size - 0.5 * clipped))), float(count.sum())
    if total <= 0.0:
        return math.inf, 0.0

    def negative(log_scale: float) -> float:
        scale = math.exp(log_scale)
        cut = delta / math.sqrt(2.0 * scale)
        centre = math.sqrt(2.0 * math.pi * scale) * float(erf(cut))
        return total / scale + number * math.log(centre + 2.0 * scale / delta * math.exp(-cut * cut))

    middle = math.log(total / number)  # Laplace: s = F / W; normal: s = 2 F / W
    found = minimize_scalar(negative, bounds=(middle - 2.0, middle + 3.0), method="bounded", options={"xatol": 1e-10})
    return -float(found.fun), math.exp(found.x)


def compare_forms(fixed: SurfaceFit, free: SurfaceFit) -> dict[str, float]:
    """Compare gamma = 1 with gamma free on the same runs and threshold by their likelihoods.

    gamma = 1 is the other form with one parameter fixed inside its range, and the Huber distribution is regular for
    delta > 0 (its score is bounded and continuous), so 2 (l_free - l_fixed), each at its own scale, is asymptotically
    chi-squared with one degree of freedom if gamma = 1 holds (Wilks 1938). Residuals count as independent; runs that
    enter twice (weights) count twice.

    Returns:
        log_likelihood_fixed, log_likelihood_free, likelihood_ratio, p_value, delta_aic, delta_bic (fixed minus free:
        positive prefers gamma free).

    Raises:
        ValueError: a fit without values, or fits with different data or thresholds.
    """
    if fixed.surface is None or free.surface is None:
        raise ValueError(f"cannot compare forms: {fixed.detail if fixed.surface is None else free.detail}")
    same = fixed.huber_delta == free.huber_delta and np.array_equal(fixed.problem.log_loss, free.problem.log_loss)
    if not same or len(fixed.problem.lower) != 5 or len(free.problem.lower) != 6:
        raise ValueError("compare a fit with gamma = 1 and one with gamma free, of the same runs and threshold")
    ratio = max(2.0 * (free.log_likelihood - fixed.log_likelihood), 0.0)
    return {
        "log_likelihood_fixed": fixed.log_likelihood,
        "log_likelihood_free": free.log_likelihood,
        "likelihood_ratio": ratio,
        "p_value": math.erfc(math.sqrt(0.5 * ratio)),
        "delta_aic": fixed.aic - free.aic,
        "delta_bic": fixed.bic - free.bic,
    }
