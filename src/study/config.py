"""Configuration: composed by Hydra from ``conf/``, checked against typed schemas before any work starts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from xlstm_scaling.study.composed import keep_composed
from xlstm_scaling.study.schemas import SCHEMAS

#: groups that every configuration has
GROUPS = (
    *("study", "training", "hardware", "corpus", "tokenizer", "fitting", "inference", "figures", "runs"),
    "evaluation",
)
#: what a cluster job needs at least besides the time for saving [s]
MIN_JOB_TIME_S = 180.0


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what to do."""


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

    What was composed before is read from the machine's cache (``study/composed.py``).
    Raises ConfigError with the key, and what is known in its place.
    """
    overrides = [_in_full(override) for override in overrides]
    return keep_composed(conf_dir(), overrides, lambda: _compose(overrides))


def _compose(overrides: Sequence[str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            composed = hydra_compose(config_name="config", overrides=overrides)
        return check(composed)
    except (HydraException, OmegaConfBaseException) as error:
        left_out = _left_out(error, overrides)
        if left_out is None:
            raise ConfigError(_explain(error, overrides)) from None
    # Hydra overrides what a file says; a setting that has a default may stand in no file
    return _compose([f"++{item}" if item.split("=", 1)[0] == left_out else item for item in overrides])


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


def _left_out(error: Exception, overrides: Sequence[str]) -> str | None:
    """The key that Hydra could not override, if the schema has it and the files do not."""
    found = re.search(r"Could not override '([^']+)'", str(error))
    named = found is not None and found[1] in {item.split("=", 1)[0] for item in overrides} - set(GROUPS)
    return found[1] if named and found[1] in _known_keys(overrides) else None


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
