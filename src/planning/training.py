"""Time and memory of the training run, on devices that are named or on the machine of the study."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.accounting.hardware import ASSUMED_UTILISATION, Device
from xlstm_scaling.accounting.memory import HEADROOM, plan_memory

#: tokens of a training step where the study's runs say nothing (the paper's batches: 512 x 2,048 … 64 x 16,384)
BATCH_TOKENS = 2**20


@dataclass(frozen=True)
class TrainingSetup:
    """``count`` devices of a data sheet, or of the study's machine (``sheet`` None); ``utilisation`` of the peak."""

    sheet: Device | None = None
    count: int = 1
    utilisation: float | None = None
    batch_tokens: int | None = None


def training_answer(
    shape: ModelShape, context_length: int, flops: float, setup: TrainingSetup, runs: pd.DataFrame | None
) -> dict[str, Any]:
    """Time [s] and memory [B] of a device; ``time_s`` is None where no speed is known, ``detail`` says why."""
    rate, source = _rate(shape.arch, setup, runs)
    time_s = None if rate is None else flops / (rate * setup.count)
    answer: dict[str, Any] = {
        "device": setup.sheet.name if setup.sheet else "the study's machine" if rate else None,
        "count": setup.count,
        "utilisation": rate / setup.sheet.bf16_flops_per_s if rate and setup.sheet else None,
        "flops_per_s": rate,
        "speed": source,
        "time_s": time_s,
        "device_hours": None if time_s is None else time_s * setup.count / 3600,
    }
    return answer | {"memory": _memory(shape, context_length, flops, setup, runs)}


def _rate(arch: str, setup: TrainingSetup, runs: pd.DataFrame | None) -> tuple[float | None, str]:
    """FLOP/s of one device, and where they come from."""
    if setup.sheet is not None:
        peak = setup.sheet.bf16_flops_per_s
        if setup.utilisation is not None:
            return setup.utilisation * peak, f"{setup.utilisation:.0%} of the data sheet's bf16 peak, as given"
        measured = _median(runs, arch, "mfu")
        if measured is not None:
            return measured * peak, f"{measured:.0%} of the bf16 peak, the utilisation of the study's own runs"
        text = f"{ASSUMED_UTILISATION:.0%} of the data sheet's bf16 peak, assumed: --utilisation sets it"
        return ASSUMED_UTILISATION * peak, text
    if runs is not None and "train_time_s" in runs:
        timed = runs.assign(rate=runs["num_flops"] / runs["train_time_s"])
        measured = _median(timed, arch, "rate")
        if measured is not None:
            return measured, "median FLOP/s of the study's largest runs, as measured"
    return None, "unknown: --device names a data sheet"


def _median(runs: pd.DataFrame | None, arch: str, column: str) -> float | None:
    """Median over the quarter of the architecture's runs with most FLOPs."""
    if runs is None or column not in runs:
        return None
    mine = runs[(runs["arch"] == arch) & (runs["status"] == "ok") & runs[column].notna()]
    if mine.empty:
        return None
    value = float(mine[mine["num_flops"] >= mine["num_flops"].quantile(0.75)][column].astype(float).median())
    return value if np.isfinite(value) and value > 0 else None


def batch_sequences(
    arch: str, context_length: int, flops: float, setup: TrainingSetup, runs: pd.DataFrame | None
) -> int:
    """Sequences of a training step: ``batch_tokens``, or those of the study's ten runs nearest in FLOPs."""
    tokens: float = setup.batch_tokens or BATCH_TOKENS
    names = {"global_batch_size_sequences", "context_length", "num_flops"}
    if setup.batch_tokens is None and runs is not None and names <= set(runs.columns):
        mine = runs[(runs["arch"] == arch) & runs["global_batch_size_sequences"].notna() & runs["num_flops"].notna()]
        if len(mine):
            order = (np.log(mine["num_flops"].astype(float)) - np.log(flops)).abs().sort_values().index[:10]
            near = mine.loc[order]
            tokens = float((near["global_batch_size_sequences"].astype(float) * near["context_length"]).median())
    return max(1, round(tokens / context_length))


def _memory(
    shape: ModelShape, context_length: int, flops: float, setup: TrainingSetup, runs: pd.DataFrame | None
) -> dict[str, Any]:
    """Bytes of one device in training by `accounting.memory`, parameters sharded over all devices."""
    sequences = max(setup.count, batch_sequences(shape.arch, context_length, flops, setup, runs))
    answer: dict[str, Any] = {"batch_sequences": sequences, "device_bytes": None, "layout": None}
    if setup.sheet is None or not np.isfinite(setup.sheet.memory_bytes):
        return answer | {"limit_bytes": None, "detail": "the memory of the device is not known"}
    answer["limit_bytes"] = HEADROOM * setup.sheet.memory_bytes
    try:
        plan = plan_memory(shape, context_length, sequences, setup.count, setup.sheet.memory_bytes)
    except ValueError as error:
        return answer | {"detail": str(error)}
    chosen = plan.chosen
    return answer | {"device_bytes": chosen.total, "layout": asdict(chosen.layout), "detail": ""}
