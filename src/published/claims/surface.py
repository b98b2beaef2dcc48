"""Answers to claims about the parametric loss surface."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.fitting.loss_surface import LossSurface
from xlstm_scaling.fitting.surface_result import FORMS, SAMPLED

from .evidence import Evidence, answer
from .ledger import Answer

Array = NDArray[np.float64]


@answer
def surface_parameter(evidence: Evidence, arch: str, form: str, of: str, subset: str = "tokenparam") -> Answer:
    """A parameter, an exponent (`exponent_params` is beta / (alpha + beta)) or the objective of a loss surface."""
    _form(form)
    key = (arch, subset, form, 1e-3)
    row, number = evidence.surface_row(*key), len(evidence.surface_runs(arch, subset))
    if of == "objective":
        return Answer(row["objective"], n_runs=number)
    return Answer(row[of], *evidence.interval(evidence.surface_intervals(*key)[:, SAMPLED.index(of)]), number)


@answer
def surface_form_shift(evidence: Evidence, arch: str, subset: str = "tokenparam") -> Answer:
    """Exponent of N* with gamma = 1; `right` is what it becomes with gamma free. The interval is that of gamma = 1."""
    fixed = surface_parameter(evidence, arch, FORMS[0], "exponent_params", subset)
    free = surface_parameter(evidence, arch, FORMS[1], "exponent_params", subset)
    note = (
        f"gamma = 1: {fixed.value:.3f} ({fixed.low:.3f} to {fixed.high:.3f}); gamma free: {free.value:.3f} "
        f"({free.low:.3f} to {free.high:.3f})."
    )
    return Answer(fixed.value, fixed.low, fixed.high, fixed.n_runs, note, right=free.value)


@answer
def surface_exponent_extreme(evidence: Evidence, arch: str, subset: str, form: str, deltas: list, which: str) -> Answer:
    """Least (`min`) or largest (`max`) exponent of N* over Huber thresholds."""
    _form(form)
    found = [evidence.surface_row(arch, subset, form, float(delta))["exponent_params"] for delta in deltas]
    note = ", ".join(f"{value:.3f} at {float(delta):g}" for value, delta in zip(found, deltas))
    number = len(evidence.surface_runs(arch, subset))
    return Answer(min(found) if which == "min" else max(found), n_runs=number, note=f"Exponent by threshold: {note}.")


@answer
def surface_objective_at(
    evidence: Evidence, arch: str, at: list, delta: float = 1e-3, subset: str = "tokenparam"
) -> Answer:
    """Objective, sum of Huber losses of ln L, at given parameters (ln A, ln B, ln E, alpha, beta, gamma)."""
    data = evidence.surface_runs(arch, subset)
    residual = np.log(data["val_loss"].to_numpy()) - np.log(_predicted(data, at))
    size = np.minimum(np.abs(residual), delta)
    return Answer(float((size * (np.abs(residual) - 0.5 * size)).sum()), n_runs=len(data))


@answer
def surface_optimality(evidence: Evidence, arch: str, form: str, at: list, subset: str = "tokenparam") -> Answer:
    """Objective at given parameters over the least that our fit finds; 1 at an optimum."""
    _form(form)
    row = evidence.surface_row(arch, subset, form, 1e-3)
    given = surface_objective_at(evidence, arch, at, 1e-3, subset)
    return Answer(given.value / row["objective"], n_runs=given.n_runs, note=f"Least objective: {row['objective']:.9g}.")


@answer
def surface_quality(
    evidence: Evidence, arch: str, at: list, of: str, subset: str = "tokenparam", broadcast: bool = False
) -> Answer:
    """Mean squared error (`mse`) [(nat/token)^2] or R^2 (`r2`) of given parameters on a set of runs.

    With `broadcast` the (n, 1) predictions are subtracted from the (n,) losses, which gives all n x n differences; for
    `r2` their squares are summed over the n squares about the mean. `right` is the value without that.
    """
    data = evidence.surface_runs(arch, subset)
    y, predicted = data["val_loss"].to_numpy(dtype=np.float64), _predicted(data, at)
    spread = float(((y - y.mean()) ** 2).sum())

    def quality(squares: Array) -> float:
        return float(squares.mean()) if of == "mse" else 1.0 - float(squares.sum()) / spread

    right = quality((y - predicted) ** 2)
    if not broadcast:
        return Answer(right, n_runs=len(y))
    return Answer(quality((y - predicted[:, None]) ** 2), n_runs=len(y), note=f"Without it: {right:.6g}.", right=right)


def _predicted(data: pd.DataFrame, at: list) -> Array:
    a, b, e, alpha, beta, gamma = (float(value) for value in at)
    surface = LossSurface(math.exp(a), math.exp(b), math.exp(e), alpha, beta, gamma)
    return surface.predict(*(data[name].to_numpy(dtype=np.float64) for name in ("num_params", "num_tokens")))


def _form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
