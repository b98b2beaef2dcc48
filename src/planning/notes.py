"""What a reader of an answer has to know besides its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xlstm_scaling.planning.laws import Laws
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.runtime import Runtime


def notes_of(asked: Question, laws: Laws, runtime: Runtime | None, answers: Mapping[str, Any]) -> list[str]:
    """Sentences on contexts between or beyond those measured, on forecasts, and on limits that are barely kept."""
    notes = list(laws.notes)
    if asked.load.prefill_length > asked.context_length:
        notes.append("prompts are longer than the training context: the law says nothing of the loss there")
    for arch, law in laws.archs.items():
        low, high = law.ranges["context_length"]
        if not low <= asked.context_length <= high:
            nearest = low if asked.context_length < low else high
            notes.append(
                f"{arch}: no law at context {asked.context_length:,}; the factor of context {nearest:,g} is used"
            )
        elif asked.context_length not in law.surface.contexts:
            notes.append(
                f"{arch}: context {asked.context_length:,} lies between those measured; its factor is interpolated"
            )
        if math.isfinite(law.forecast_error):
            notes.append(forecast_note(arch, law.forecast_error))
    for arch, answer in answers.items():
        notes += _slack(arch, answer, asked, runtime)
    return notes


def forecast_note(name: str, error: float) -> str:
    """A sentence on how far a surface was off on a budget it had not seen; ``error``: mean relative error of losses."""
    return (
        f"{name}: fitted without its largest budget, such a surface missed the losses there by {error:.1%} in the "
        "mean; intervals hold the form of the law for true"
    )


def _slack(arch: str, answer: Mapping[str, Any], asked: Question, runtime: Runtime | None) -> list[str]:
    """A limit that is kept by less than the runtime model's own error."""
    if runtime is None or not answer["choice"]:
        return []
    notes = []
    for name, quantity in (("ttft_s", "ttft"), ("step_time_s", "step_time")):
        error = runtime.errors.get((arch, quantity), float("nan"))
        if name in asked.limits and answer["choice"][name] * (1 + error) > asked.limits[name]:
            text = f"{arch}: the predicted {name} keeps its limit by less than the runtime model's error of {error:.0%}"
            notes.append(text)
    return notes
