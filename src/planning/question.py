"""What is asked: a budget or a loss, a context, a load, and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.runtime import Load

#: limits by the quantity of a candidate that they bound
LIMITS = {"ttft_s": "max_ttft_s", "step_time_s": "max_step_time_s", "serving_bytes": "max_serving_bytes"}


@dataclass(frozen=True)
class Question:
    """One question; what is None is free.

    Attributes:
        context_length: T [tokens], of training.
        flops: training budget [FLOPs]; with ``tokens_served`` it names the loss to reach (`objective`).
        total_flops: budget of training and serving together [FLOPs].
        loss: to reach [nat/token].
        num_params, num_tokens: N, D where they are fixed; alone they ask for the budget they are optimal for.
        tokens_served: prompt and generated tokens over the model's life, Q.
        prefill_length, generate_length, batch_size: of the requests; the prompt fills the context by default.
        max_ttft_s, max_step_time_s, max_serving_bytes: limits of one device that serves a batch.
    """

    context_length: int
    flops: float | None = None
    total_flops: float | None = None
    loss: float | None = None
    num_params: float | None = None
    num_tokens: float | None = None
    tokens_served: float = 0.0
    prefill_length: int | None = None
    generate_length: int = 1
    batch_size: int = 1
    max_ttft_s: float | None = None
    max_step_time_s: float | None = None
    max_serving_bytes: float | None = None

    def __post_init__(self) -> None:
        for name in ("flops", "total_flops", "loss", "num_params", "num_tokens", *LIMITS.values()):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PlanningError(f"{_option(name)} must be a positive number, not {value!r}")
        for name in ("context_length", "generate_length", "batch_size"):
            if getattr(self, name) < 1:
                raise PlanningError(f"{_option(name)} must be at least 1, not {getattr(self, name)}")
        if self.prefill_length is not None and self.prefill_length < 1:
            raise PlanningError(f"--prefill-length must be at least 1, not {self.prefill_length}")
        if not (math.isfinite(self.tokens_served) and self.tokens_served >= 0):
            raise PlanningError(f"--tokens-served must not be negative, not {self.tokens_served!r}")
        given = [name for name in ("flops", "total_flops", "loss") if getattr(self, name) is not None]
        if len(given) > 1:
            raise PlanningError(f"give one of {', '.join(map(_option, given))}, not all of them")
        fixed = [name for name in ("num_params", "num_tokens") if getattr(self, name) is not None]
        if not given and not fixed:
            raise PlanningError("give --flops, --loss or --total-flops, or a model: --num-params, --num-tokens")
        if given and len(fixed) == 2:
            raise PlanningError(f"--num-params and --num-tokens leave nothing for {_option(given[0])} to decide")
        if fixed and self.flops is not None and self.tokens_served:
            raise PlanningError(
                "--flops with --tokens-served chooses N and D; give --total-flops or --loss with a fixed one"
            )

    @property
    def load(self) -> Load:
        """What is served side by side; the prompt fills the context unless it is given."""
        return Load(self.prefill_length or self.context_length, self.generate_length, self.batch_size)

    @property
    def limits(self) -> dict[str, float]:
        """Quantity -> limit, of those that are given."""
        given = {quantity: getattr(self, name) for quantity, name in LIMITS.items()}
        return {quantity: float(limit) for quantity, limit in given.items() if limit is not None}

    @property
    def by_size_alone(self) -> bool:
        """N or D alone: the budget it is optimal for is asked."""
        given = any(value is not None for value in (self.flops, self.total_flops, self.loss))
        return not given and (self.num_params is None) != (self.num_tokens is None)

    @property
    def objective(self) -> str:
        """What is minimised, in a sentence."""
        fixed = [
            f"{symbol} = {value:.3g}" for symbol, value in (("N", self.num_params), ("D", self.num_tokens)) if value
        ]
        given = f", with {' and '.join(fixed)}" if fixed else ""
        served = ""
        if self.tokens_served:
            served = (
                f" Total FLOPs = training FLOPs (forward and backward, convention `paper`) + {self.tokens_served:.3g} "
                f"served tokens x inference FLOPs per token of requests with {self.load.prefill_length:,} prompt and "
                f"{self.generate_length:,} generated tokens."
            )
        if self.by_size_alone:
            return f"the budget for which this is compute-optimal by the power laws of the IsoFLOP minima{given}"
        if self.loss is not None:
            what = "total" if self.tokens_served else "training"
            return f"least {what} FLOPs with a predicted loss of {self.loss:g} nat/token{given}.{served}"
        if self.total_flops is not None:
            return f"least predicted loss for {self.total_flops:.3g} total FLOPs{given}.{served}"
        if self.flops is not None and self.tokens_served:
            return (
                f"least total FLOPs with the loss that {self.flops:.3g} training FLOPs buy under the limits, by the "
                f"better architecture.{served}"
            )
        if self.flops is not None:
            return f"least predicted loss for {self.flops:.3g} training FLOPs{given}"
        return f"predicted loss{given}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
