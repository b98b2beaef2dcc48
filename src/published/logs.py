"""A log file of the paper -> its runs and their training curves.

A file is a pickle of {tag: [run, …]}; a run holds a flat configuration, a summary and logged series. N is as logged,
D = batch · context · steps, and FLOPs are counted from the shape by `accounting` (convention paper).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import ModelShape, count_params, make_shape, training_flops
from xlstm_scaling.published.pickle_objects import LoggedRun, PickleError
from xlstm_scaling.published.reader import loads_pickle
from xlstm_scaling.study.runs import CURVE_KEYS, CURVE_VALUES

MODEL = "model.model_config."
MLSTM = f"{MODEL}mlstm_block.mlstm."
VAL_LOSS, TRAIN_LOSS = "val/.dclm_loss", "train/.loss_mean"
#: logged series that a training curve has
SERIES = {
    VAL_LOSS: "val_loss",
    TRAIN_LOSS: "train_loss",
    "train/.optimizer/lr": "learning_rate",
    "train/.grad_norm_mean": "grad_norm",
    "train/.step_time": "step_time_s",
}


class LogError(ValueError):
    """A log file whose runs cannot be read as the paper's; the message names the run and the field."""


@dataclass(frozen=True)
class LogSettings:
    """What a log file holds: its set, whether runs of one name are restarts, and when a run counts as lost.

    ``diverged_above`` [nat/token]; ``unfinished_below`` is a share of the steps.
    """

    experiment_set: str
    merge_restarts: bool = False
    diverged_above: float = math.inf
    unfinished_below: float = 0.0


@dataclass
class LogFile:
    """Rows of the table of runs, training curves, and how many logged runs were merged into others."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    num_logged: int
    num_merged: int


def read_log(content: bytes, settings: LogSettings, label: str = "log") -> LogFile:
    """Runs of one log file.

    Args:
        content: the pickle.
        settings: see `LogSettings`.
        label: of the file, for errors.

    Returns:
        `LogFile`: runs with the columns of the table of runs as far as a log has them, one row a run, and curves with
        the columns of `study.runs.curves_table`, one row a logged step.

    Raises:
        PickleError: the file is no plain pickle. LogError: it is one, but of something else than runs.
    """
    groups = loads_pickle(content)
    logged = list(_logged_runs(groups, label))
    members: list[tuple[str, list[LoggedRun]]] = [(tag, [run]) for tag, run in logged]
    if settings.merge_restarts:
        members = _restarts(logged)
    rows, curves = [], []
    for tag, parts in members:
        try:
            row, curve = _read_run(tag, parts, settings)
        except (PickleError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise LogError(f"{label}: run {parts[0].name or parts[0].id!r} of {tag}: {error}") from None
        rows.append(row)
        curves.append(curve)
    table = pd.DataFrame(rows)
    filled = [curve for curve in curves if len(curve)]
    empty = pd.DataFrame(columns=CURVE_KEYS + CURVE_VALUES)
    return LogFile(
        table, pd.concat(filled, ignore_index=True) if filled else empty, len(logged), len(logged) - len(rows)
    )


def _logged_runs(groups: Any, label: str) -> Iterator[tuple[str, LoggedRun]]:
    if not isinstance(groups, dict) or not groups:
        raise LogError(f"{label} holds a {type(groups).__name__}, not groups of runs: it is no run log")
    for tag, runs in groups.items():
        if not isinstance(runs, list) or not all(isinstance(run, LoggedRun) for run in runs):
            kind = type(runs).__name__
            raise LogError(f"{label}: {tag!r} is a {kind}, not a list of runs: it is no run log")
        for run in runs:
            yield tag, run


def _restarts(logged: Iterable[tuple[str, LoggedRun]]) -> list[tuple[str, list[LoggedRun]]]:
    """Runs of one tag and name together, in order of `created_at`; groups in order of appearance."""
    groups: dict[tuple[str, str], list[LoggedRun]] = {}
    for tag, run in logged:
        groups.setdefault((tag, run.name or run.id), []).append(run)
    return [(tag, sorted(runs, key=lambda run: run.created_at)) for (tag, _), runs in groups.items()]


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The model's shape from a run's configuration; ValueError names the field that is absent or odd."""
    kind = str(config.get("model.model_class", ""))
    dim, blocks, vocab = (
        _integer(_field(config, MODEL + key), key) for key in ("embedding_dim", "num_blocks", "vocab_size")
    )
    if kind.endswith("LlamaTransformer"):
        head_dim = _integer(_field(config, MODEL + "head_dim"), "head_dim")
        return make_shape("transformer", dim, blocks, dim // max(head_dim, 1), vocab)
    if not kind.endswith("xLSTMLMModel"):
        raise ValueError(f"model class {kind!r} is neither an xLSTMLMModel nor a LlamaTransformer")
    if (layer := config.get(MLSTM + "layer_type", "mlstm_v1")) != "mlstm_v1":
        raise ValueError(f"layer type {layer!r} is not mlstm_v1")
    if (factor := float(config.get(MLSTM + "qk_dim_factor", 0.5))) != 0.5:
        raise ValueError(f"qk_dim_factor {factor} is not 0.5")
    heads = _integer(_field(config, MLSTM + "num_heads"), "num_heads")
    chunk = _number_in(config.get(MLSTM + "mlstm_cell.backend.kwargs"), "chunk_size")
    return make_shape("xlstm", dim, blocks, heads, vocab, 64 if math.isnan(chunk) else int(chunk))


def _read_run(tag: str, parts: list[LoggedRun], settings: LogSettings) -> tuple[dict, pd.DataFrame]:
    last = next((run for run in reversed(parts) if _steps(run) is not None), parts[-1])
    config, steps, batch = last.config, _steps(last), _summary(last, "dataset/", "global_batch_size")
    num_params = _summary(last, "model/", "num_params")
    shape, context = read_shape(config), _context_length(config, last.name)
    started = steps is not None and batch is not None and num_params is not None
    series = _series(parts)
    row: dict[str, Any] = {
        "run_id": "-".join(run.id for run in parts),
        "name": last.name,
        "tag": tag,
        "experiment_set": settings.experiment_set,
        "context_length": context,
        **shape.as_dict(),
        "learning_rate": _number_in(config.get("optimizer.scheduler"), "lr"),
        "num_lr_warmup_steps": _count_or_none(_number_in(config.get("optimizer.scheduler"), "warmup_steps")),
        "seed": config.get("trainer.seed"),
        "compute_dtype": config.get(MODEL + "dtype"),
        "val_loss": _last(series, "val_loss"),
        "train_loss": _last(series, "train_loss"),
        "detail": None,
    }
    row["num_params"], row["num_train_steps"], row["global_batch_size_sequences"] = num_params, steps, batch
    row["num_tokens"] = row["num_flops"] = row["tokens_per_s"] = None
    curve = pd.DataFrame(columns=CURVE_KEYS + CURVE_VALUES)
    if started:
        row["num_tokens"] = batch * context * steps
        row["num_flops"] = training_flops(shape, context, batch, steps)
        counted = count_params(shape)
        if counted != num_params:
            row["detail"] = f"logged N = {num_params:,}, the shape has {counted:,}"
        curve = _curve(row, shape, series)
        speeds = curve["tokens_per_s"].dropna()
        row["tokens_per_s"] = float(speeds.median()) if len(speeds) else None
    status, reason = _status(row, series, settings)
    row["status"] = status
    row["detail"] = "; ".join(text for text in (reason, row["detail"]) if text) or None
    return row, curve


def _status(row: Mapping[str, Any], series: pd.DataFrame, settings: LogSettings) -> tuple[str, str | None]:
    """ok, diverged or failed, and why."""
    if row["num_tokens"] is None:
        return "failed", "nothing logged: the run did not start"
    validated = series["step"][series["val_loss_logged"]]
    if validated.empty:
        return "failed", "stopped before its first validation"
    if not math.isfinite(row["val_loss"]):
        return "diverged", f"validation loss {row['val_loss']}"
    if row["val_loss"] > settings.diverged_above:
        return "diverged", f"validation loss {row['val_loss']:.2f} nat/token at its end"
    if validated.iloc[-1] < settings.unfinished_below * row["num_train_steps"]:
        return "failed", f"stopped: last validated at step {validated.iloc[-1]:.0f} of {row['num_train_steps']}"
    return "ok", None


def _series(parts: list[LoggedRun]) -> pd.DataFrame:
    """Logged values by step, one row a step of a restart, restarts one after the other in the order of `parts`."""
    frames = []
    for run in parts:
        columns = {}
        for key, name in SERIES.items():
            if (logged := run.logs.get(key)) is None:
                continue
            if "_step" not in logged or key not in logged:
                raise ValueError(f"log {key!r} has the columns {list(map(str, logged.columns))}, not _step and {key}")
            values = pd.Series(logged[key].to_numpy(np.float64), index=logged["_step"].to_numpy(np.float64))
            columns[name] = values[~values.index.duplicated(keep="last")]
        if VAL_LOSS in run.logs:
            columns["val_loss_logged"] = pd.Series(True, index=columns["val_loss"].index)
        frames.append(pd.DataFrame(columns).sort_index().rename_axis("step").reset_index())
    frames = [frame for frame in frames if len(frame)] or frames[:1]
    table = pd.concat(frames, ignore_index=True).reindex(columns=["step", *SERIES.values(), "val_loss_logged"])
    return table.assign(val_loss_logged=table["val_loss_logged"].notna())


def _curve(row: Mapping[str, Any], shape: ModelShape, series: pd.DataFrame) -> pd.DataFrame:
    """Points of the training curve; where a restart repeats a step, its own value counts."""
    points = series.drop_duplicates("step", keep="last").sort_values("step")
    logged = {name: points[name].to_numpy(np.float64) for name in ("step", *SERIES.values())}
    step_tokens = row["global_batch_size_sequences"] * row["context_length"]
    step_flops = training_flops(shape, row["context_length"], row["global_batch_size_sequences"], 1)
    seconds = logged["step_time_s"]
    logged |= {"tokens": logged["step"] * step_tokens, "flops": logged["step"] * step_flops}
    logged["tokens_per_s"] = step_tokens / np.where(seconds > 0, seconds, np.nan)
    columns = {key: row.get(key, math.nan) for key in CURVE_KEYS}
    columns |= {name: logged.get(name, math.nan) for name in CURVE_VALUES}
    return pd.DataFrame(columns, index=range(len(points)))


def _last(series: pd.DataFrame, name: str) -> float:
    """The last logged value, in the order of the restarts; NaN where nothing was logged."""
    logged = series[series["val_loss_logged"]] if name == "val_loss" else series[series[name].notna()]
    return float(logged[name].iloc[-1]) if len(logged) else math.nan


def _steps(run: LoggedRun) -> int | None:
    return _summary(run, "dataset/", "num_train_steps")


def _summary(run: LoggedRun, group: str, key: str) -> int | None:
    part = run.summary.get(group)
    value = part.get(key) if isinstance(part, dict) else None
    return None if value is None else _integer(value, f"summary {group}{key}")


def _integer(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        raise ValueError(f"{what} = {value!r} is not a positive integer")
    return int(value)


def _field(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(f"the configuration lacks {key!r}")
    return config[key]


def _context_length(config: Mapping[str, Any], name: str) -> int:
    value = config.get(MODEL + "context_length")
    if isinstance(value, int):
        return _integer(value, "context_length")
    if found := re.search(r"(?:^|_)ctx(\d{1,9})(?:_|$)", name):
        return _integer(int(found[1]), "context_length")
    raise ValueError("no context length in the configuration or in the name")


def _number_in(text: Any, key: str) -> float:
    """The number of ``key`` inside the text of a mapping or of a call; NaN where it has none."""
    found = re.search(rf"\b{key}\b['\"]?\s*[:=]\s*([-+]?\d[\d.]*(?:[eE][-+]?\d+)?)", str(text))
    return float(found[1]) if found else math.nan


def _count_or_none(value: float) -> int | None:
    return None if math.isnan(value) else int(value)
