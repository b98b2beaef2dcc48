"""Answers to claims about the Pareto frontier of loss against FLOPs, and about FLOPs for equal loss."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from xlstm_scaling.fitting.pareto import flops_at_loss, frontier_mask, resampled_flops_at_loss

from .evidence import BASE_CONTEXT, Evidence, answer, shared
from .ledger import Answer, NotAnswerable

Array = NDArray[np.float64]


@answer
def pareto_loss(evidence: Evidence, arch: str, flops: float) -> Answer:
    """Loss on the Pareto frontier of the token/param runs at the run whose FLOPs are nearest to `flops`."""
    runs = evidence.chosen(arch, BASE_CONTEXT, "tokenparam")
    x, y = (runs[name].to_numpy(dtype=np.float64) for name in ("num_flops", "val_loss"))
    on = frontier_mask(x, y)
    nearest = int(np.abs(np.log(x[on] / flops)).argmin())
    found = float(x[on][nearest])
    if abs(math.log(found / flops)) > 1e-3:
        raise NotAnswerable(f"a run of {flops:.4g} FLOPs on the frontier of {arch}")
    return Answer(float(y[on][nearest]), n_runs=len(runs), note=f"{found:.6g} FLOPs, {on.sum()} runs on the frontier.")


@answer
def flop_ratio(evidence: Evidence, context: int, loss: float) -> Answer:
    """FLOPs that the Transformer needs over those that xLSTM needs for a loss, at one context; runs counted once."""
    value, samples, number = _flop_ratio(evidence, context, loss)
    return Answer(value, *evidence.interval(samples), number)


@answer
def flop_ratio_growth(evidence: Evidence, context: int, other: int, loss: float) -> Answer:
    """`flop_ratio` at one context over that at another."""
    value, samples, number = _flop_ratio(evidence, context, loss)
    base, base_samples, base_number = _flop_ratio(evidence, other, loss)
    return Answer(value / base, *evidence.interval(samples / base_samples), number + base_number)


@shared
def _flop_ratio(evidence: Evidence, context: int, loss: float) -> tuple[float, Array, int]:
    """The ratio, its resamples (runs drawn within budgets and token/param ratios) and the number of runs."""
    needed: dict[str, Array] = {}
    number, target = 0, np.array([loss])
    for arch in ("transformer", "xlstm"):
        runs = evidence.chosen(arch, context)
        x, y = (runs[name].to_numpy(dtype=np.float64) for name in ("num_flops", "val_loss"))
        samples = resampled_flops_at_loss(runs, target, evidence.config, context, arch)
        needed[arch] = np.concatenate([flops_at_loss(x, y, target), samples[:, 0]])
        number += len(runs)
    ratio = needed["transformer"] / needed["xlstm"]
    if not math.isfinite(ratio[0]):
        raise NotAnswerable(f"runs of both architectures that reach a loss of {loss:g} at context {context}")
    return float(ratio[0]), ratio[1:], number
