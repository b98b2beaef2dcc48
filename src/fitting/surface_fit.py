"""Fit of the parametric loss surface, from many starts, with its status, bootstrap and comparison of forms.

The objective is the sum, not the mean, of Huber_delta(ln L - ln L_hat) (Hoffmann et al. 2022, section D.2). It is
nearly flat along a valley and, for a small delta, has kinks, so the fit goes down a ladder of thresholds:

1. Every start of the grid is brought near its minimum at threshold 1, on pooled runs (`surface_starts`). Starts that
   meet on the way are one from there on, with the sum of their counts: what follows is the same for them.
2. What is left descends on all runs with threshold 1 until its Newton step promises no gain.
3. End points that predict the same losses to 1e-7 are one. The 24 lowest go on to the thresholds 0.1, 0.01 ... down to
   the one that is asked for. Below 0.05, from each rung's best point, fits to randomly weighted runs add end points
   in other basins.
4. A point that after 40 steps of a rung still moves and lies above twice the best is left behind.

`num_starts_agree` counts the starts of the grid whose way ends at the best objective; those left behind never count.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import erf

from .loss_surface import SURFACE_FIELDS, LossSurface
from .surface_solver import Descent, SurfaceProblem, descend, stretch, to_theta
from .surface_starts import NAMES, approach, start_grid

Array = NDArray[np.float64]
FORMS = ("gamma_fixed", "gamma_free")
SAMPLED = (*SURFACE_FIELDS, "exponent_params", "exponent_tokens")
_VANISHING = 1e-3  # a term that is nowhere above this share of the loss has vanished
_RUNGS = tuple(10.0**-k for k in range(12))  # thresholds of the ladder
_SHORT = 40  # steps of a rung after which hopeless points are left behind:
_HOPELESS = 2.0  # not converged, and above this multiple of the best objective
_RESAMPLE_STAGES = (15, 25)  # steps of a resample, after each of which its starts may meet or be left behind
_CARRIED = 24  # distinct end points, lowest first, that go on to the next rung
_PERTURBED = 16  # randomly weighted fits at each rung below _SMOOTH
_FAR = 1e7  # largest gamma where it wants to leave its box: the excess over the limit falls like 1 / gamma
_SMOOTH = 0.05  # no residual of ln loss is larger: there the objective has no kinks


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


def fit_surface(
    num_params: ArrayLike,
    num_tokens: ArrayLike,
    val_loss: ArrayLike,
    config: Mapping[str, Any],
    *,
    form: str = "gamma_fixed",
    huber_delta: float | None = None,
    weights: ArrayLike | None = None,
) -> SurfaceFit:
    """Fit one loss surface from every start of the grid (see the module for how).

    Args:
        num_params, num_tokens, val_loss: shape (n,); loss in nat/token.
        config: `fitting.surface`.
        form: "gamma_fixed" or "gamma_free".
        huber_delta: default `config["huber_delta"]`.
        weights: how often each run counts, shape (n,); default once.

    Raises:
        ValueError: unknown form, a threshold that is not positive, weights of a wrong shape or sign, numbers that are
            not finite and positive.
    """
    delta = float(config["huber_delta"] if huber_delta is None else huber_delta)
    data = (num_params, num_tokens, val_loss)
    return fit_surface_ladder(*data, config, form=form, deltas=[delta], weights=weights)[0]


def fit_surface_ladder(
    num_params: ArrayLike,
    num_tokens: ArrayLike,
    val_loss: ArrayLike,
    config: Mapping[str, Any],
    *,
    form: str,
    deltas: Sequence[float],
    weights: ArrayLike | None = None,
) -> list[SurfaceFit]:
    """Fit one loss surface for several thresholds, which share the ladder; a fit does not depend on the others.

    Args:
        deltas: Huber thresholds; one fit is returned for each, in this order.

    See `fit_surface` for the other arguments and the errors.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; one of {FORMS}")
    if not all(np.isfinite(delta) and delta > 0 for delta in deltas):
        raise ValueError(f"Huber thresholds must be positive, not {list(deltas)}")
    numbers = [np.asarray(values, dtype=np.float64) for values in (num_params, num_tokens, val_loss)]
    if not all((np.isfinite(values) & (values > 0)).all() for values in numbers):
        raise ValueError("num_params, num_tokens and val_loss must be finite and positive")
    n, d, y = (np.log(values) for values in numbers)
    counted = None if weights is None else np.asarray(weights, dtype=np.float64)
    if counted is not None:
        if counted.shape != y.shape or not (np.isfinite(counted) & (counted >= 0)).all():
            raise ValueError(f"weights must be {len(y)} numbers that are not negative")
        keep = counted > 0
        n, d, y, counted = n[keep], d[keep], y[keep], counted[keep]
    dimension = 5 + (form == "gamma_free")
    refusal = _refusal(n, d, y, form, max(int(config["min_runs"]), dimension + 1))
    if refusal is not None:
        return [SurfaceFit(*refusal, huber_delta=float(delta)) for delta in deltas]

    centre = (float(np.average(n, weights=counted)), float(np.average(d, weights=counted)))
    lower, upper = _box(y, config["bounds"], dimension)
    problem = SurfaceProblem(n - centre[0], d - centre[1], y, lower, upper)
    starts = start_grid(n, d, y, config, dimension, centre)
    near, multiplicity, distinct = approach(problem, counted, starts, int(config["max_iterations"]))
    ladder = _Ladder(problem, counted, config, len(starts), distinct, centre)
    rung = ladder.descend(near, multiplicity, _RUNGS[0])
    rungs = {_RUNGS[0]: rung}
    for delta in _RUNGS[1:]:
        if delta < min(deltas) * (1 - 1e-9):
            break
        rung = rungs[delta] = ladder.descend(rung.eta, rung.multiplicity, delta, rung)
    fits = []
    for delta in (float(value) for value in deltas):
        nearest = next((rung for rung in rungs if math.isclose(rung, delta, rel_tol=1e-9)), None)
        if nearest is None:
            parent = rungs[min((rung for rung in rungs if rung > delta), default=_RUNGS[0])]
            fits.append(ladder.describe(ladder.descend(parent.eta, parent.multiplicity, delta, parent)))
        else:
            fits.append(ladder.describe(rungs[nearest]))
    return fits


def bootstrap_surface(fit: SurfaceFit, counts: Array, config: Mapping[str, Any]) -> tuple[Array, int]:
    """Refit every resample, started from the distinct best end points of the fit.

    Args:
        fit: a fit with values.
        counts: multiplicity of each run, shape (R, n), times the fit's own weights; rows of NaN count as failed.
        config: `fitting.surface`.

    Returns:
        `SAMPLED` (A, B, E, alpha, beta, gamma and the two exponents) of each resample, shape (R, 8), NaN where it did
        not converge; and how many converged.
    """
    starts = fit.ends[: int(config["bootstrap_starts"])]
    samples = np.full((len(counts), len(SAMPLED)), np.nan)
    valid = np.flatnonzero(np.isfinite(counts).all(axis=1))
    if valid.size == 0:
        return samples, 0
    weights = counts[valid] if fit.weights is None else counts[valid] * fit.weights
    owner, eta = np.repeat(np.arange(valid.size), len(starts)), np.tile(starts, (valid.size, 1))
    left = int(config["bootstrap_iterations"])
    ended = None
    for steps in (*_RESAMPLE_STAGES, left):
        if ended is not None:  # go on with what is neither hopeless nor, within a resample, the same
            least = np.full(valid.size, np.inf)
            np.minimum.at(least, owner, ended.value)
            hopeful = ended.converged | (ended.value <= _HOPELESS * least[owner])
            _, first = np.unique(np.column_stack([owner, np.round(ended.eta / 1e-3)]), axis=0, return_index=True)
            kept = first[hopeful[first]]
            owner, eta = owner[kept], ended.eta[kept]
        limit = max(min(steps, left), 1)
        options = {"max_iterations": limit, "tolerance": 1e-9, "damping": 1e-2}
        ended = descend(fit.problem, eta, fit.huber_delta, weights[owner], **options)
        left -= limit
    order = np.lexsort((ended.value, owner))
    ended = ended.take(order[np.unique(owner[order], return_index=True)[1]])
    for row, eta, good in zip(valid, ended.eta, ended.converged):
        if good:
            surface = _to_surface(eta, fit.centre)
            samples[row] = [getattr(surface, name) for name in SAMPLED]
    return samples, int(ended.converged.sum())


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


def gauss_newton_condition(jacobian: Array) -> float:
    """Return the condition number of JᵀJ with columns of unit length; inf if a column is zero. J has shape (n, P)."""
    length = np.linalg.norm(jacobian, axis=0)
    if not (length > 0).all():
        return float("inf")
    singular = np.linalg.svd(jacobian / length, compute_uv=False)
    return float((singular[0] / singular[-1]) ** 2) if singular[-1] > 0 else float("inf")


@dataclass(frozen=True)
class _Rung:
    """Distinct end points at one threshold, best first; `multiplicity` counts starts of the grid."""

    delta: float
    eta: Array
    value: Array
    converged: NDArray[np.bool_]
    multiplicity: NDArray[np.int64]
    above: Array  # best end points of the rungs above, eta of shape (K, P)


@dataclass(frozen=True)
class _Ladder:
    problem: SurfaceProblem
    weights: Array | None
    config: Mapping[str, Any]
    num_starts: int
    num_distinct: int
    centre: tuple[float, float]

    def descend(
        self,
        eta: Array,
        multiplicity: NDArray[np.int64],
        delta: float,
        above: _Rung | None = None,
    ) -> _Rung:
        """Follow the points to their ends at `delta`, add those of perturbed fits, and join what predicts the same."""
        limit = int(self.config["max_iterations"])
        first = descend(self.problem, eta, delta, self.weights, max_iterations=min(limit, _SHORT), damping=1e-3)
        hopeful = np.flatnonzero(first.converged | (first.value <= _HOPELESS * first.value.min()))
        eta, multiplicity = first.eta[hopeful], multiplicity[hopeful]
        rest = max(limit - _SHORT, 1)
        ended = descend(self.problem, eta, delta, self.weights, max_iterations=rest, damping=1e-3)
        if delta < _SMOOTH and np.isfinite(ended.value).any():
            best = ended.eta[[int(np.argmin(ended.value))] * _PERTURBED]
            noise = np.random.default_rng(0).exponential(size=(_PERTURBED, len(self.problem.log_loss)))
            if self.weights is not None:
                noise = noise * self.weights
            away = descend(self.problem, best, delta, noise, max_iterations=limit // 4, damping=1e-3).eta
            back = descend(self.problem, away, delta, self.weights, max_iterations=limit, damping=1e-3)
            parts = zip(astuple(ended), astuple(back))
            ended = Descent(*(np.concatenate(pair) for pair in parts))
            multiplicity = np.concatenate([multiplicity, np.zeros(_PERTURBED, dtype=np.int64)])
        order = np.argsort(ended.value, kind="stable")
        ended, multiplicity = ended.take(order), multiplicity[order]
        curves = np.round(self.problem.predict(ended.eta) / 1e-7)
        _, first, group = np.unique(curves, axis=0, return_index=True, return_inverse=True)
        total = np.bincount(group.ravel(), weights=multiplicity).astype(np.int64)
        order = np.argsort(first)[:_CARRIED]
        ended, total = ended.take(first[order]), total[order]
        higher = np.empty((0, eta.shape[1])) if above is None else np.vstack([above.eta[:1], above.above])
        return _Rung(delta, ended.eta, ended.value, ended.converged, total, higher)

    def beyond(self, rung: _Rung) -> Descent:
        """Return the end points of a rung, those at gamma's upper bound followed beyond it, up to `_FAR`.

        As gamma grows L tends to E + A N^-alpha exp(B D^-beta), or the same with N and D exchanged. The objective may
        have its minimum on the way, or its infimum at the end: gamma is left free, and set to `_FAR`, too.
        """
        problem = self.problem
        found = Descent(rung.eta.copy(), rung.value.copy(), rung.converged.copy())
        at_bound = np.flatnonzero(rung.eta[:, 5] >= problem.upper[5]) if rung.eta.shape[1] == 6 else np.empty(0, int)
        if at_bound.size == 0:
            return found
        lower = np.array([-np.inf, -np.inf, problem.lower[2], 0.0, 0.0, problem.lower[5]])
        upper = np.array([np.inf, np.inf, problem.upper[2], np.inf, np.inf, _FAR])
        wide, limit = replace(problem, lower=lower, upper=upper), int(self.config["max_iterations"])
        near = rung.eta[at_bound]
        for start, held in ((near, ()), (stretch(near, _FAR), (5,))):
            ended = descend(wide, start, rung.delta, self.weights, max_iterations=limit, held=held)
            less = np.flatnonzero(ended.value < found.value[at_bound])
            index = at_bound[less]
            found.eta[index], found.value[index] = ended.eta[less], ended.value[less]
            found.converged[index] = ended.converged[less]
        return found

    def describe(self, rung: _Rung) -> SurfaceFit:
        """Return the fit at a rung: the best end point, its status and diagnostics."""
        problem, config, ended = self.problem, self.config, self.beyond(rung)
        best = int(np.argmin(ended.value))
        eta, objective = ended.eta[[best]], float(ended.value[best])
        dimension = eta.shape[1]
        weights = np.ones_like(problem.log_loss) if self.weights is None else self.weights
        surface = _to_surface(eta[0], self.centre)
        y = problem.log_loss
        residual = y - problem.predict(eta)[0]
        squares = float(weights @ residual**2)
        variance = float(weights @ (y - np.average(y, weights=weights)) ** 2)
        jacobian = problem.jacobian(eta)[0]
        condition = gauss_newton_condition(np.sqrt(weights)[:, None] * jacobian)
        rtol = float(config["agree_rtol"])
        limit = objective * (1 + rtol) + 1e-20 * len(y)
        agree = int(rung.multiplicity[ended.value <= limit].sum())
        likelihood, _ = huber_log_likelihood(residual, rung.delta, weights)
        free, number = dimension + 1, float(weights.sum())  # the scale is a parameter too

        escaped = dimension == 6 and eta[0, 5] > problem.upper[5]
        hit = [f"gamma = {eta[0, 5]:.3g}"] if escaped else []
        hit += [
            f"{name} = {shown:.3g}"
            for name, shown, value, low, high in zip(NAMES, to_theta(eta)[0], eta[0], problem.lower, problem.upper)
            if not escaped and (value <= low + 1e-9 or value >= high - 1e-9)
        ]
        least = float(np.exp(y.min()))
        if surface.E / least < _VANISHING:
            hit.append(f"E = {surface.E:.3g} (0)")
        weak = [name for j, name in ((0, "N"), (1, "D")) if jacobian[:, j].max() < _VANISHING]
        if escaped:  # there one of them holds almost all of the loss, and the other its dependence on N or D
            weak = []
        if (1.0 - jacobian[:, 2]).max() < _VANISHING:
            weak = ["N", "D"]
        sentences = [
            f"{self.num_starts} starts, {self.num_distinct} distinct after their amplitudes were fitted;"
            f" {agree} end within {rtol:g} of the best objective."
        ]
        status = SurfaceStatus.CONVERGED
        if not ended.converged[best]:
            status = SurfaceStatus.MAX_ITER
            sentences.append(f"The best start still moved after {config['max_iterations']} iterations.")
        if condition > float(config["max_condition_number"]) or not np.isfinite(condition):
            status = SurfaceStatus.UNIDENTIFIED
            sentences.append(f"The runs do not tell the parameters apart (condition number {condition:.2g}).")
        if weak:
            status = SurfaceStatus.UNIDENTIFIED
            sentences.append(f"The term in {' and '.join(weak)} vanishes.")
        if surface.E / least > 1.0:
            sentences.append("E lies above the least loss: the form does not describe the runs.")
        if escaped:
            larger, other = ("N", "D") if eta[0, 0] >= eta[0, 1] else ("D", "N")
            sentences.append(f"As gamma grows the form tends to E + A {larger}^-a exp(B {other}^-b).")
        if hit:
            status = SurfaceStatus.BOUND_HIT
            sentences.append(f"At a bound: {', '.join(hit)}.")
        return SurfaceFit(
            status=status,
            detail=" ".join(sentences),
            huber_delta=rung.delta,
            surface=surface,
            objective=objective,
            rmse_log=math.sqrt(squares / number),
            r2_log=1.0 - squares / variance if variance > 0 else np.nan,
            log_likelihood=likelihood,
            aic=2.0 * free - 2.0 * likelihood,
            bic=free * math.log(number) - 2.0 * likelihood,
            num_starts=self.num_starts,
            num_starts_agree=agree,
            num_distinct=self.num_distinct,
            condition_number=condition,
            ends=np.vstack([rung.eta[:1], rung.above, rung.eta[1:]]),
            problem=problem,
            weights=self.weights,
            centre=self.centre,
        )


def _refusal(n: Array, d: Array, y: Array, form: str, needed: int) -> tuple[SurfaceStatus, str] | None:
    if len(y) < needed:
        return SurfaceStatus.TOO_FEW_RUNS, f"{len(y)} runs; form {form} needs {needed}."
    for name, values in (("num_params", n), ("num_tokens", d)):
        if np.ptp(values) < 1e-9:
            return SurfaceStatus.UNIDENTIFIED, f"All {len(y)} runs have the same {name}."
    return None


def _box(y: Array, bounds: Mapping[str, Any], dimension: int) -> tuple[Array, Array]:
    """Return the box of eta: the bounds of alpha and beta hold for gamma alpha and gamma beta."""
    low, high = np.full(6, -200.0), np.full(6, 200.0)  # ln of the two terms at the centre of the data
    low[2], high[2] = (y.min() + np.log(float(share)) for share in bounds["irreducible_share"])
    for j, name in enumerate(NAMES[3:], start=3):
        low[j], high[j] = (float(value) for value in bounds[name])
    return low[:dimension], high[:dimension]


def _to_surface(eta: Array, centre: tuple[float, float]) -> LossSurface:
    a, b, e, alpha, beta, *rest = to_theta(eta)
    with np.errstate(over="ignore"):
        terms = np.exp([a + alpha * centre[0], b + beta * centre[1], e])
    return LossSurface(*(float(term) for term in terms), float(alpha), float(beta), float(rest[0]) if rest else 1.0)
