"""Typed schemas of the configuration's groups: every key with its type, its default and what it means.

The comment on a field is its line in the reference (``study/reference.py``) where no file of ``conf/`` says more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class SizeConfig:
    """One model size; ``num_heads`` overrides the head rule, per architecture or for all."""

    embedding_dim: int = MISSING  # width of the model
    num_blocks: int = MISSING  # depth
    num_heads: Any = None  # null: by the rule of `study.heads`; a number, or {architecture: number}
    learning_rate: float | None = None  # peak of all runs of this size; null: by the rule of `training.learning_rate`


@dataclass
class HeadRule:
    """Heads of an architecture: their number, or as many of at least ``head_dim`` as divide the embedding dim;
    ``by_width`` holds exceptions by embedding dim."""

    num_heads: int | None = None  # heads at every width, where `head_dim` is null
    head_dim: int | None = None  # least width of a head: as many heads as divide the width
    by_width: dict[int, int] = field(default_factory=dict)  # exceptions: {embedding_dim: heads}


@dataclass
class IsoflopCell:
    """Runs that all cost ``budget_flops``: one per size name in ``sizes`` or per entry of ``grid``
    (embedding dim -> numbers of blocks)."""

    context_length: int = MISSING  # training context [tokens]
    budget_flops: float = MISSING  # training FLOPs of each run of the cell [FLOPs]
    architectures: list[str] | None = None  # null: all of `study.architectures`
    sizes: list[str] = field(default_factory=list)  # names of `study.sizes`
    grid: dict[int, list[int]] = field(default_factory=dict)  # in place of `sizes`: {embedding_dim: [num_blocks]}
    batch_sequences: int | None = None  # sequences a step; null: by the rule of `training.batch`
    learning_rate_by_width: dict[int, float] = field(default_factory=dict)  # exceptions: {embedding_dim: peak}


@dataclass
class TokenParamCell:
    """Sizes x token/param ratios; ``num_train_steps`` fixes the steps instead of ``ratios``."""

    context_length: int = MISSING  # training context [tokens]
    architectures: list[str] | None = None  # null: all of `study.architectures`
    sizes: list[str] = field(default_factory=list)  # names of `study.sizes`
    ratios: list[float] = field(default_factory=list)  # tokens per parameter, a run each
    num_train_steps: list[int] = field(default_factory=list)  # steps in place of `ratios`, a run each
    batch_sequences: int | None = None  # sequences a step; null: by the rule of `training.batch`
    learning_rate: float | None = None  # peak; null: that of the size, else by the rule
    warmup_steps: int | None = None  # null: by `training.schedule`


@dataclass
class ContextScalingConfig:
    """What the target ``context_scaling`` compares (``study.context_scaling``); empty: chosen by rule."""

    context_lengths: list[int] = field(default_factory=list)  # [tokens]; empty: the base context and the longest
    sizes: list[str] = field(default_factory=list)  # names of `study.sizes`; empty: three of them


@dataclass
class StudyConfig:
    name: str = MISSING  # names the folder of results
    title: str = ""  # for reports and figures
    architectures: list[str] = MISSING  # xlstm, transformer, …: what is compared
    base_context: int = MISSING  # context that others are compared with [tokens]
    heads: dict[str, HeadRule] = field(default_factory=dict)
    shape_options: dict[str, dict[str, Any]] = field(default_factory=dict)  # by architecture: see architecture
    sizes: dict[str, SizeConfig] = field(default_factory=dict)
    isoflop: dict[str, IsoflopCell] = field(default_factory=dict)
    tokenparam: dict[str, TokenParamCell] = field(default_factory=dict)
    context_scaling: ContextScalingConfig = field(default_factory=ContextScalingConfig)
    warn_epochs: float = 4.0  # more passes over the text than this: the plan warns
    max_epochs: float = 16.0  # more passes over the text than this: the plan is refused
    min_sizes: int = 4  # fewest runs of an IsoFLOP cell and architecture; fewer: the plan is refused


@dataclass
class LearningRateRule:
    """Peak learning rate = base · (reference_width / embedding_dim)^width_exponent
    · (reference_flops / run FLOPs)^flops_exponent, at most ``maximum``; ``by_width`` overrides it."""

    base: float = MISSING
    reference_width: int = 64
    width_exponent: float = 0.0
    reference_flops: float = 1e12
    flops_exponent: float = 0.0
    maximum: float = 1.0
    by_width: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass
class BatchRule:
    """Tokens a step = base · (run FLOPs / reference_flops)^flops_exponent, rounded to a power-of-two number of
    sequences, at least ``min_sequences``."""

    base_tokens: int = MISSING
    reference_flops: float = 1e12
    flops_exponent: float = 0.0
    min_sequences: int = 4


@dataclass
class ScheduleConfig:
    """Warm-up, cosine decay to ``final_fraction`` of the peak (or none: ``decay`` constant), linear cool-down to 0;
    steps, or fractions of them."""

    decay: str = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float = 0.1
    cooldown_steps: int | None = None
    cooldown_fraction: float = 0.1
    final_fraction: float = 0.1


@dataclass
class OptimizerConfig:
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 0.5


@dataclass
class ValidationConfig:
    """``max_tokens`` of the held-out split, read ``evaluations`` times over a run (the last at its end)."""

    max_tokens: int = 131072
    evaluations: int = 4


@dataclass
class GuardConfig:
    """When a step is skipped and when a run has diverged: see ``training.guard.GuardRule``."""

    spike_factor: float = 1.5
    max_consecutive: int = 5
    max_skipped: int = 20
    max_skipped_share: float = 0.01
    loss_factor: float = 1.5


@dataclass
class TrainingConfig:
    seed: int = 0
    compute_dtype: str = "auto"
    learning_rate: LearningRateRule = field(default_factory=LearningRateRule)
    batch: BatchRule = field(default_factory=BatchRule)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    steps_multiple: int = 1
    min_steps: int = 20
    guard: GuardConfig = field(default_factory=GuardConfig)
    model_options: dict[str, dict[str, Any]] = field(default_factory=dict)  # by architecture: see architecture


@dataclass
class HardwareConfig:
    """Where runs run. Never part of a run's identity.

    ``name``: of the kernels' certificate. ``certification``: of kernels before they train, quick or full.
    ``devices_per_run``: of one node, by torchrun, on each of ``nodes_per_run`` (clusters); ``shard``: none (every
    device holds all parameters), full, or the number of devices that share them. What a scheduler is asked for
    (``study.resources``): ``start_time_s`` (before the first step and after the last) and ``time_factor`` times what
    is expected, at most ``max_job_time_s`` a job, the last ``save_time_s`` of which are for saving; ``memory_factor``
    times what is accounted for; GPUs of the kind ``gpu_type``.
    """

    name: str = "auto"
    device: str = "cpu"
    threads_per_run: int = 1
    flops_per_s: float = 5e10
    peak_flops: float | None = None
    devices_per_run: int = 1
    nodes_per_run: int = 1
    shard: Any = "none"
    activation_checkpointing: bool = False
    micro_batch_sequences: int | None = None
    checkpoint_interval_s: float = 30.0
    warm_start: bool = True
    certification: str = "quick"
    compile: bool = False
    prefetch_batches: int = 2
    trackers: list[str] = field(default_factory=list)
    start_time_s: float = 60.0
    time_factor: float = 3.0
    memory_factor: float = 1.5
    max_job_time_s: float | None = None
    save_time_s: float = 60.0
    gpu_type: str | None = None


@dataclass
class EvaluationConfig:
    """The loss by position beyond the training context (conf/evaluation)."""

    multiple: float = 8.0
    bins_per_doubling: int = 2
    choose: str = "best"
    num_runs: int = 1
    max_documents: int = 64
    windows_per_document: int = 2
    min_tokens: int = 200
    batch_windows: int = 8
    chunk_tokens: int = 512
    confidence: float = 0.95


@dataclass
class ProfileConfig:
    """The target ``latency_profile``: one size of ``inference.untrained``; null: as in the group itself."""

    size: str = MISSING  # the size that is profiled, of `inference.untrained`
    prefill_lengths: list[int] | None = None  # prompts [tokens]
    batch_sizes: list[int] | None = None  # prompts side by side
    prefill_chunk: int | None = None  # tokens of a prompt in one forward pass
    repeats: int | None = None  # measured passes of a cell
    max_cell_s: float | None = None  # a cell that takes longer is skipped [s]


@dataclass
class InferenceConfig:
    """What is measured of inference (conf/inference); ranges are checked where it is used."""

    prefill_lengths: list[int] = MISSING
    batch_sizes: list[int] = MISSING
    generate_steps: int = MISSING
    repeats: int = MISSING
    warmup: int = 1
    round_s: float = 0.0
    prefill_chunk: int | None = None
    max_cell_s: float = MISSING
    num_threads: int = MISSING
    dtype: str = "auto"
    device: str = "cpu"
    num_trained: int = 1
    untrained: dict[str, Any] = field(default_factory=dict)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    runtime_model: dict[str, Any] = field(default_factory=dict)


@dataclass
class PublishedInferenceConfig:
    """What published measurements do not say of themselves; ``datasheet``: a device of ``accounting.hardware``, whose
    peaks the roofline and the runtime model take; ``prefill_logits``: architecture -> last or all (docs/runtime.md)."""

    device: str = "gpu"
    datasheet: str | None = None
    dtype: str = "bfloat16"
    generate_steps: int = 100
    prefill_logits: dict[str, str] = field(default_factory=dict)


@dataclass
class RunsConfig:
    """Where the runs come from: ``trained`` here, or ``published`` (a folder, or the paper's logs by download)."""

    source: str = "trained"
    folder: str | None = None
    download: bool = False
    url: str | None = None
    selected: bool = True
    mapping: str | None = None
    claims: bool = True
    inference: PublishedInferenceConfig = field(default_factory=PublishedInferenceConfig)


#: group -> its schema; the other groups are checked where they are read
SCHEMAS = {
    "study": StudyConfig,
    "training": TrainingConfig,
    "hardware": HardwareConfig,
    "runs": RunsConfig,
    "evaluation": EvaluationConfig,
    "inference": InferenceConfig,
}
