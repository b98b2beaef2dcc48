"""Configuration: composed by Hydra from ``conf/``, checked against typed schemas before any work starts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what to do."""


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


SCHEMAS = {"study": StudyConfig, "training": TrainingConfig, "hardware": HardwareConfig, "runs": RunsConfig}
SCHEMAS |= {"evaluation": EvaluationConfig, "inference": InferenceConfig}
GROUPS = ("study", "training", "hardware", "corpus", "tokenizer", "fitting", "inference", "figures", "runs")
GROUPS += ("evaluation",)


#: what a cluster job needs at least besides the time for saving [s]
MIN_JOB_TIME_S = 180.0


def conf_dir() -> Path:
    """The folder of the configuration: $XLSTM_SCALING_CONF, else ``conf/`` beside the package's source."""
    folder = Path(os.environ.get("XLSTM_SCALING_CONF", Path(__file__).resolve().parents[2] / "conf"))
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"no configuration in {folder}: set XLSTM_SCALING_CONF to the repository's conf folder")
    return folder


def normalise_overrides(overrides: Any) -> list[str]:
    """Overrides as a list of strings, from a list or from text like ``[a=1, b=2]`` or ``a=1 b=2``."""
    if overrides is None:
        return []
    if isinstance(overrides, str):
        text = overrides.strip()
        return _listed(text) if text.startswith("[") else text.split()
    return [str(item) for item in overrides]


def _listed(text: str) -> list[str]:
    """The items of ``[a=1, b=[2,3]]``: YAML where it is YAML, else split at the commas outside of inner brackets."""
    try:
        return [str(item) for item in yaml.safe_load(text)]
    except yaml.YAMLError:
        pass
    items, depth = [""], 0
    for character in text.removeprefix("[").removesuffix("]"):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _in_full(override: str) -> str:
    """``architectures=[…]`` is short for ``study.architectures=[…]``."""
    return f"study.{override}" if override.startswith("architectures=") else override


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose ``conf/config.yaml`` with Hydra overrides (``study=smoke training.seed=2``) and check every key's type.

    Raises ConfigError with the key, and what is known in its place.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    GlobalHydra.instance().clear()
    overrides = [_in_full(override) for override in overrides]
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            composed = hydra_compose(config_name="config", overrides=overrides)
        return check(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from None


def check(composed: DictConfig) -> DictConfig:
    """Merge typed schemas under the composed groups, so that an unknown key or a wrong type is an error."""
    result = OmegaConf.create({})
    for group in composed:
        if group in SCHEMAS:
            try:
                result[group] = OmegaConf.merge(OmegaConf.structured(SCHEMAS[group]), composed[group])
            except OmegaConfBaseException as error:
                raise ConfigError(_explain_group(error, group)) from None
        else:
            result[group] = composed[group]
    missing = sorted(set(GROUPS) - set(result))
    if missing:
        raise ConfigError(f"configuration groups missing: {', '.join(missing)}")
    _check_choice("runs.source", result.runs.source, ("trained", "published"))
    _check_choice("training.schedule.decay", result.training.schedule.decay, ("cosine", "constant"))
    _check_devices(result.hardware)
    _check_jobs(result.hardware)
    for tracker in result.hardware.trackers:
        _check_choice("hardware.trackers", tracker, ("tensorboard", "wandb"))
    OmegaConf.set_readonly(result, True)
    return result


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key} must be {' or '.join(known)}, got {value!r}")


def _check_devices(hardware: DictConfig) -> None:
    shard, devices = hardware.shard, hardware.devices_per_run
    if devices < 1:
        raise ConfigError(f"hardware.devices_per_run must be at least 1, got {devices}")
    if hardware.nodes_per_run < 1:
        raise ConfigError(f"hardware.nodes_per_run must be at least 1, got {hardware.nodes_per_run}")
    number = isinstance(shard, int) and not isinstance(shard, bool) and shard >= 1
    if shard not in ("none", "full") and not number:
        raise ConfigError(f"hardware.shard must be none, full or a number of devices, got {shard!r}")
    if devices * hardware.nodes_per_run > 1 and hardware.compile:
        raise ConfigError("hardware.compile is for one device a run: set hardware.compile=false")


def _check_jobs(hardware: DictConfig) -> None:
    """What a scheduler is asked for makes sense (study/resources.py)."""
    for key in ("time_factor", "memory_factor"):
        if not hardware[key] > 0:
            raise ConfigError(f"hardware.{key} must be positive, got {hardware[key]:g}")
    for key in ("start_time_s", "save_time_s"):
        if hardware[key] < 0:
            raise ConfigError(f"hardware.{key} must not be negative, got {hardware[key]:g}")
    limit, least = hardware.max_job_time_s, hardware.save_time_s + MIN_JOB_TIME_S
    if limit is not None and limit < least:
        raise ConfigError(
            f"hardware.max_job_time_s = {limit:g} leaves no time to train: at least {least:g} with "
            f"hardware.save_time_s = {hardware.save_time_s:g}"
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keep = [line for line in lines if not line.startswith(("reference_type", "object_type", "full_key"))]
    return " · ".join(keep)


def _explain_group(error: OmegaConfBaseException, group: str) -> str:
    """A value of the wrong type, or a key of a file that its schema does not have."""
    key = f"{group}.{error.full_key}" if error.full_key else group
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return f"no setting {key}{_meant(key, _keys(OmegaConf.structured(SCHEMAS[group]), group))}"
    return f"{key}: {_first_line(error)}"


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    cause = error.__cause__ if error.__cause__ is not None and str(error.__cause__) else None
    text = " · ".join(_first_line(item) for item in (error, cause) if item is not None)
    if found := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, name = found.groups()
        names = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        hint = _meant(name, names) or f". Available options in '{group}': {', '.join(names)}"
        return f"no {group} {name!r} in {conf_dir() / group}{hint}"
    if found := re.search(r"In '(study/[^']+)': Could not override '\w+@study\.", text):
        return f"conf/{found.group(1)}.yaml must begin with the line `# @package _global_`: it sets several groups"
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        if choices := _choices_with(key):
            return f"{key} is a setting of {' and of '.join(choices)} alone: add {choices[0]}"
        return f"no setting {key}{_meant(key, _known_keys(overrides))} (docs/configuration.md)"
    hint = "see conf/ for the keys there are; `xlstm-scaling config` prints the resolved configuration"
    return f"{text} (overrides: {list(overrides)}; {hint})"


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _choices_with(key: str) -> list[str]:
    """Choices of a key's group that have it, such as corpus=folder for corpus.path."""
    group, _, name = key.partition(".")
    paths = sorted((conf_dir() / group).glob("*.yaml"), key=lambda path: -path.stat().st_size) if name else []
    return [f"{group}={path.stem}" for path in paths if name in _keys(OmegaConf.load(path))]


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Dotted keys of a configuration, of groups too."""
    found = []
    for key in config:
        name = f"{prefix}.{key}" if prefix else str(key)
        node = config._get_node(key)
        found += [name, *(_keys(node, name) if isinstance(node, DictConfig) and not node._is_missing() else [])]
    return found


def _known_keys(overrides: Sequence[str]) -> list[str]:
    """Keys of the study that the overrides name, single keys left aside."""
    choices = [item for item in overrides if item.split("=", 1)[0] in GROUPS]
    try:
        return _keys(compose(choices))
    except ConfigError:
        return []


def to_dict(config: DictConfig | Any) -> dict:
    """A plain, resolved dict."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)


def is_published(config: DictConfig) -> bool:
    """Whether the runs are published ones (``runs=published``)."""
    return config.runs.source == "published"


def write_resolved(config: DictConfig, path: Path, groups: Sequence[str] | None = None) -> None:
    """The resolved configuration (or some groups of it) as YAML beside a result."""
    from xlstm_scaling.study.files import write_text_atomic

    plain = to_dict(config)
    chosen = plain if groups is None else {group: plain[group] for group in groups}
    write_text_atomic(path, yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
