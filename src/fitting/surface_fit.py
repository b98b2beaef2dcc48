"""Fit of the parametric loss surface, from many starts, with its status and its bootstrap.

The objective is the sum, not the mean, of Huber_delta(ln L - ln L_hat) (Hoffmann et al. 2022, section D.2). It is
nearly flat along a valley and, for a small delta, has kinks. So every start of the grid is first brought near its
minimum at threshold 1, on pooled runs (`surface_starts`), where starts that meet on the way are one from there on, with
the sum of their counts: what follows is the same for them. What is left goes down a ladder of thresholds
(`surface_ladder`).

`num_starts_agree` counts the starts of the grid whose way ends at the best objective; those left behind never count.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .loss_surface import LossSurface
from .surface_ladder import HOPELESS, RUNGS, Ladder, Rung
from .surface_problem import SurfaceProblem, to_theta
from .surface_result import FORMS, SAMPLED, SurfaceFit, SurfaceStatus, huber_log_likelihood
from .surface_solver import descend
from .surface_starts import NAMES, approach, start_grid

Array = NDArray[np.float64]
_VANISHING = 1e-3  # a term that is nowhere above this share of the loss has vanished
_RESAMPLE_STAGES = (15, 25)  # steps of a resample, after each of which its starts may meet or be left behind


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
    ladder = Ladder(problem, counted, config)
    rung = ladder.descend(near, multiplicity, RUNGS[0])
    rungs = {RUNGS[0]: rung}
    for delta in RUNGS[1:]:
        if delta < min(deltas) * (1 - 1e-9):
            break
        rung = rungs[delta] = ladder.descend(rung.eta, rung.multiplicity, delta, rung)
    fits = []
    for delta in (float(value) for value in deltas):
        nearest = next((rung for rung in rungs if math.isclose(rung, delta, rel_tol=1e-9)), None)
        if nearest is None:
            parent = rungs[min((rung for rung in rungs if rung > delta), default=RUNGS[0])]
            rung = ladder.descend(parent.eta, parent.multiplicity, delta, parent)
        else:
            rung = rungs[nearest]
        fits.append(_described(ladder, rung, len(starts), distinct, centre))
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
            hopeful = ended.converged | (ended.value <= HOPELESS * least[owner])
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


def _described(
    ladder: Ladder, rung: Rung, num_starts: int, num_distinct: int, centre: tuple[float, float]
) -> SurfaceFit:
    """Return the fit at a rung: the best end point, its status and diagnostics."""
    problem, config, ended = ladder.problem, ladder.config, ladder.beyond(rung)
    best = int(np.argmin(ended.value))
    eta, objective = ended.eta[[best]], float(ended.value[best])
    weights = np.ones_like(problem.log_loss) if ladder.weights is None else ladder.weights
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
    free, number = eta.shape[1] + 1, float(weights.sum())  # the scale is a parameter too
    surface = _to_surface(eta[0], centre)
    status, reasons = _judged(problem, config, eta[0], surface, jacobian, condition, bool(ended.converged[best]))
    starts = (
        f"{num_starts} starts, {num_distinct} distinct after their amplitudes were fitted;"
        f" {agree} end within {rtol:g} of the best objective."
    )
    return SurfaceFit(
        status=status,
        detail=" ".join([starts, *reasons]),
        huber_delta=rung.delta,
        surface=surface,
        objective=objective,
        rmse_log=math.sqrt(squares / number),
        r2_log=1.0 - squares / variance if variance > 0 else np.nan,
        log_likelihood=likelihood,
        aic=2.0 * free - 2.0 * likelihood,
        bic=free * math.log(number) - 2.0 * likelihood,
        num_starts=num_starts,
        num_starts_agree=agree,
        num_distinct=num_distinct,
        condition_number=condition,
        ends=np.vstack([rung.eta[:1], rung.above, rung.eta[1:]]),
        problem=problem,
        weights=ladder.weights,
        centre=centre,
    )


def _judged(
    problem: SurfaceProblem,
    config: Mapping[str, Any],
    eta: Array,
    surface: LossSurface,
    jacobian: Array,
    condition: float,
    converged: bool,
) -> tuple[SurfaceStatus, list[str]]:
    """Return the status of an end point, eta (P,), and a sentence on each thing that is wrong with it.

    jacobian: d ln L / d eta at the runs, (n, P), of which `condition` is the condition number.
    """
    escaped = eta.size == 6 and eta[5] > problem.upper[5]  # gamma left its box
    share = surface.E / float(np.exp(problem.log_loss.min()))
    hit = _bounds_hit(problem, eta, surface, share, escaped)
    weak = _vanished(jacobian, escaped)
    status, sentences = SurfaceStatus.CONVERGED, []
    if not converged:
        status = SurfaceStatus.MAX_ITER
        sentences.append(f"The best start still moved after {config['max_iterations']} iterations.")
    if condition > float(config["max_condition_number"]) or not np.isfinite(condition):
        status = SurfaceStatus.UNIDENTIFIED
        sentences.append(f"The runs do not tell the parameters apart (condition number {condition:.2g}).")
    if weak:
        status = SurfaceStatus.UNIDENTIFIED
        sentences.append(f"The term in {' and '.join(weak)} vanishes.")
    if share > 1.0:
        sentences.append("E lies above the least loss: the form does not describe the runs.")
    if escaped:
        larger, other = ("N", "D") if eta[0] >= eta[1] else ("D", "N")
        sentences.append(f"As gamma grows the form tends to E + A {larger}^-a exp(B {other}^-b).")
    if hit:
        status = SurfaceStatus.BOUND_HIT
        sentences.append(f"At a bound: {', '.join(hit)}.")
    return status, sentences


def _bounds_hit(
    problem: SurfaceProblem, eta: Array, surface: LossSurface, irreducible_share: float, escaped: bool
) -> list[str]:
    """Return "name = value" of every parameter that ended at a bound of its box, or beyond."""
    if escaped:
        hit = [f"gamma = {eta[5]:.3g}"]
    else:
        named = zip(NAMES, to_theta(eta[None])[0], eta, problem.lower, problem.upper)
        hit = [
            f"{name} = {shown:.3g}"
            for name, shown, value, low, high in named
            if value <= low + 1e-9 or value >= high - 1e-9
        ]
    return [*hit, f"E = {surface.E:.3g} (0)"] if irreducible_share < _VANISHING else hit


def _vanished(jacobian: Array, escaped: bool) -> list[str]:
    """Return the variables, N or D, whose term is nowhere seen in the loss."""
    if (1.0 - jacobian[:, 2]).max() < _VANISHING:
        return ["N", "D"]
    if escaped:  # there one of them holds almost all of the loss, and the other its dependence on N or D
        return []
    return [name for j, name in ((0, "N"), (1, "D")) if jacobian[:, j].max() < _VANISHING]


def gauss_newton_condition(jacobian: Array) -> float:
    """Return the condition number of JᵀJ with columns of unit length; inf if a column is zero. J has shape (n, P)."""
    length = np.linalg.norm(jacobian, axis=0)
    if not (length > 0).all():
        return float("inf")
    singular = np.linalg.svd(jacobian / length, compute_uv=False)
    return float((singular[0] / singular[-1]) ** 2) if singular[-1] > 0 else float("inf")


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
