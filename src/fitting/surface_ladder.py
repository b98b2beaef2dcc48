"""The ladder of thresholds that a loss surface's fit goes down.

1. What is left of the starts (`surface_starts`) descends on all runs with threshold 1 until its Newton step promises no
   gain.
2. End points that predict the same losses to 1e-7 are one. The 24 lowest go on to the thresholds 0.1, 0.01 ... down to
   the one that is asked for. Below 0.05, from each rung's best point, fits to randomly weighted runs add end points
   in other basins.
3. A point that after 40 steps of a rung still moves and lies above twice the best is left behind.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .surface_problem import SurfaceProblem, stretch
from .surface_solver import Descent, descend

Array = NDArray[np.float64]
RUNGS = tuple(10.0**-k for k in range(12))  # thresholds of the ladder
HOPELESS = 2.0  # left behind: not converged, and above this multiple of the best objective
_SHORT = 40  # steps of a rung after which hopeless points are left behind
_CARRIED = 24  # distinct end points, lowest first, that go on to the next rung
_PERTURBED = 16  # randomly weighted fits at each rung below _SMOOTH
_FAR = 1e7  # largest gamma where it wants to leave its box: the excess over the limit falls like 1 / gamma
_SMOOTH = 0.05  # no residual of ln loss is larger: there the objective has no kinks


@dataclass(frozen=True)
class Rung:
    """Distinct end points at one threshold, best first; `multiplicity` counts starts of the grid."""

    delta: float
    eta: Array
    value: Array
    converged: NDArray[np.bool_]
    multiplicity: NDArray[np.int64]
    above: Array  # best end points of the rungs above, eta of shape (K, P)


@dataclass(frozen=True)
class Ladder:
    """The rungs of one fit share the problem, the weights (n,) of its runs or None, and the group `fitting.surface`."""

    problem: SurfaceProblem
    weights: Array | None
    config: Mapping[str, Any]

    def descend(
        self,
        eta: Array,
        multiplicity: NDArray[np.int64],
        delta: float,
        above: Rung | None = None,
    ) -> Rung:
        """Follow the points to their ends at `delta`, add those of perturbed fits, and join what predicts the same."""
        limit = int(self.config["max_iterations"])
        first = descend(self.problem, eta, delta, self.weights, max_iterations=min(limit, _SHORT), damping=1e-3)
        hopeful = np.flatnonzero(first.converged | (first.value <= HOPELESS * first.value.min()))
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
        return Rung(delta, ended.eta, ended.value, ended.converged, total, higher)

    def beyond(self, rung: Rung) -> Descent:
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
