"""What a run is: everything that determines its loss, its identity, and the trunk that it may share with others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby

from xlstm_scaling.accounting import ModelShape, count_flops, count_params
from xlstm_scaling.study.files import digest

#: raised whenever a change of the training code changes losses; part of every run's identity
BEHAVIOUR_VERSION = 4


@dataclass(frozen=True)
class RunSpec:
    """All that determines a run's loss (``identity``), where it belongs in the study, and what it will cost."""

    shape: dict
    context_length: int
    batch_sequences: int
    num_train_steps: int
    learning_rate: float
    warmup_steps: int
    cooldown_steps: int
    final_fraction: float
    optimizer: dict
    validation: dict
    model_options: dict
    seed: int
    compute_dtype: str
    decay: str
    guard: dict
    tokens: dict
    tokens_id: str
    # where the run belongs
    experiment_set: str = "other"
    isoflop_tag: float | None = None
    ratio_tag: float | None = None
    size: str | None = None

    @property
    def arch(self) -> str:
        return self.shape["arch"]

    @cached_property
    def model_shape(self) -> ModelShape:
        return ModelShape(**self.shape)

    @cached_property
    def num_params(self) -> int:
        return count_params(self.model_shape)

    @property
    def num_tokens(self) -> int:
        """D: every token that the run trains on, repeats counted."""
        return self.batch_sequences * self.context_length * self.num_train_steps

    @cached_property
    def flops_per_step(self) -> float:
        """Of all sequences of an update, forward and backward."""
        return count_flops(self.model_shape, self.context_length).forward_backward * self.batch_sequences

    @property
    def num_flops(self) -> float:
        """H: training FLOPs, validation not counted."""
        return self.flops_per_step * self.num_train_steps

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of a token, forward and backward."""
        return self.flops_per_step / self.batch_sequences / self.context_length

    @property
    def validation_flops(self) -> float:
        """Forward passes over the held-out tokens, at each evaluation; the last is at the end."""
        forward = count_flops(self.model_shape, self.context_length).forward / self.context_length
        return self.validation["max_tokens"] * self.validation["evaluations"] * forward

    def identity(self) -> dict:
        """What determines the loss, and nothing else: no path, host, device, batch split or place in a study."""
        place = ("experiment_set", "isoflop_tag", "ratio_tag", "size", "tokens_id")
        spec = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in place}
        spec["behaviour_version"] = BEHAVIOUR_VERSION
        return spec

    @cached_property
    def run_id(self) -> str:
        """A readable name and the digest of ``identity``: the run's folder."""
        return f"{self._name}-n{self.batch_sequences}x{self.num_train_steps}-{digest(self.identity())[:10]}"

    @property
    def _name(self) -> str:
        return f"{self.arch}-d{self.shape['embedding_dim']}b{self.shape['num_blocks']}-c{self.context_length}"

    @property
    def branch_step(self) -> int:
        """Updates before the cool-down: where the run leaves its trunk."""
        return self.num_train_steps - self.cooldown_steps

    def trunk_identity(self) -> dict | None:
        """What determines the updates before the cool-down, where they do not depend on when that comes, else None."""
        if self.decay != "constant":
            return None
        identity = self.identity()
        for key in ("num_train_steps", "cooldown_steps", "final_fraction"):
            del identity[key]
        return identity

    @cached_property
    def trunk_id(self) -> str | None:
        """Runs with the same one share their updates before the shortest one's cool-down."""
        identity = self.trunk_identity()
        return None if identity is None else f"{self._name}-n{self.batch_sequences}-{digest(identity)[:10]}"


def spec_of(content: dict) -> RunSpec | None:
    """The run that a plan or ``spec.json`` holds; None where it is of code with other settings."""
    try:
        return RunSpec(**content)
    except TypeError:
        return None


@dataclass(frozen=True)
class TrunkSpec:
    """Runs that differ in length alone: trained once up to the last cool-down; each run branches off at its step."""

    trunk_id: str
    runs: tuple[RunSpec, ...]

    @property
    def steps(self) -> list[int]:
        """Where runs branch off, in order."""
        return sorted({run.branch_step for run in self.runs})

    @property
    def spec(self) -> RunSpec:
        """The trunk as a run without a cool-down."""
        return replace(self.runs[0], num_train_steps=self.steps[-1], cooldown_steps=0)

    @property
    def saved_flops(self) -> float:
        """What the runs would cost beyond this, each on its own."""
        return (sum(run.branch_step for run in self.runs) - self.steps[-1]) * self.runs[0].flops_per_step


def find_trunks(runs: Iterable[RunSpec]) -> list[TrunkSpec]:
    """The trunks that at least two of these runs share."""
    sharing = sorted((run for run in runs if run.trunk_id), key=lambda run: (run.trunk_id, run.num_train_steps))
    groups = ((name, tuple(group)) for name, group in groupby(sharing, key=lambda run: run.trunk_id))
    return [TrunkSpec(name, group) for name, group in groups if len(group) > 1]
