"""Fit of the parametric loss surface, from many starts, with its status and bootstrap.

The objective is the sum, not the mean, of Huber_delta(ln L - ln L_hat) (Hoffmann et al. 2022, section D.2). It is
nearly flat along a valley, so an exact Newton method descends from a grid of starts and the fit reports how many agree.
"""

import itertools
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .loss_surface import SURFACE_FIELDS, LossSurface
from .surface_solver import NewtonResult, SurfaceProblem, minimise

Array = NDArray[np.float64]
FORMS = ("gamma_fixed", "gamma_free")
_NAMES = ("a", "b", "e", "alpha", "beta", "gamma")
_VANISHING = 1e-3  # a term that is nowhere above this share of the loss has vanished


class SurfaceStatus(StrEnum):
    """How a surface fit ended; only `converged` parameters should be read as estimates."""

    CONVERGED = "converged"
    MAX_ITER = "max_iter"
    BOUND_HIT = "bound_hit"
    UNIDENTIFIED = "unidentified"
    TOO_FEW_RUNS = "too_few_runs"


@dataclass(frozen=True)
class SurfaceFit:
    """One fit and what it needs to be continued (other delta, resamples).

    Attributes:
        status, detail: how it ended, and a sentence.
        surface: the fitted surface; None without a fit.
        objective: sum of Huber losses.
        rmse_log, r2_log: of ln loss.
        num_starts: starts that were descended to the end; num_starts_agree: those within `agree_rtol` of the best.
        condition_number: of the Gauss-Newton Hessian JᵀJ with columns of unit length, at centred ln N, ln D.
        finalists: end points of the starts, best first; problem: what was minimised.
    """

    status: SurfaceStatus
    detail: str
    surface: LossSurface | None = None
    objective: float = np.nan
    rmse_log: float = np.nan
    r2_log: float = np.nan
    num_starts: int = 0
    num_starts_agree: int = 0
    condition_number: float = np.nan
    finalists: NewtonResult | None = None
    problem: SurfaceProblem | None = None


def fit_surface(
    num_params: ArrayLike,
    num_tokens: ArrayLike,
    val_loss: ArrayLike,
    config: Mapping[str, Any],
    *,
    form: str = "gamma_fixed",
    huber_delta: float | None = None,
    warm: SurfaceFit | None = None,
) -> SurfaceFit:
    """Fit one loss surface.

    All starts of the grid take `screening_iterations` steps, the best `num_finalists` descend to the end.

    Args:
        num_params, num_tokens, val_loss: shape (n,); loss in nat/token.
        config: `fitting.surface`.
        form: "gamma_fixed" or "gamma_free".
        huber_delta: default `config["huber_delta"]`.
        warm: a fit of the same data with another delta; its finalists replace the grid.

    Raises:
        ValueError: unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; one of {FORMS}")
    n, d, y = (np.log(np.asarray(values, dtype=np.float64)) for values in (num_params, num_tokens, val_loss))
    dimension = 5 + (form == "gamma_free")
    needed = max(int(config["min_runs"]), dimension + 1)
    if len(y) < needed:
        return SurfaceFit(SurfaceStatus.TOO_FEW_RUNS, f"{len(y)} runs; form {form} needs {needed}.")
    for name, values in (("num_params", n), ("num_tokens", d)):
        if np.ptp(values) < 1e-9:
            return SurfaceFit(SurfaceStatus.UNIDENTIFIED, f"All {len(y)} runs have the same {name}.")

    delta = float(config["huber_delta"] if huber_delta is None else huber_delta)
    lower, upper = _box(y, config["bounds"], dimension)
    problem = SurfaceProblem(n - n.mean(), d - d.mean(), y, delta, lower, upper)
    weights = np.ones((1, len(y)))
    if warm is None or warm.finalists is None:
        starts = start_grid(n, d, y, config, dimension)
        num_grid = len(starts)
        screened = minimise(problem, starts, weights, max_iterations=int(config["screening_iterations"]))
        starts = screened.theta[np.argsort(screened.value, kind="stable")[: int(config["num_finalists"])]]
    else:
        starts, num_grid = warm.finalists.theta, len(warm.finalists.theta)
    ended = minimise(problem, starts, weights, max_iterations=int(config["max_iterations"]))
    ended = ended.take(np.argsort(ended.value, kind="stable"))
    return _describe(problem, ended, (n.mean(), d.mean()), num_grid, config)


def start_grid(n: Array, d: Array, y: Array, config: Mapping[str, Any], dimension: int) -> Array:
    """Return the starts in centred parameters, shape (S, P): the paper's grid, then starts scaled to the data.

    The paper's grid is in (ln A, ln B, ln E, alpha, beta, gamma) and suits its N, D. The scaled starts give E as a
    share of the least loss and split the rest at the mean of ln N, ln D between the two terms, whatever the units.
    """
    grid = np.array(list(itertools.product(*(config["init_grid"][name] for name in _NAMES[:dimension]))), dtype=float)
    if dimension == 6:  # gamma = 0 has no gradient in the other parameters
        grid[:, 5] = np.maximum(grid[:, 5], float(config["bounds"]["gamma"][0]))
    grid[:, 0] -= grid[:, 3] * n.mean()
    grid[:, 1] -= grid[:, 4] * d.mean()

    scaled = config["scaled_grid"]
    names = ("params_share", "params_share", "irreducible_share", "alpha", "beta", "gamma")[1:dimension]
    more = np.array(list(itertools.product(*(scaled[name] for name in names))), dtype=float)
    share, irreducible = more[:, 0].copy(), more[:, 1] * np.exp(y.min())
    outer = more[:, 4] if dimension == 6 else 1.0
    inner = np.log(np.exp(y.mean()) - irreducible) / outer
    head = np.column_stack([inner + np.log(share), inner + np.log1p(-share), np.log(irreducible)])
    return np.vstack([grid, np.hstack([head, more[:, 2:]])])


def bootstrap_surface(
    fit: SurfaceFit, counts: Array, centre: tuple[float, float], config: Mapping[str, Any]
) -> tuple[Array, int]:
    """Refit every resample, started from the distinct best solutions.

    Args:
        fit: a fit with values.
        counts: multiplicity of each run, shape (R, n); rows of NaN count as failed.
        centre: mean ln N and mean ln D of the data.
        config: `fitting.surface`.

    Returns:
        A, B, E, alpha, beta, gamma, beta/(alpha+beta), alpha/(alpha+beta) of each resample, shape (R, 8), NaN where it
        did not converge; and how many converged.
    """
    starts = _distinct(fit.finalists, int(config["bootstrap_starts"]), float(config["agree_rtol"]))
    samples = np.full((len(counts), len(SURFACE_FIELDS) + 2), np.nan)
    valid = np.flatnonzero(np.isfinite(counts).all(axis=1))
    if valid.size == 0:
        return samples, 0
    theta = np.tile(starts, (valid.size, 1))
    ended = minimise(
        fit.problem,
        theta,
        np.repeat(counts[valid], len(starts), axis=0),
        max_iterations=int(config["bootstrap_iterations"]),
        tolerance=1e-6,
    )
    best = ended.value.reshape(valid.size, -1).argmin(axis=1) + np.arange(valid.size) * len(starts)
    ended = ended.take(best)
    for row, theta_row, good in zip(valid, ended.theta, ended.converged):
        if good:
            surface = _to_surface(theta_row, *centre)
            samples[row] = (*astuple(surface), surface.exponent_params, surface.exponent_tokens)
    return samples, int(ended.converged.sum())


def _describe(
    problem: SurfaceProblem,
    ended: NewtonResult,
    centre: tuple[float, float],
    num_grid: int,
    config: Mapping[str, Any],
) -> SurfaceFit:
    theta = ended.theta[:1]
    surface = _to_surface(theta[0], *centre)
    y = problem.log_loss
    residual = y - problem.predict(theta)[0]
    variance = np.sum((y - y.mean()) ** 2)
    jacobian = problem.jacobian(theta)[0]
    condition = gauss_newton_condition(jacobian)
    agree = ended.value <= ended.value[0] * (1 + float(config["agree_rtol"])) + 1e-20 * len(y)

    hit = [
        f"{name} = {value:.3g}"
        for name, value, low, high in zip(_NAMES, theta[0], problem.lower, problem.upper)
        if value <= low + 1e-9 or value >= high - 1e-9
    ]
    least = float(np.exp(y.min()))
    if surface.E / least < _VANISHING:
        hit.append(f"E = {surface.E:.3g} (0)")
    reducible = np.maximum(1.0 - jacobian[:, 2], 1e-300)
    scale = theta[0, 5] if theta.shape[1] == 6 else 1.0
    weak = [name for j, name in ((0, "N"), (1, "D")) if (jacobian[:, j] / scale).max() < _VANISHING]
    if reducible.max() < _VANISHING:
        weak = ["N", "D"]
    rtol = float(config["agree_rtol"])
    sentences = [f"Of {num_grid} starts {len(agree)} descended; {int(agree.sum())} end within {rtol:g} of the best."]
    status = SurfaceStatus.CONVERGED
    if not ended.converged[0]:
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
    if hit:
        status = SurfaceStatus.BOUND_HIT
        sentences.append(f"At a bound: {', '.join(hit)}.")
    return SurfaceFit(
        status=status,
        detail=" ".join(sentences),
        surface=surface,
        objective=float(ended.value[0]),
        rmse_log=float(np.sqrt(np.mean(residual**2))),
        r2_log=float(1.0 - np.sum(residual**2) / variance) if variance > 0 else np.nan,
        num_starts=len(agree),
        num_starts_agree=int(agree.sum()),
        condition_number=condition,
        finalists=ended,
        problem=problem,
    )


def gauss_newton_condition(jacobian: Array) -> float:
    """Return the condition number of JᵀJ with columns of unit length; inf if a column is zero. J has shape (n, P)."""
    length = np.linalg.norm(jacobian, axis=0)
    if not (length > 0).all():
        return float("inf")
    singular = np.linalg.svd(jacobian / length, compute_uv=False)
    return float((singular[0] / singular[-1]) ** 2) if singular[-1] > 0 else float("inf")


def _box(y: Array, bounds: Mapping[str, Any], dimension: int) -> tuple[Array, Array]:
    low, high = np.full(6, -200.0), np.full(6, 200.0)  # ln of the two terms at the centre of the data
    low[2], high[2] = (y.min() + np.log(float(share)) for share in bounds["irreducible_share"])
    for j, name in enumerate(_NAMES[3:], start=3):
        low[j], high[j] = (float(value) for value in bounds[name])
    return low[:dimension], high[:dimension]


def _to_surface(theta: Array, mean_n: float, mean_d: float) -> LossSurface:
    a, b, e, alpha, beta = theta[:5]
    gamma = float(theta[5]) if len(theta) == 6 else 1.0
    terms = np.exp([a + alpha * mean_n, b + beta * mean_d, e])
    return LossSurface(*(float(term) for term in terms), float(alpha), float(beta), gamma)


def _distinct(finalists: NewtonResult, limit: int, rtol: float) -> Array:
    """Return the best end points whose objectives differ by more than `rtol`, best first, shape (K, P)."""
    kept = [0]
    for index, value in enumerate(finalists.value):
        if len(kept) < limit and value > finalists.value[kept[-1]] * (1 + rtol):
            kept.append(index)
    return finalists.theta[kept]
