"""The runtime model: time to first token and step time from FLOPs, bytes and a few constants of the machine.

    t = ((FLOPs / effective_flops_per_s)^p + (bytes / bandwidth_bytes_per_s)^p)^(1/p)
        + overhead_s + overhead_per_block_s · num_blocks + overhead_per_sequence_s · batch_size

A smooth roofline (Williams et al. 2009) with constant overheads, after the paper's inference-time models, which keep
one of the two rates and no overhead per block. One set of constants for each architecture, device and quantity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .resampling import percentile_interval, stratified_counts
from .runtime_solver import TERMS, Design, Solution, elasticities, solve
from .runtime_tables import (
    KEYS,
    PARAMETERS,
    PREDICTION_COLUMNS,
    QUANTITIES,
    RATES,
    check_measurements,
    model_table,
    predict_runtime,
    prediction_table,
    reasons,
    usable_rows,
)
from .tables import FitError

Array = NDArray[np.float64]
__all__ = ["fit_runtime_models", "predict_runtime"]
#: a term that moves no prediction by more than this share of its own change is not identified
NEGLIGIBLE = 0.02
#: singular values of the scaled Jacobian, smallest over largest, below which terms are not told apart
COLLINEAR = 1e-3


@dataclass
class _Fit:
    """The constants of one group of measurements (cost of each term in its own unit; 0 where it has none)."""

    design: Design
    solution: Solution
    costs: Array
    notes: list[str] = field(default_factory=list)


def _not_told_apart(jacobian: Array, active: Array) -> list[int]:
    """Indices of active terms whose columns of the Jacobian (n, 5) are linearly dependent; empty if none are."""
    index = np.flatnonzero(active)
    columns = jacobian[:, index] / np.linalg.norm(jacobian[:, index], axis=0)
    _, singular, right = np.linalg.svd(columns, full_matrices=True)
    if len(singular) == len(index) and singular[-1] > COLLINEAR * singular[0]:
        return []
    return [int(i) for i in index[np.abs(right[-1]) > 0.1]]


def _by_design(design: Design, lesser_rate: str) -> tuple[NDArray[np.bool_], list[str]]:
    """The terms (5,) that the measurements can tell from each other at all, and why others are not among them."""
    active, notes = np.ones(len(TERMS), dtype=bool), []
    rate = next(term for term in RATES if term != lesser_rate)
    for term, other in (("block", "constant"), ("sequence", "constant"), (lesser_rate, rate)):
        ratio = np.log(design.terms[:, TERMS.index(term)] / design.terms[:, TERMS.index(other)])
        if np.ptp(ratio) < COLLINEAR:
            active[TERMS.index(term)] = False
            notes.append(f"{PARAMETERS[term]} is not told apart from {PARAMETERS[other]}, which stands for it")
    return active, notes


def _fit(design: Design, quantity: str, config: Mapping[str, Any]) -> _Fit:
    """Fit; then drop, one at a time and saying so, the terms that the measurements do not identify."""
    lesser_rate = "flops" if quantity == "step_time" else "bytes"  # generation is memory-bound, prefill compute-bound
    active, notes = _by_design(design, lesser_rate)
    order = ["block", "sequence", lesser_rate, "constant"]  # which of the terms that cannot be told apart goes
    while True:
        solution = solve(design, active, float(config["huber_delta"]))
        jacobian = elasticities(design, solution.theta)
        reach = np.where(active, jacobian.max(axis=0), np.inf)
        weakest = int(np.argmin(reach))
        if active.sum() > 1 and reach[weakest] < NEGLIGIBLE:
            name = PARAMETERS[TERMS[weakest]]
            notes.append(f"{name} never binds" if TERMS[weakest] in RATES else f"{name} is not told from 0")
            active[weakest] = False
            continue
        confused = _not_told_apart(jacobian, active)
        droppable = [TERMS.index(name) for name in order if TERMS.index(name) in confused]
        if len(confused) > 1 and droppable:
            others = ", ".join(PARAMETERS[TERMS[i]] for i in confused if i != droppable[0])
            notes.append(f"{PARAMETERS[TERMS[droppable[0]]]} is not told apart from {others}, which stand for it")
            active[droppable[0]] = False
            continue
        return _Fit(design, solution, design.costs(solution.theta), notes)


def _constants(costs: Array) -> dict[str, float]:
    values = {}
    for term, cost in zip(TERMS, costs):
        value = float(cost)
        if term in RATES:
            value = 1.0 / value if value > 0 else float("nan")
        values[PARAMETERS[term]] = value
    return values


def _intervals(fit: _Fit, sizes: Array, stream: tuple[str, ...], config: Mapping[str, Any]) -> dict[str, float]:
    """Percentile intervals from resampling the measurements within each size; NaN for a term that is not in the fit.

    An interval of a rate whose cost may be nothing has no upper end (NaN).
    """
    active = np.isfinite(fit.solution.theta)
    counts = stratified_counts(
        [f"{size:.17g}" for size in sizes], int(config["num_resamples"]), int(config["seed"]), "runtime", *stream,
        min_distinct=int(active.sum()) + 1,
    )  # fmt: skip
    good = counts[np.isfinite(counts).all(axis=1)]
    if not len(good):
        return {}
    resampled = solve(fit.design, active, float(config["huber_delta"]), good, starts=fit.solution.finalists)
    samples = fit.design.costs(resampled.theta)  # (R, 5)
    ends: dict[str, float] = {}
    for index in np.flatnonzero(active):
        lo, hi = percentile_interval(samples[:, index], float(config["confidence"]))
        name = PARAMETERS[TERMS[index]]
        if TERMS[index] in RATES:
            lower_cost = lo if lo > fit.design.floor[index] * 10 else 0.0
            lo, hi = (1.0 / hi if hi > 0 else float("nan")), (1.0 / lower_cost if lower_cost > 0 else float("nan"))
            if np.isnan(hi):
                fit.notes.append(f"{name} has no upper bound")
        ends |= {f"{name}_lo": lo, f"{name}_hi": hi}
    return ends


def _mape(measured: Array, predicted: Array) -> float:
    return float(np.mean(np.abs(predicted / measured - 1.0))) if len(measured) else float("nan")


def _held_out(
    design: Design, measured: Array, sizes: Array, quantity: str, config: Mapping[str, Any]
) -> tuple[Array, list[str]]:
    """Predictions of each size by a fit to all the others; NaN where too few are left."""
    predicted = np.full(len(measured), np.nan)
    if len(np.unique(sizes)) < 2:
        return predicted, ["only one size: none to hold out"]
    for size in np.unique(sizes):
        out = sizes == size
        if (~out).sum() < int(config["min_measurements"]):
            continue
        solution = _fit(design.subset(~out), quantity, config)
        predicted[out] = design.predict_costs(solution.costs)[out]
    missing = int(np.isnan(predicted).sum())
    return predicted, [f"{missing} measurements not predicted: too few left without their size"] if missing else []


def _fit_group(
    rows: pd.DataFrame, quantity: str, stream: tuple[str, ...], config: Mapping[str, Any]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """One row of ``runtime_model`` (without its keys) and the predictions of its measurements."""
    empty = pd.DataFrame(columns=list(PREDICTION_COLUMNS))
    if len(rows) < int(config["min_measurements"]):
        detail = f"{len(rows)} usable measurements, {config['min_measurements']} are needed"
        return {"num_measurements": len(rows), "status": "too_few_measurements", "detail": detail}, empty
    column = {name: rows[name].to_numpy(dtype=np.float64) for name in ("num_blocks", "batch_size", "num_params")}
    flops, num_bytes, measured = (
        rows[f"{quantity}_{end}"].to_numpy(dtype=np.float64) for end in ("flops", "bytes", "s")
    )
    design = Design.of(flops, num_bytes, column["num_blocks"], column["batch_size"], measured, float(config["norm_p"]))
    fit = _fit(design, quantity, config)
    fitted = design.predict_costs(fit.costs)
    unseen, notes = _held_out(design, measured, column["num_params"], quantity, config)
    ends = _intervals(fit, column["num_params"], stream, config)
    seen = np.isfinite(unseen)
    row = {**_constants(fit.costs), **ends, "mape_fit": _mape(measured, fitted)}
    row |= {"mape_held_out": _mape(measured[seen], unseen[seen]), "num_measurements": len(rows)}
    row |= {"status": "ok", "detail": "; ".join(fit.notes + notes)}
    base = rows[list(KEYS)].assign(quantity=quantity, measured_s=measured, flops=flops, bytes=num_bytes)
    parts = [base.assign(predicted_s=fitted, held_out=False), base.assign(predicted_s=unseen, held_out=True)[seen]]
    return row, pd.concat([part for part in parts if len(part)])[list(PREDICTION_COLUMNS)]


def fit_runtime_models(measurements: pd.DataFrame, config: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit one runtime model for each architecture, device and quantity, over all its sizes, batches and prefills.

    Minimises the sum of Huber_δ(ln t̂ − ln t) over positive constants from many starts. A term that the measurements do
    not identify leaves the fit, with the reason in ``detail``: a rate is then NaN (it never binds), an overhead 0.
    Intervals come from resampling the measurements within each size; they hold the sizes fixed and the model for true.
    ``mape_held_out`` is the mean absolute relative error on each size by a fit that did not see that size.

    Args:
        measurements: the table ``measurements`` with the columns of ``inference.counts.add_counts``; times in s.
        config: ``norm_p``, ``huber_delta``, ``min_measurements``, ``num_resamples``, ``confidence``, ``seed``
            (conf/inference, ``runtime_model``).

    Returns:
        The tables ``runtime_model`` and ``runtime_predictions`` of docs/tables.md. The second has a row with
        ``held_out`` False (the fit) and, where there is one, a row with True (the fit without the row's size).

    Raises:
        FitError: a column is absent, no measurement is usable, or an architecture mixes dtypes or threads on a device.
    """
    check_measurements(measurements, config)
    models: list[dict[str, Any]] = []
    predictions: list[pd.DataFrame] = []
    usable = 0
    for (arch, device), group in measurements.groupby(["arch", "device"], sort=True):
        settings = group[["dtype", "num_threads"]].drop_duplicates()
        if len(settings) > 1:
            found = "; ".join(f"{row.dtype}, {row.num_threads} threads" for row in settings.itertuples())
            raise FitError(f"measurements of {arch} on {device} mix settings ({found}): fit them apart")
        for quantity in QUANTITIES:
            rows = usable_rows(group, quantity)
            usable += len(rows)
            row, predicted = _fit_group(rows, quantity, (str(arch), str(device), quantity), config)
            models.append({"arch": arch, "quantity": quantity, "device": device, **row})
            predictions.append(predicted)
    if not usable:
        raise FitError(f"no usable measurement: {reasons(measurements)}")
    return model_table(models), prediction_table(predictions)
