"""The starts of a loss surface's fit: the grid, and the way of every start to a neighbourhood of its minimum.

Far from a minimum few numbers matter, so the way is cheap there:

1. At its own exponents and its own ratio A : B every start takes the common scale of both terms and the E that fit the
   relative losses best: linear least squares, in closed form.
2. It descends in A, B, E and then in all parameters, on at most 32 pooled runs (means of neighbours in ln N, ln D).
3. Starts that meet on the way (all of eta alike) are one from there on, with the sum of their counts: what follows is
   the same for them.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .surface_problem import SurfaceProblem, to_eta
from .surface_solver import descend

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
NAMES = ("a", "b", "e", "alpha", "beta", "gamma")
_POOLED = 32  # runs of the first part of the way
_AMPLITUDE_STEPS = 10
_STAGES = (30, 30)  # steps in all parameters, after each of which starts may meet
_SAME, _ALIKE = 1e-6, 1e-3  # starts meet when all of eta is this close: after the closed form, and on the way
_DAMPING = 1e-2  # of the first step of a later stage
_LEAST_GAMMA = 0.1  # of a start: at gamma = 0, in the paper's grid, no other parameter has a gradient
_SEEN = -12.0  # ln of the smaller over the larger term, where it is largest
_FLOOR_RANGE = (0.01, 0.95)  # of a start's E over the least loss


def start_grid(
    n: Array, d: Array, y: Array, config: Mapping[str, Any], dimension: int, centre: tuple[float, float] | None = None
) -> Array:
    """Return the starts in centred parameters, shape (S, P): the paper's grid, then starts scaled to the data.

    The paper's grid is in (ln A, ln B, ln E, alpha, beta, gamma) and suits its N, D. The scaled starts give E as a
    share of the least loss and split the rest at the centre of ln N, ln D between the two terms, whatever the units.
    """
    mean_n, mean_d = (n.mean(), d.mean()) if centre is None else centre
    grid = np.array(list(itertools.product(*(config["init_grid"][name] for name in NAMES[:dimension]))), dtype=float)
    if dimension == 6:
        grid[:, 5] = np.maximum(grid[:, 5], _LEAST_GAMMA)
    grid[:, 0] -= grid[:, 3] * mean_n
    grid[:, 1] -= grid[:, 4] * mean_d

    scaled = config["scaled_grid"]
    names = ("params_share", "params_share", "irreducible_share", "alpha", "beta", "gamma")[1:dimension]
    more = np.array(list(itertools.product(*(scaled[name] for name in names))), dtype=float)
    share, irreducible = more[:, 0].copy(), more[:, 1] * np.exp(y.min())
    outer = more[:, 4] if dimension == 6 else 1.0
    inner = np.log(np.exp(y.mean()) - irreducible) / outer
    head = np.column_stack([inner + np.log(share), inner + np.log1p(-share), np.log(irreducible)])
    return np.vstack([grid, np.hstack([head, more[:, 2:]])])


def approach(
    problem: SurfaceProblem, weights: Array | None, starts: Array, max_iterations: int
) -> tuple[Array, Counts, int]:
    """Bring every start near its minimum at threshold 1 (see the module).

    Args:
        problem: the runs and the box.
        weights: how often each run counts, shape (n,), or None.
        starts: theta of each start at centred ln N, ln D, shape (S, P).
        max_iterations: steps in all parameters that a start may take.

    Returns:
        Distinct end points eta, shape (K, P); how many starts each stands for, shape (K,), in all S; and how many
        distinct starts there were when their amplitudes had been fitted.
    """
    pooled, counts = pool_runs(problem, weights, _POOLED)
    ones = np.ones(len(starts), dtype=np.int64)
    eta, multiplicity = meet(balance(pooled, counts, to_eta(starts)), ones, _SAME)
    eta = descend(pooled, eta, 1.0, counts, max_iterations=_AMPLITUDE_STEPS, held=range(3, eta.shape[1])).eta
    eta, multiplicity = meet(eta, multiplicity, _ALIKE)
    distinct = len(eta)
    damping = 1.0
    for steps in (*_STAGES, max(max_iterations - sum(_STAGES), 1)):
        ended = descend(pooled, eta, 1.0, counts, max_iterations=steps, tolerance=1e-9, damping=damping)
        eta, multiplicity = meet(ended.eta, multiplicity, _ALIKE)
        damping = _DAMPING
    return eta, multiplicity, distinct


def pool_runs(problem: SurfaceProblem, weights: Array | None, size: int) -> tuple[SurfaceProblem, Array]:
    """Return at most `size` pooled runs and their weights.

    The group of runs that is widest in ln N or ln D is halved there until there are `size` groups; each becomes its
    weighted mean in ln N, ln D and ln loss.
    """
    places = np.column_stack([problem.log_params, problem.log_tokens])
    weights = np.ones(len(places)) if weights is None else weights
    groups = [np.arange(len(places))]
    while len(groups) < size:
        widths = [np.ptp(places[group], axis=0) for group in groups]
        widest = int(np.argmax([width.max() for width in widths]))
        if widths[widest].max() == 0.0:
            break
        group = groups.pop(widest)
        group = group[np.argsort(places[group, int(widths[widest].argmax())], kind="stable")]
        groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    member = np.zeros((len(groups), len(places)))
    for row, group in zip(member, groups):
        row[group] = weights[group]
    counts = member.sum(axis=1)
    columns = (problem.log_params, problem.log_tokens, problem.log_loss)
    return SurfaceProblem(*(member @ column / counts for column in columns), problem.lower, problem.upper), counts


def balance(problem: SurfaceProblem, weights: Array, eta: Array) -> Array:
    """Return the starts with the common scale C of both terms and the E that fit best; shape (S, P) as `eta`.

    Before that, a term that is nowhere seen is raised until it is e^-12 of the other at one run: it needs a gradient.
    Minimises sum_i w_i (1 - (C R_i + E) / L_i)^2, R the reducible loss, with E within `_FLOOR_RANGE` of the least loss.
    Where R does not vary (both exponents zero) C and E cannot be told apart: E keeps its share of the loss.
    """
    columns = eta.T[:, :, None]
    gamma = columns[5] if eta.shape[1] == 6 else 1.0
    u = (columns[0] - columns[3] * problem.log_params) / gamma
    v = (columns[1] - columns[4] * problem.log_tokens) / gamma
    contrast = u - v
    raised = [np.maximum(_SEEN - side.max(axis=1), 0.0) for side in (contrast, -contrast)]
    u += raised[0][:, None]
    v += raised[1][:, None]
    reducible = gamma * np.logaddexp(u, v)
    level = reducible.mean(axis=1)
    loss = np.exp(problem.log_loss)
    x, z = np.exp(np.clip(reducible - level[:, None], -50.0, 50.0)) / loss, 1.0 / loss
    xx, xz, zz, x1, z1 = (x * x) @ weights, (x * z) @ weights, z * z @ weights, x @ weights, z @ weights
    determinant = xx * zz - xz * xz
    varies = determinant > 1e-9 * xx * zz
    best = (xx * z1 - xz * x1) / np.where(varies, determinant, 1.0)
    own = np.exp(eta[:, 2] - np.logaddexp(level, eta[:, 2])) * loss.mean()
    floor = np.clip(np.where(varies, best, own), *(share * loss.min() for share in _FLOOR_RANGE))
    shift = np.log((x1 - floor * xz) / xx) - level
    balanced = eta.copy()
    balanced[:, :2] += shift[:, None] + np.column_stack(raised) * np.reshape(gamma, (-1, 1))
    balanced[:, 2] = np.log(floor)
    return balanced


def meet(eta: Array, multiplicity: Counts, resolution: float) -> tuple[Array, Counts]:
    """Return one of each group of alike points and the sum of their counts; a term below exp(-40) counts as none."""
    seen = eta.copy()
    seen[:, :3] = np.maximum(seen[:, :3], -40.0)
    _, first, group = np.unique(np.round(seen / resolution), axis=0, return_index=True, return_inverse=True)
    return eta[first], np.bincount(group.ravel(), weights=multiplicity).astype(np.int64)
