"""Answers to claims about over-training: slopes of the loss in FLOPs at fixed token/param ratios."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from xlstm_scaling.fitting.overtraining import weighted_slopes
from xlstm_scaling.fitting.resampling import bootstrap_counts

from .evidence import BASE_CONTEXT, Evidence, answer, fitted_row
from .ledger import Answer, NotAnswerable

Array = NDArray[np.float64]


@answer
def overtraining_slope(evidence: Evidence, arch: str, ratio: float) -> Answer:
    """Minus the slope of ln loss against ln FLOPs at a fixed token/param ratio."""
    row = fitted_row(evidence.overtraining(), "a slope", arch=arch, context_length=BASE_CONTEXT, ratio_tag=ratio)
    return Answer(-float(row["slope"]), -row["slope_hi"], -row["slope_lo"], int(row["num_runs"]))


def _ratio_cell(evidence: Evidence, arch: str, ratio: float) -> tuple[Array, Array]:
    runs = evidence.chosen(arch, BASE_CONTEXT, "tokenparam")
    runs = runs[runs["ratio_tag"] == ratio]
    if len(runs) < 3:
        raise NotAnswerable(f"three runs of {arch} with {ratio:g} tokens a parameter; there are {len(runs)}")
    return tuple(np.log(runs[name].to_numpy(dtype=np.float64)) for name in ("num_flops", "val_loss"))


@answer
def overtraining_slope_variance(evidence: Evidence, arch: str, ratio: float) -> Answer:
    """Variance of a slope by least squares: s^2 / sum (x - mean x)^2; `right` is its root, the standard error."""
    x, y = _ratio_cell(evidence, arch, ratio)
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    residual = y - y.mean() - slope * centred
    variance = float(residual @ residual / (len(x) - 2) / (centred @ centred))
    note = f"The standard error is {math.sqrt(variance):.2e}, {1 / math.sqrt(variance):.0f} times what is printed."
    return Answer(variance, n_runs=len(x), note=note, right=math.sqrt(variance))


@answer
def slope_difference(evidence: Evidence, arch: str, ratio: float, other: float) -> Answer:
    """Slope at one token/param ratio minus the slope at another; runs resampled within each ratio."""
    values, samples, number = [], [], 0
    for tag in (ratio, other):
        x, y = _ratio_cell(evidence, arch, tag)
        generator = evidence.generator("overtraining", arch, BASE_CONTEXT, tag)
        counts = bootstrap_counts(len(x), evidence.num_resamples, generator)
        values.append(weighted_slopes(x, y, np.ones((1, len(x))))[0])
        samples.append(weighted_slopes(x, y, counts))
        number += len(x)
    return Answer(float(values[0] - values[1]), *evidence.interval(samples[0] - samples[1]), number)
