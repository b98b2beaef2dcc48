"""The answer to a question: for each architecture the best model, what it costs, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlstm_scaling.accounting import ARCHITECTURES, dtype_bytes
from xlstm_scaling.accounting.hardware import find_device
from xlstm_scaling.accounting.memory import HEADROOM
from xlstm_scaling.accounting.serving import serving_memory
from xlstm_scaling.planning.choose import (
    Candidates,
    Choice,
    choose,
    equal_loss,
    interval,
    law_optimum,
    probability_less,
    resampled,
    shared_loss_target,
    smallest_budget,
)
from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.laws import ArchLaw, Laws
from xlstm_scaling.planning.notes import notes_of
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.runtime import Runtime
from xlstm_scaling.planning.shapes import buildable_shapes, family_of_runs
from xlstm_scaling.planning.training import TrainingSetup, training_answer
from xlstm_scaling.study.files import finite

Array = NDArray[np.float64]
#: sizes that are searched: from the least fitted over this, to the largest fitted times that, and no further
SIZE_MARGINS = (10.0, 1000.0)
LARGEST_SIZE = 1e12
EXIT_INFEASIBLE = 3


def candidates_of(
    law: ArchLaw, laws: Laws, question: Question, runtime: Runtime | None, vocab_size: int | None = None
) -> Candidates:
    """Every shape of the architecture that is searched."""
    low, high = law.ranges["num_params"]
    low, high = low / SIZE_MARGINS[0], min(high * SIZE_MARGINS[1], LARGEST_SIZE)
    if question.num_params is not None:
        low, high = min(low, question.num_params / 2), max(high, question.num_params * 2)
    shapes = buildable_shapes(family_of_runs(law.arch, laws.runs, vocab_size), low, high)
    return Candidates.of(shapes, question.context_length, question.load, runtime)


def countable(laws: Laws) -> Laws:
    """The laws of architectures whose parameters and FLOPs `accounting` can count; a note names the others."""
    left_out = [arch for arch in laws.archs if arch not in ARCHITECTURES]
    if not left_out:
        return laws
    if len(left_out) == len(laws.archs):
        raise PlanningError(f"{', '.join(left_out)} cannot be counted; known: {', '.join(ARCHITECTURES)}")
    note = f"left out, as accounting cannot count it: {', '.join(left_out)}"
    kept = {arch: law for arch, law in laws.archs.items() if arch not in left_out}
    return replace(laws, archs=kept, notes=(*laws.notes, note))


def with_memory_limit(question: Question, runtime: Runtime | None) -> Question:
    """Where times are limited, the model must also fit the device that they are for, if its memory is known."""
    timed = question.max_ttft_s is not None or question.max_step_time_s is not None
    if not timed or question.max_serving_bytes is not None or runtime is None:
        return question
    sheet = find_device(runtime.device)
    if sheet is None or not math.isfinite(sheet.memory_bytes):
        return question
    return replace(question, max_serving_bytes=HEADROOM * sheet.memory_bytes)


def recommend(
    question: Question,
    laws: Laws,
    runtime: Runtime | None = None,
    setup: TrainingSetup | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Answer a question as one mapping (docs/choosing.md lists its keys); numbers that do not exist are None.

    Raises PlanningError: the laws or the runtime model cannot answer this question at all.
    """
    laws, asked, question = countable(laws), question, with_memory_limit(question, runtime)
    pools = {arch: candidates_of(law, laws, question, runtime, vocab_size) for arch, law in laws.archs.items()}
    questions, target = _questions(question, laws, pools)
    choices = {arch: choose(questions[arch], laws.archs[arch], pools[arch]) for arch in pools}
    answers = {
        arch: _answer(asked, questions[arch], laws.archs[arch], choice, laws, runtime, setup or TrainingSetup())
        for arch, choice in choices.items()
    }
    possible = {arch: choice for arch, choice in choices.items() if choice.best is not None}
    ranked = sorted(possible, key=lambda arch: possible[arch].value)
    comparable = not asked.by_size_alone
    result = {
        "question": asdict(asked),
        "objective": asked.objective,
        "status": "feasible" if possible else "infeasible",
        "best": ranked[0] if ranked and comparable else None,
        "architectures": answers,
        "comparison": _comparison(ranked, questions, laws, choices) if comparable and len(ranked) > 1 else None,
        "limits": _limits(asked, question.limits, questions, laws, pools, choices),
        "target": target,
        "sources": {
            "laws": laws.source,
            "runtime": None if runtime is None else runtime.about,
            "runtime_assumed": None if runtime is None else runtime.assumed,
            "confidence": laws.confidence,
        },
        "notes": notes_of(asked, laws, runtime, answers),
    }
    return finite(result)


def _questions(
    question: Question, laws: Laws, pools: Mapping[str, Candidates]
) -> tuple[dict[str, Question], dict[str, float | None] | None]:
    """The question that each architecture is asked, and the loss that is to be reached, if there is one."""
    if question.by_size_alone:
        return {arch: _budget_of_size(question, law) for arch, law in laws.archs.items()}, None
    if question.flops is not None and question.tokens_served:
        training = replace(question, tokens_served=0.0)
        choices = {arch: choose(training, laws.archs[arch], pools[arch]) for arch in pools}
        target = shared_loss_target(choices)
        if target is not None:
            bought = {"loss": target, "loss_without_limits": shared_loss_target(choices, limited=False)}
            return dict.fromkeys(pools, equal_loss(question, target)), bought
        return dict.fromkeys(pools, training), None  # no model keeps the limits: the answer says which
    return dict.fromkeys(pools, question), None if question.loss is None else {"loss": question.loss}


def _budget_of_size(question: Question, law: ArchLaw) -> Question:
    """The same question at the budget that N, or D, is optimal for by the power laws."""
    variable = "num_params" if question.num_params is not None else "num_tokens"
    lines, _ = law.optimum(variable, question.context_length)
    if lines is None:
        raise PlanningError(
            f"no power law of {variable} of {law.arch}: give --flops, or both --num-params and --num-tokens"
        )
    wanted = getattr(question, variable)
    return replace(question, flops=float(10 ** ((math.log10(wanted) - lines[0, 0]) / lines[0, 1])))


def _answer(
    asked: Question,
    question: Question,
    law: ArchLaw,
    choice: Choice,
    laws: Laws,
    runtime: Runtime | None,
    setup: TrainingSetup,
) -> dict[str, Any]:
    """One architecture's part of the answer; ``question`` is what ``asked`` means for it."""
    answer: dict[str, Any] = {"status": "ok", "detail": "", "law": f"{law.subset}, {law.form}, T0 = {law.base_context}"}
    optimum = law_optimum(question, law, choice.candidates)
    answer["optimum"] = {name: _interval(values, laws.confidence) for name, values in optimum.items()}
    flops = asked.flops or question.flops
    if flops is None and not asked.tokens_served:  # of a loss, or a model: what training costs
        flops = float(optimum["training_flops"][0])
    answer["isoflop_optimum"] = _isoflop_optimum(law, question.context_length, flops, laws.confidence)
    answer |= dict.fromkeys(("choice", "without_limits", "infeasible", "cost_of_limits"))
    if choice.free is None:
        return answer | {"status": "impossible"} | _impossible(question, law, choice)
    answer["without_limits"] = _model(question, law, choice, choice.free, laws, runtime)
    if choice.best is None:
        return answer | {"status": "infeasible", "infeasible": _infeasible(question, choice)}
    model = _model(question, law, choice, choice.best, laws, runtime)
    shape = choice.candidates.shapes[choice.best]
    training = float(choice.allocation.training_flops[0, choice.best])
    model["training"] = training_answer(shape, question.context_length, training, setup, laws.runs)
    model["extrapolation"] = _extrapolation(question, law, choice, runtime)
    return answer | {"choice": model, "cost_of_limits": _cost(question, law, choice)}


def _model(
    question: Question, law: ArchLaw, choice: Choice, index: int, laws: Laws, runtime: Runtime | None
) -> dict[str, Any]:
    """A shape with its tokens, loss, FLOPs, times and memory."""
    pool, spent = choice.candidates, choice.allocation
    shape, load = pool.shapes[index], question.load
    again = resampled(question, law, pool, index)
    N, D = float(pool.num_params[index]), float(spent.num_tokens[0, index])
    at = (np.array([N]), np.array([D]), question.context_length)
    others = [float(other.predict(*at)[0, 0]) for other in law.alternatives.values()]
    width = dtype_bytes("bfloat16" if runtime is None else runtime.dtype)
    memory = serving_memory(shape, load.prefill_length, load.generate_length, load.batch_size, width, width)

    def value(name: str) -> dict[str, float]:
        return _interval(
            np.concatenate([[getattr(spent, name)[0, index]], getattr(again, name)[:, 0]]), laws.confidence
        )

    return {
        "shape": shape.as_dict(),
        "num_params": N,
        "num_tokens": value("num_tokens"),
        "tokens_per_param": D / N,
        "loss": value("loss"),
        "loss_other_forms": [min(others), max(others)] if others else None,
        "training_flops": value("training_flops"),
        "serving_flops": float(spent.serving_flops[0, index]),
        "total_flops": value("total_flops"),
        "ttft_s": float(pool.quantities["ttft_s"][index]),
        "step_time_s": float(pool.quantities["step_time_s"][index]),
        "serving_memory_bytes": {**memory, "total": sum(memory.values())},
    }


def _interval(values: Array, confidence: float) -> dict[str, float]:
    """The first is the fit's, the others those of resamples."""
    low, high = interval(values[1:], confidence)
    return {"value": float(values[0]), "lo": low, "hi": high}


def _isoflop_optimum(
    law: ArchLaw, context_length: int, flops: float | None, confidence: float
) -> dict[str, Any] | None:
    """N*, D* and L* of a training budget by the power laws of the IsoFLOP minima (approach 2)."""
    if flops is None or not math.isfinite(flops):
        return None
    found: dict[str, Any] = {"flops": flops}
    for variable in ("num_params", "num_tokens", "loss"):
        lines, how = law.optimum(variable, context_length)
        if lines is not None:
            found[variable] = _interval(10 ** (lines[:, 0] + lines[:, 1] * math.log10(flops)), confidence)
            found["context"] = how
    return found if len(found) > 1 else None


def _infeasible(question: Question, choice: Choice) -> dict[str, Any]:
    """Which limits rule all models out, and the nearest values at which one is left."""

    pool = choice.candidates

    def about(found: tuple[float, int] | None) -> dict[str, Any]:
        if found is None or not math.isfinite(found[0]):
            return {"num_params": None, "shape": None}
        return {"num_params": float(pool.num_params[found[1]]), "shape": pool.shapes[found[1]].as_dict()}

    nearest = {
        name: {"limit": question.limits[name], "needed": found[0], **about(found)}
        for name, found in (choice.nearest or {}).items()
    }
    jointly = about(choice.jointly)
    if choice.jointly is not None:
        factor, index = choice.jointly
        values = {name: float(pool.quantities[name][index]) for name in question.limits}
        jointly |= {"factor": factor, "values": values}
    return {"binding": list(choice.binding), "nearest": nearest, "jointly": jointly}


def _impossible(question: Question, law: ArchLaw, choice: Choice) -> dict[str, Any]:
    """Why no model answers the question even without limits, and what the nearest that can be asked is."""
    pool, T = choice.candidates, question.context_length
    if question.loss is not None:
        limit = float(np.min(law.surface.floor(pool.num_params, T)))
        if question.num_tokens is not None:
            limit = float(
                np.min(law.surface.predict(pool.num_params, np.full(len(pool.num_params), question.num_tokens), T))
            )
        text = f"no {law.arch} reaches {question.loss:g} nat/token; the least loss of the sizes searched is {limit:.4g}"
        return {"detail": text, "infeasible": {"binding": ["loss"], "nearest": {"loss": {"needed": limit}}}}
    budget = "flops" if question.flops is not None else "total_flops"
    tokens = question.num_tokens or 1.0
    needed = float(np.min(pool.train * tokens + question.tokens_served * pool.serve))
    text = f"even the cheapest {law.arch} needs {needed:.4g} FLOPs"
    return {"detail": text, "infeasible": {"binding": [budget], "nearest": {budget: {"needed": needed}}}}


def _extrapolation(question: Question, law: ArchLaw, choice: Choice, runtime: Runtime | None) -> list[dict[str, Any]]:
    """What lies outside of what the laws and the runtime model have seen, and by which factor."""
    index = choice.best
    N, D = float(choice.candidates.num_params[index]), float(choice.allocation.num_tokens[0, index])
    values = {"num_params": N, "num_tokens": D, "tokens_per_param": D / N, "context_length": question.context_length}
    values["num_flops"] = float(choice.allocation.training_flops[0, index])
    found = [_outside("law", name, values[name], seen) for name, seen in law.ranges.items()]
    if runtime is not None:
        load = {"num_params": N, "batch_size": question.batch_size, "prefill_length": question.load.prefill_length}
        found += [_outside("runtime", name, load[name], seen) for name, seen in runtime.ranges.items()]
    return [entry for entry in found if entry is not None]


def _outside(what: str, name: str, value: float, seen: tuple[float, float]) -> dict[str, Any] | None:
    factor = value / seen[1] if value > seen[1] else seen[0] / value if value < seen[0] else 1.0
    if factor <= 1.0 + 1e-9:
        return None
    side = "above" if value > seen[1] else "below"
    return {"of": what, "quantity": name, "value": value, "seen": list(seen), "side": side, "factor": factor}


def _cost(question: Question, law: ArchLaw, choice: Choice) -> dict[str, Any] | None:
    """What the limits cost this architecture: loss, and how many times the FLOPs that would do without them."""
    if not question.limits:
        return None
    spent = choice.allocation
    loss, least = (float(spent.loss[0, index]) for index in (choice.best, choice.free))
    enough = smallest_budget(question, law, choice.candidates, loss)
    ratio = float(spent.total_flops[0, choice.best]) / enough
    return {"binding": list(choice.binding), "loss": loss - least, "flops_ratio": ratio, "flops_enough": enough}


def _comparison(
    ranked: list[str], questions: Mapping[str, Question], laws: Laws, choices: Mapping[str, Choice]
) -> dict[str, Any]:
    """How sure it is that the best architecture is the best: over paired resamples of the chosen shapes."""
    values = {}
    for arch in ranked:
        law, choice = laws.archs[arch], choices[arch]
        drawn = resampled(questions[arch], law, choice.candidates, choice.best).value[:, 0]
        known = np.isfinite(law.surface.params[1:]).all(axis=1)
        values[arch] = np.where(known, drawn, np.nan)
    first, second = ranked[:2]
    share, pairs = probability_less(values[first], [values[arch] for arch in ranked[1:]])
    by_flops = questions[first].loss is not None
    length = min(len(values[first]), len(values[second]))
    a, b = values[first][:length], values[second][:length]
    point = choices[second].value, choices[first].value
    with np.errstate(invalid="ignore"):  # neither reaches the loss: no ratio
        gap = b / a if by_flops else b - a
    low, high = interval(gap, laws.confidence)
    return {
        "of": "total_flops" if by_flops else "loss",
        "second": second,
        "probability_best": share,
        "paired_resamples": pairs,
        "advantage": {"value": point[0] / point[1] if by_flops else point[0] - point[1], "lo": low, "hi": high},
    }


def _limits(
    asked: Question,
    limits: Mapping[str, float],
    questions: Mapping[str, Question],
    laws: Laws,
    pools: Mapping[str, Candidates],
    choices: Mapping[str, Choice],
) -> dict[str, Any] | None:
    """The limits, which of them were implied, and what they cost when the architecture may be changed too."""
    if not limits:
        return None
    implied = [name for name in limits if name not in asked.limits]
    result: dict[str, Any] = {"limits": limits, "implied": implied, "cost": None}
    kept = {arch: choice for arch, choice in choices.items() if choice.best is not None}
    free = {arch: choice for arch, choice in choices.items() if choice.free is not None}
    if not kept or asked.by_size_alone:
        return result
    best = min(kept, key=lambda arch: kept[arch].value)
    without = min(free, key=lambda arch: float(free[arch].allocation.value[0, free[arch].free]))
    mine, other = choices[best], choices[without]
    loss = float(mine.allocation.loss[0, mine.best])
    enough = min(smallest_budget(questions[a], laws.archs[a], pools[a], loss) for a in free)
    ratio = float(mine.allocation.total_flops[0, mine.best]) / enough
    excess = loss - float(other.allocation.loss[0, other.free])
    return result | {"cost": {"best_without": without, "loss": excess, "flops_ratio": ratio}}
