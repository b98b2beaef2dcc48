"""The search: of all shapes that can be built, the best for a question, with and without its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xlstm_scaling.accounting import ModelShape, count_flops, count_params, dtype_bytes
from xlstm_scaling.accounting.serving import served_token_flops, serving_memory
from xlstm_scaling.fitting.resampling import MIN_SURVIVING_SHARE, percentile_interval
from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.laws import ArchLaw
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.runtime import Load, Runtime

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
#: width of the kernel that smooths FLOPs a token over ln N
SMOOTHING = 0.3


@dataclass(frozen=True)
class Candidates:
    """K shapes of one architecture, and what a model of each costs; without shapes, sizes of which only that is known.

    ``train``: training FLOPs a token at the context, convention `paper`; ``serve``: inference FLOPs a served token.
    ``quantities``: what limits may bound, by name; NaN where no runtime model is at hand.
    """

    shapes: Sequence[ModelShape]
    num_params: Array
    train: Array
    serve: Array
    quantities: Mapping[str, Array]

    @classmethod
    def of(
        cls, shapes: Sequence[ModelShape], context_length: int, load: Load, runtime: Runtime | None = None
    ) -> Candidates:
        """Count and time the shapes, which are of one architecture."""
        unknown = np.full(len(shapes), np.nan)
        ttft, step = (unknown, unknown) if runtime is None else runtime.times(shapes, load)
        width = dtype_bytes("bfloat16" if runtime is None else runtime.dtype)
        request = (load.prefill_length, load.generate_length)
        memory = [sum(serving_memory(s, *request, load.batch_size, width, width).values()) for s in shapes]
        return cls(
            shapes=list(shapes),
            num_params=np.array([count_params(s) for s in shapes], dtype=np.float64),
            train=np.array([count_flops(s, context_length).forward_backward / context_length for s in shapes]),
            serve=np.array([served_token_flops(s, *request) for s in shapes]),
            quantities={"ttft_s": ttft, "step_time_s": step, "serving_bytes": np.array(memory)},
        )

    def take(self, index: Sequence[int] | Mask | NDArray[np.int64]) -> Candidates:
        """Some of them."""
        chosen = np.arange(len(self.num_params))[np.asarray(index)]
        quantities = {name: values[chosen] for name, values in self.quantities.items()}
        return Candidates(
            [self.shapes[i] for i in chosen if len(self.shapes)],
            self.num_params[chosen],
            self.train[chosen],
            self.serve[chosen],
            quantities,
        )

    def smooth(self, points: int = 1200) -> Candidates:
        """Models between the shapes: N evenly in its logarithm, FLOPs a token by local lines in ln N through the middle
        depth of every width. They have no shapes and no quantities; the law's own optimum is sought among them."""
        by_width: dict[int, list[int]] = {}
        for i, shape in enumerate(self.shapes):
            by_width.setdefault(shape.embedding_dim, []).append(i)
        ladder = np.array([members[len(members) // 2] for members in by_width.values()])
        if len(ladder) < 5:
            return self
        x = np.log(self.num_params[ladder])
        grid = np.linspace(x.min(), x.max(), points)
        train, serve = (np.exp(_local_lines(x, np.log(costs[ladder]), grid)) for costs in (self.train, self.serve))
        return Candidates([], np.exp(grid), train, serve, {})

    def within(self, limits: Mapping[str, float]) -> Mask:
        """Which shapes keep every limit, (K,)."""
        kept = np.ones(len(self.num_params), dtype=bool)
        for name, limit in limits.items():
            kept &= self.quantities[name] <= limit
        return kept


def _local_lines(x: Array, y: Array, at: Array) -> Array:
    """Local linear regression with Gaussian weights of width `SMOOTHING` (Cleveland & Devlin 1988), at points (m,)."""
    offset = x[None, :] - at[:, None]
    weights = np.exp(-0.5 * (offset / SMOOTHING) ** 2)
    s0, s1, s2 = (np.sum(weights * offset**power, axis=1) for power in range(3))
    t0, t1 = (np.sum(weights * offset**power * y, axis=1) for power in range(2))
    return (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)


@dataclass(frozen=True)
class Allocation:
    """Every candidate with the tokens the question leaves it; arrays (K,), or (rows, K) of resamples.

    ``value`` is what is minimised, inf where the question cannot be answered with that shape.
    """

    num_tokens: Array
    loss: Array
    training_flops: Array
    serving_flops: Array
    value: Array

    @property
    def total_flops(self) -> Array:
        """FLOPs of training and serving together."""
        return self.training_flops + self.serving_flops


def allocate(question: Question, law: ArchLaw, candidates: Candidates, rows: slice = slice(1)) -> Allocation:
    """Tokens, loss and FLOPs of every candidate, (rows, K)."""
    surface, T = law.surface, question.context_length
    N, train = candidates.num_params[None], candidates.train[None]
    serving = np.broadcast_to(question.tokens_served * candidates.serve, train.shape)
    budget = question.flops if question.total_flops is None else question.total_flops - serving
    if question.num_tokens is not None:
        tokens = np.full(N.shape, float(question.num_tokens))
    elif question.loss is not None:
        tokens = surface.tokens_for_loss(N, question.loss, T, rows)
    else:
        assert budget is not None
        tokens = np.broadcast_to(np.maximum(budget, 0.0) / train, N.shape)
    usable = np.isfinite(tokens) & (tokens >= 1)
    loss = np.where(usable, surface.predict(N, np.where(usable, tokens, 1.0), T, rows), np.nan)
    training = train * tokens
    if question.loss is not None:
        usable = usable & ((question.num_tokens is None) | (loss <= question.loss * (1 + 1e-12)))
        value = training + serving
    else:
        usable = usable & (budget is None or training <= budget * (1 + 1e-12))
        value = loss
    value = np.where(usable & np.isfinite(value), value, np.inf)
    shape = np.broadcast_shapes(value.shape, loss.shape)
    return Allocation(*(np.broadcast_to(part, shape) for part in (tokens, loss, training, serving, value)))


def smallest_budget(question: Question, law: ArchLaw, candidates: Candidates, loss: float) -> float:
    """Least FLOPs (total ones, where tokens are served) with which any candidate reaches the loss; inf where none."""
    return float(np.min(allocate(equal_loss(question, loss), law, candidates).value))


@dataclass(frozen=True)
class Choice:
    """One architecture's answer. ``free``: index of the best without limits; ``best``: with them; None where none.

    ``binding``: limits without any one of which the choice would be better (or, without a choice, that rule out all).
    ``nearest``: of an infeasible question, per limit the least value at which it becomes feasible with the others
    kept, and the candidate. ``jointly``: the least factor by which all limits would have to widen, and its candidate.
    """

    candidates: Candidates
    allocation: Allocation
    free: int | None
    best: int | None
    binding: tuple[str, ...] = ()
    nearest: Mapping[str, tuple[float, int]] | None = None
    jointly: tuple[float, int] | None = None

    @property
    def value(self) -> float:
        """What is minimised, of the best candidate; inf where there is none."""
        return float("inf") if self.best is None else float(self.allocation.value[0, self.best])


def choose(question: Question, law: ArchLaw, candidates: Candidates) -> Choice:
    """The best candidate. Raises PlanningError where a limit has no runtime model to be judged by."""
    limits = question.limits
    blind = [name for name in limits if np.isnan(candidates.quantities[name]).all()]
    if blind:
        raise PlanningError(f"a limit of {', '.join(blind)} needs times: give --runtime FOLDER or --device NAME")
    if question.num_params is not None:
        closest = int(np.argmin(np.abs(np.log(candidates.num_params / question.num_params))))
        candidates = candidates.take([closest])
    allocation = allocate(question, law, candidates)
    value = allocation.value[0]
    if not np.isfinite(value).any():
        return Choice(candidates, allocation, None, None)
    free, best = int(np.argmin(value)), _best(value, candidates.within(limits))
    if best is None:
        possible = np.isfinite(value)
        alone = [name for name in limits if not (candidates.within({name: limits[name]}) & possible).any()]
        excess = np.max([candidates.quantities[name] / limit for name, limit in limits.items()], axis=0)
        return Choice(
            candidates, allocation, free, None, tuple(alone or limits),
            {name: _nearest(candidates, name, limits, possible) for name in limits},
            _smallest(excess, possible),
        )  # fmt: skip
    binding = []
    for name in limits:
        others = {other: limit for other, limit in limits.items() if other != name}
        without = _best(value, candidates.within(others))
        if without is not None and value[without] < value[best]:
            binding.append(name)
    if not binding and best != free:
        binding = list(limits)  # only together
    return Choice(candidates, allocation, free, best, tuple(binding))


def _best(value: Array, kept: Mask) -> int | None:
    value = np.where(kept, value, np.inf)
    return int(np.argmin(value)) if np.isfinite(value).any() else None


def _smallest(values: Array, possible: Mask) -> tuple[float, int]:
    values = np.where(possible, values, np.inf)
    index = int(np.argmin(values))
    return float(values[index]), index


def _nearest(candidates: Candidates, name: str, limits: Mapping[str, float], possible: Mask) -> tuple[float, int]:
    """The least value of a quantity among candidates that keep the other limits; inf where none does."""
    others = {other: limit for other, limit in limits.items() if other != name}
    return _smallest(candidates.quantities[name], possible & candidates.within(others))


def shared_loss_target(choices: Mapping[str, Choice], limited: bool = True) -> float | None:
    """The least loss over architectures, with limits or without; None where no architecture has a choice."""
    picked = [(choice, choice.best if limited else choice.free) for choice in choices.values()]
    losses = [float(choice.allocation.loss[0, index]) for choice, index in picked if index is not None]
    return min(losses) if losses else None


def equal_loss(question: Question, loss: float) -> Question:
    """The question that asks for least total FLOPs at this loss."""
    return replace(question, flops=None, total_flops=None, loss=loss)


def resampled(question: Question, law: ArchLaw, candidates: Candidates, index: int) -> Allocation:
    """One candidate under every resample of the law, (R, 1)."""
    return allocate(question, law, candidates.take([index]), slice(1, None))


def law_optimum(question: Question, law: ArchLaw, candidates: Candidates) -> dict[str, Array]:
    """N*, D*, loss and total FLOPs of the best model without limits, whether or not it can be built, (1 + R,) each: by
    the fit, then by its resamples; NaN where there is none."""
    smooth = candidates.smooth()
    free = allocate(question, law, smooth, slice(None))
    index, rows = np.argmin(free.value, axis=1), np.arange(len(free.value))
    good = np.isfinite(free.value[rows, index])
    found = {"num_params": smooth.num_params[index], "num_tokens": free.num_tokens[rows, index]}
    found |= {"loss": free.loss[rows, index], "training_flops": free.training_flops[rows, index]}
    return {name: np.where(good, values, np.nan) for name, values in found.items()}


def interval(samples: Array, confidence: float) -> tuple[float, float]:
    """Percentile interval of resamples; an end may be inf where some need endlessly many tokens. NaN: no value."""
    if not np.isinf(samples).any():
        return percentile_interval(samples, confidence) if np.size(samples) else (float("nan"), float("nan"))
    known = samples[~np.isnan(samples)]
    if len(known) < MIN_SURVIVING_SHARE * len(samples):
        return float("nan"), float("nan")
    tail = 0.5 * (1.0 - confidence)
    low, high = np.quantile(known, [tail, 1.0 - tail], method="nearest")  # nothing is between a number and inf
    return float(low), float(high)


def probability_less(mine: Array, others: Sequence[Array]) -> tuple[float, int]:
    """Share of paired resamples in which ``mine`` (R,) is less than every other, ties half; and how many there are.

    The architectures are resampled independently, so any pairing will do. A resample counts if all have a value.
    """
    length = min([len(mine), *(len(other) for other in others)])
    stacked = np.array([other[:length] for other in others])
    known = ~np.isnan(mine[:length]) & ~np.isnan(stacked).any(axis=0)
    if not known.any():
        return float("nan"), 0
    rest = stacked[:, known].min(axis=0)
    better = (mine[:length][known] < rest) + 0.5 * (mine[:length][known] == rest)
    return float(np.mean(better)), int(known.sum())
