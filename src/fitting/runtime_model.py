"""The runtime model: time to first token and step time from FLOPs, bytes and constants of the machine.

    t = roof(linear FLOPs / linear_flops_per_s, missed · weight bytes / weight_bytes_per_s)
        + (mixing FLOPs / mixing_flops_per_s + scores / scores_per_s + missed · state bytes / state_bytes_per_s)
          · roof(1, parallel_streams / streams)
        + activation bytes / activation_bytes_per_s
        + overhead_s + num_blocks · (overhead_per_block_s + [batch > 1] overhead_per_batched_block_s)
        + overhead_per_sequence_s · batch
    missed = 1 / (1 + (cache_bytes / (weight bytes + state bytes))^6)
    roof(a, b) = (a^p + b^p)^(1/p)

A smooth roofline (Williams et al. 2009) for each kind of kernel, one kind after another: docs/runtime.md. One set of
constants for each architecture, device and quantity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student_t

from .resampling import percentile_interval, stratified_counts
from .runtime_prediction import predict_step_time_s, predict_ttft_s
from .runtime_solver import CACHE, LINEAR, MIXING, NO_ERROR, REST, TERMS, Design, Solution, elasticities, solve
from .runtime_tables import (
    COUNTS,
    KEYS,
    PARAMETERS,
    PREDICTION_COLUMNS,
    QUANTITIES,
    RANGES,
    RATES,
    SETTINGS,
    check_measurements,
    constants,
    counted_as,
    device_limits,
    has_second_version,
    model_table,
    noise,
    peak_rates,
    prediction_table,
    reasons,
    term_counts,
    usable_rows,
)
from .tables import FitError

Array = NDArray[np.float64]
__all__ = ["fit_runtime_models", "predict_step_time_s", "predict_ttft_s"]
#: a term that moves no prediction by more than this share of its own change is not identified
NEGLIGIBLE = 0.02
#: singular values of the scaled Jacobian, smallest over largest, below which terms are not told apart
COLLINEAR = 1e-3
#: counts whose ratio varies by less than this share are proportional
PROPORTIONAL = 0.15
#: level at which a cost has to differ from 0, by Student's t over model sizes
LEVEL = 0.95
#: a cost this small, in units of the design's scale, is none
FLOOR = 1e-6
_FIRST = ("sequence", "batched_block", "wait", "cache", "scores", "activation_bytes", "constant")
#: which of the terms that are not told apart leaves the fit first; prefill is bound by FLOPs, a step by bytes, and most
#: kernels are launched by blocks
EXPENDABLE = {
    "ttft": (*_FIRST, "state_bytes", "mixing_flops", "weight_bytes", "block"),
    "step_time": (*_FIRST, "mixing_flops", "state_bytes", "linear_flops", "block"),
}
#: terms whose bytes a cache spares
SPARED = (TERMS.index("weight_bytes"), TERMS.index("state_bytes"))
#: groups of terms of which two that are proportional cannot be told apart
TOGETHER = (LINEAR, MIXING, REST)


@dataclass
class _Fit:
    """The constants of one group of measurements (cost of each term in its own unit; 0 where it has none)."""

    design: Design
    solution: Solution
    costs: Array
    notes: list[str] = field(default_factory=list)


def _by_design(design: Design, expendable: tuple[str, ...], cached: bool) -> tuple[NDArray[np.bool_], list[str]]:
    """The terms (K,) that the measurements can tell from each other at all, and why others are not among them.

    A term that no measurement has (a step of an mLSTM has no scores) is left out without a word. ``cached``: with a
    cache, which spares some of the bytes and none of the FLOPs.
    """
    active, notes = (design.terms > 0).any(axis=0), []
    active[CACHE] &= cached
    groups = [[i for i in range(len(TERMS))[group] if active[i]] for group in TOGETHER]
    for term in expendable:
        i = TERMS.index(term)
        for j in next((group for group in groups if i in group), []):
            if cached and (i in SPARED) != (j in SPARED):
                continue
            if j != i and active[i] and active[j] and _proportional(design.terms[:, i], design.terms[:, j]):
                active[i] = False
                notes.append(f"{PARAMETERS[term]} is not told apart from {PARAMETERS[TERMS[j]]}, which stands for it")
    return active, notes


def _proportional(a: Array, b: Array) -> bool:
    if not np.array_equal(a > 0, b > 0):
        return False
    return np.ptp(np.log(a[a > 0] / b[a > 0])) < PROPORTIONAL


def _hidden(fit: Solution, design: Design, delta: float) -> tuple[int, str] | None:
    """A term whose rate is at the device's peak and without which the fit is better."""
    for k in np.flatnonzero(design.at_peak(fit.theta)):
        active = np.isfinite(fit.theta)
        active[k] = False
        if active.any() and solve(design, active, delta, starts=fit.finalists).objective < fit.objective:
            return int(k), f"{PARAMETERS[TERMS[k]]} would be above the device's peak: hidden behind other work"
    return None


def _uncertainty(design: Design, theta: Array, sizes: Array, delta: float) -> Array:
    """Half-widths (K,) of the intervals of log costs, at `LEVEL`; 0 of a term that is not in the fit.

    Clustered by model size (Liang & Zeger 1986) where there are three or more: a cost has to show in most of them.
    """
    active = np.isfinite(theta)
    jacobian = elasticities(design, theta)[:, active]
    residual = np.log(design.predict_costs(design.costs(theta))) - design.log_time
    weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
    _, cluster = np.unique(sizes, return_inverse=True)
    if cluster.max() < 2:
        cluster = np.arange(len(sizes))
    G = int(cluster.max()) + 1
    gradient = np.zeros((G, int(active.sum())))
    np.add.at(gradient, cluster, jacobian * (weight * residual)[:, None])
    bread = np.linalg.pinv((jacobian * weight[:, None]).T @ jacobian, hermitian=True)
    errors = np.zeros(len(TERMS))
    errors[active] = np.sqrt(((gradient @ bread) ** 2).sum(axis=0) * G / (G - 1))
    return errors * student_t.ppf((1 + LEVEL) / 2, G - 1)


def _weakest(fit: Solution, design: Design, sizes: Array, delta: float) -> tuple[int, str] | None:
    """The term that the measurements tell least from nothing. A rate at its peak is told."""
    active = np.isfinite(fit.theta)
    reach = np.where(active, np.abs(elasticities(design, fit.theta)).max(axis=0), np.inf)
    doubt = np.where(active & ~design.at_peak(fit.theta), _uncertainty(design, fit.theta, sizes, delta), 0.0)
    k = int(np.argmin(reach)) if reach.min() < NEGLIGIBLE else int(np.argmax(doubt))
    if active.sum() < 2 or (reach[k] >= NEGLIGIBLE and doubt[k] <= 1.0):
        return None
    return k, f"{PARAMETERS[TERMS[k]]} {'never binds' if TERMS[k] in RATES else 'is not told from 0'}"


def _not_told_apart(fit: Solution, design: Design, expendable: tuple[str, ...]) -> tuple[int, str] | None:
    """The most expendable of terms whose columns of the Jacobian (n, K) are linearly dependent."""
    index = np.flatnonzero(np.isfinite(fit.theta))
    columns = elasticities(design, fit.theta)[:, index]
    _, singular, right = np.linalg.svd(columns / np.linalg.norm(columns, axis=0), full_matrices=True)
    if len(singular) == len(index) and singular[-1] > COLLINEAR * singular[0]:
        return None
    confused = [TERMS[i] for i in index[np.abs(right[-1]) > 0.1]]
    droppable = [term for term in expendable if term in confused]
    if len(confused) < 2 or not droppable:
        return None
    others = ", ".join(PARAMETERS[term] for term in confused if term != droppable[0])
    note = f"{PARAMETERS[droppable[0]]} is not told apart from {others}, which stand for it"
    return TERMS.index(droppable[0]), note


def _fit(design: Design, sizes: Array, quantity: str, config: Mapping[str, Any]) -> _Fit:
    """The better of the fits without and with a cache, where the device is known to have one: by the Bayesian
    information criterion, of Laplace errors."""
    plain = _fit_terms(design, sizes, quantity, config, cached=False)
    if not design.has_cache:
        return plain
    cached = _fit_terms(design, sizes, quantity, config, cached=True)
    n, extra = len(design.log_time), np.isfinite(cached.solution.theta).sum() - np.isfinite(plain.solution.theta).sum()
    gain = n * np.log(plain.solution.objective / max(cached.solution.objective, NO_ERROR))
    if np.isfinite(cached.solution.theta[CACHE]) and gain > max(extra, 1) * np.log(n):
        return cached
    return plain


def _fit_terms(design: Design, sizes: Array, quantity: str, config: Mapping[str, Any], cached: bool) -> _Fit:
    """Fit; then drop, one at a time and saying so, the terms that the measurements do not identify."""
    expendable, delta = EXPENDABLE[counted_as(quantity)], float(config["huber_delta"])
    active, notes = _by_design(design, expendable, cached)
    starts = None
    while True:
        solution = solve(design, active, delta, starts=starts)
        dropped = (
            _hidden(solution, design, delta)
            or _weakest(solution, design, sizes, delta)
            or _not_told_apart(solution, design, expendable)
        )
        if dropped is None or dropped[0] == CACHE:
            break
        active[dropped[0]] = False
        notes.append(dropped[1])
        starts = solution.finalists
    peaks = np.flatnonzero(design.at_peak(solution.theta))
    notes += [f"{PARAMETERS[TERMS[k]]} is the device's peak" for k in peaks]
    return _Fit(design, solution, design.costs(solution.theta), notes)


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
    resampled = solve(fit.design, active, float(config["huber_delta"]), good, starts=fit.solution.theta[None])
    samples = fit.design.costs(resampled.theta)  # (R, K)
    ends: dict[str, float] = {}
    for index in np.flatnonzero(active):
        lo, hi = percentile_interval(samples[:, index], float(config["confidence"]))
        name = PARAMETERS[TERMS[index]]
        if TERMS[index] in RATES:
            lower_cost = lo if lo > FLOOR / fit.design.scale[index] else 0.0
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
        fit = _fit(design.subset(~out), sizes[~out], quantity, config)
        predicted[out] = design.predict_costs(fit.costs)[out]
    missing = int(np.isnan(predicted).sum())
    return predicted, [f"{missing} measurements not predicted: too few left without their size"] if missing else []


def _fit_group(
    rows: pd.DataFrame, quantity: str, stream: tuple[str, ...], config: Mapping[str, Any], device: pd.DataFrame | None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """One row of ``runtime_model`` (without its keys) and the predictions of its measurements."""
    empty = pd.DataFrame(columns=list(PREDICTION_COLUMNS))
    if len(rows) < int(config["min_measurements"]):
        detail = f"{len(rows)} usable measurements, {config['min_measurements']} are needed"
        return {"num_measurements": len(rows), "status": "too_few_measurements", "detail": detail}, empty
    measured, sizes = (rows[name].to_numpy(dtype=np.float64) for name in (f"{quantity}_s", "num_params"))
    kind = counted_as(quantity)
    counts = {name: rows[f"{kind}_{name}"].to_numpy(dtype=np.float64) for name in (*COUNTS, "flops", "bytes")}
    terms = term_counts(counts, rows["num_blocks"].to_numpy(), rows["batch_size"].to_numpy())
    limits = device_limits(str(config.get("datasheet") or rows["device"].iloc[0]), str(rows["dtype"].iloc[0]), device)
    design = Design.of(terms, measured, float(config["norm_p"]), peak_rates(limits), limits.get("cache_bytes"))
    fit = _fit(design, sizes, quantity, config)
    fitted = design.predict_costs(fit.costs)
    unseen, notes = _held_out(design, measured, sizes, quantity, config)
    ends = _intervals(fit, sizes, stream, config)
    seen = np.isfinite(unseen)
    row = {"norm_p": design.norm_p, **constants(fit.costs), **ends, "mape_fit": _mape(measured, fitted)}
    row |= {"mape_held_out": _mape(measured[seen], unseen[seen]), "mape_noise": noise(rows, quantity)}
    row["num_measurements"] = len(rows)
    row |= {f"{name}_{end}": getattr(rows[name], end)() for name in RANGES for end in ("min", "max")}
    row |= {"status": "ok", "detail": "; ".join(fit.notes + notes)}
    base = rows[list(KEYS)].assign(quantity=quantity, measured_s=measured, flops=counts["flops"], bytes=counts["bytes"])
    parts = [base.assign(predicted_s=fitted, held_out=False), base.assign(predicted_s=unseen, held_out=True)[seen]]
    return row, pd.concat([part for part in parts if len(part)])[list(PREDICTION_COLUMNS)]


def fit_runtime_models(
    measurements: pd.DataFrame, config: Mapping[str, Any], device: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit one runtime model for each architecture, device and quantity, over all its sizes, batches and prefills.

    Minimises the sum of Huber_δ(ln t̂ − ln t) over positive constants from many starts. A term that the measurements do
    not identify leaves the fit, with the reason in ``detail``: a rate is then NaN (it never binds), an overhead 0.
    Intervals come from resampling the measurements within each size; they hold the sizes fixed and the model for true.
    ``mape_held_out`` is the mean absolute relative error on each size by a fit that did not see that size.

    Args:
        measurements: the table ``measurements`` with the columns of ``inference.counts.add_counts``; times in s.
        config: ``norm_p``, ``huber_delta``, ``min_measurements``, ``num_resamples``, ``confidence``, ``seed``
            (conf/inference, ``runtime_model``); ``datasheet``: the name of the device whose peaks no rate exceeds
            (``accounting.hardware``), if it is not in the name of the measured device.
        device: the table ``device``: what a probe of the measured device reached (`device_limits`); None: nothing is
            known but by a data sheet.

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
    for (arch, name), group in measurements.groupby(["arch", "device"], sort=True):
        settings = group[list(SETTINGS)].drop_duplicates()
        if len(settings) > 1:
            found = "; ".join(
                f"{row.dtype}, {row.num_threads} threads, logits of {row.prefill_logits}"
                for row in settings.itertuples()
            )
            raise FitError(f"measurements of {arch} on {name} mix settings ({found}): fit them apart")
        for quantity in QUANTITIES:
            if quantity == "ttft_raw" and not has_second_version(group):
                continue
            rows = usable_rows(group, quantity)
            usable += len(rows)
            row, predicted = _fit_group(rows, quantity, (str(arch), str(name), quantity), config, device)
            keys = {"arch": arch, "quantity": quantity, "device": name}
            keys |= {column: settings.iloc[0][column] for column in ("dtype", "prefill_logits")}
            models.append(keys | row)
            predictions.append(predicted)
    if not usable:
        hint = (
            "; raise inference.max_cell_s, or call again on a quieter machine"
            if (measurements["status"] == "skipped").any()
            else ""
        )
        raise FitError(f"no usable measurement: {reasons(measurements)}{hint}")
    return model_table(models), prediction_table(predictions)
