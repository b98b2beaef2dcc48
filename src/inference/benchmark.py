"""Time to first token, step time, memory and energy on this machine, over models, prefill lengths and batch sizes."""

from __future__ import annotations

import contextlib
import functools
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from xlstm_scaling.accounting import ModelShape, count_params, dtype_bytes, make_shape, weight_bytes
from xlstm_scaling.inference.cells import BenchmarkModel, Cell, predicted_memory
from xlstm_scaling.inference.energy import LEAST_READINGS, Nvml, Rapl, per_token_j
from xlstm_scaling.inference.probe import probe_device
from xlstm_scaling.inference.records import Records, finish_table
from xlstm_scaling.inference.worker import measure_model
from xlstm_scaling.models import LanguageModel, build_model
from xlstm_scaling.study.config import to_dict
from xlstm_scaling.study.files import digest, write_table
from xlstm_scaling.study.machine import resolve_compute_dtype
from xlstm_scaling.study.plan import model_vocab_size, num_heads

BUSY_SHARE = 0.2  # of all CPUs; above it the rest of the machine is mentioned in `detail`
#: what is measured, below the package: cells of other code are measured again
MEASURED_CODE = (
    "inference/timing.py",
    "inference/generation.py",
    "inference/decoder*.py",
    "models/*.py",
    "kernels/**/*",
)


#: bytes of weights from which on a model takes longer to build than a round lasts: all its rounds are in one process
LARGE_BYTES = 2**30


class BenchmarkError(RuntimeError):
    """Not one cell could be measured; the message says why."""


def untrained_models(
    sizes: Mapping[str, Mapping[str, Any]],
    architectures: Sequence[str],
    vocab_size: int,
    chunk_size: int = 64,
    model_options: Mapping[str, Mapping[str, Any]] | None = None,
    shape_options: Mapping[str, Mapping[str, Any]] | None = None,
    head_rule: Callable[[str, int], int] | None = None,
) -> list[BenchmarkModel]:
    """Models of given sizes with random weights: how long a token takes does not depend on what was learned.

    Args:
        sizes: name → embedding_dim, num_blocks, num_heads (architecture → number of heads), or None for a size that is
            left out.
        architectures: architectures to build.
        vocab_size: of all models [tokens].
        chunk_size: mLSTM chunk that FLOPs and bytes are counted at [tokens].
        model_options: architecture → options of ``build_model``.
        shape_options: architecture → options of its shapes (``make_shape``).
        head_rule: (architecture, embedding_dim) → heads of an architecture that a size does not name; without it, such
            an architecture is left out.

    Raises:
        ValueError: an unknown architecture or dimensions that do not divide.
    """
    models = []
    for arch in architectures:
        options, free = dict((model_options or {}).get(arch, {})), (shape_options or {}).get(arch, {})
        for name, size in sizes.items():
            heads = None if size is None else size["num_heads"].get(arch)
            if size is not None and heads is None and head_rule is not None:
                heads = head_rule(arch, size["embedding_dim"])
            if heads is None:
                continue
            shape = make_shape(arch, size["embedding_dim"], size["num_blocks"], heads, vocab_size, chunk_size, **free)
            build = _Build(shape, options)
            models.append(BenchmarkModel(f"{arch}-{name}", arch, shape, trained=False, build=build))
    return models


def models_of_study(config: DictConfig, sizes: Mapping[str, Mapping[str, Any] | None]) -> list[BenchmarkModel]:
    """Untrained models of these sizes with a study's architectures, vocabulary, options and rule for heads; sizes and
    errors as in `untrained_models`."""
    return untrained_models(
        sizes,
        list(config.study.architectures),
        model_vocab_size(config),
        model_options=to_dict(config.training.model_options),
        shape_options=to_dict(config.study.shape_options),
        head_rule=functools.partial(num_heads, config.study),
    )


@dataclass(frozen=True)
class _Build:
    shape: ModelShape
    options: Mapping[str, Any]

    def __call__(self) -> LanguageModel:
        return build_model(self.shape, seed=0, **self.options)


@functools.cache
def code_digest() -> str:
    """Digest of the code that is measured, and of PyTorch's version."""
    package = Path(__file__).resolve().parents[1]
    files = sorted({path for pattern in MEASURED_CODE for path in package.glob(pattern)})
    sources = {
        str(path.relative_to(package)): path.read_text() for path in files if path.suffix in (".py", ".cpp", ".hpp")
    }
    return digest({"torch": torch.__version__, "sources": sources})


def device_name(device: str = "cpu") -> str:
    """What the tables call this machine: the name of its GPU or CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def share_done(cell: Cell, repeats: int) -> float:
    """Share of a cell's rounds that are done."""
    return 1.0 if cell.complete(repeats) else len(cell.ttft_s) / (repeats * cell.round_passes)


def check(config: Mapping[str, Any], name: str = "inference") -> None:
    """Raise ValueError for a setting outside its range, by its name."""
    for key in ("generate_steps", "repeats", "num_threads"):
        if int(config[key]) < 1:
            raise ValueError(f"{name}.{key} must be at least 1, got {config[key]}")
    if int(config["warmup"]) < 1:
        raise ValueError(
            f"{name}.warmup must be at least 1 (it finds out how long a cell takes), got {config['warmup']}"
        )
    for key in ("prefill_lengths", "batch_sizes"):
        if not config[key] or min(config[key]) < 1:
            raise ValueError(f"{name}.{key} must list positive integers, got {config[key]}")
    chunk = config.get("prefill_chunk")
    if chunk is not None and int(chunk) < 1:
        raise ValueError(f"{name}.prefill_chunk must be at least 1 token, or null for all at once, got {chunk}")
    if not float(config.get("round_s") or 0.0) >= 0:
        raise ValueError(f"{name}.round_s must not be negative, got {config['round_s']}")
    if not float(config["max_cell_s"]) > 0:
        raise ValueError(f"{name}.max_cell_s must be positive, got {config['max_cell_s']}")


def _energy(cell: Cell, steps: int) -> dict[str, Any]:
    """Energy per token of the prompt and per generated token [J], its source, and why there is none."""
    names = ("prefill_energy_j_per_token", "decode_energy_j_per_token")
    columns: dict[str, Any] = dict.fromkeys(names, float("nan"))
    columns |= {"energy_source": cell.energy_source, "energy_detail": cell.energy_detail}
    if not cell.energy_source:
        return columns
    interval_s = {Rapl.name: Rapl.interval_s, Nvml.name: Nvml.interval_s}[cell.energy_source]
    phases = (
        (cell.prefill_energy_j, cell.ttft_s, cell.batch_size * cell.prefill_length),
        (cell.decode_energy_j, cell.step_times_s, cell.batch_size * steps),
    )
    for name, (energies_j, times_s, tokens) in zip(names, phases):
        columns[name] = per_token_j(energies_j, times_s, tokens, interval_s)
        if np.isnan(columns[name]):
            phase, least = name.split("_")[0], LEAST_READINGS * interval_s
            text = f"{phase}: all passes together took less than {least:g} s, too short for {cell.energy_source}"
            columns["energy_detail"] = "; ".join(filter(None, (columns["energy_detail"], text)))
    return columns


def _row(entry: BenchmarkModel, cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The row of ``measurements``; step times are pooled over the repeats."""
    ok = cell.status == "ok"
    row = {"arch": entry.arch, "model": entry.name, "num_params": count_params(entry.shape), "trained": entry.trained}
    row |= {key: value for key, value in entry.shape.as_dict().items() if key != "arch"}
    row |= {"batch_size": cell.batch_size, "prefill_length": cell.prefill_length}
    for name, samples in (("ttft_s", cell.ttft_s), ("step_time_s", cell.step_times_s)):
        quartiles = np.quantile(samples, [0.25, 0.5, 0.75]) if ok else [float("nan")] * 3
        row |= {f"{name}_lo": float(quartiles[0]), name: float(quartiles[1]), f"{name}_hi": float(quartiles[2])}
    row["decode_tokens_per_s"] = cell.batch_size / row["step_time_s"]
    row["load"] = float(np.median(cell.others)) if ok else float("nan")
    detail = cell.detail
    if ok and row["load"] > BUSY_SHARE:
        detail = f"other processes used {100 * row['load']:.0f} % of the CPUs meanwhile"
    predicted = predicted_memory(entry.shape, cell.batch_size, cell.prefill_length, settings)
    row |= {"peak_memory_bytes": cell.peak_memory_bytes, "predicted_memory_bytes": sum(predicted.values())}
    row |= _energy(cell, int(settings["generate_steps"])) if ok else {}
    row |= {"repeats": len(cell.ttft_s) if ok else 0}
    row |= {key: settings[key] for key in ("prefill_chunk", "dtype", "num_threads", "device")}
    return row | {"status": cell.status, "detail": detail}


def measure(
    models: Sequence[BenchmarkModel],
    config: Mapping[str, Any],
    out_dir: Path | str,
    progress: bool = True,
    name: str = "measurements",
) -> pd.DataFrame:
    """Measure every model over ``prefill_lengths`` × ``batch_sizes``, each in a process of its own, in rounds over all
    models: the speed of a machine drifts, and must not look like a property of a size.

    A pass allocates an empty state, reads the prompt (random ids, ``prefill_chunk`` of them at a time), takes the most
    likely token, and decodes ``generate_steps`` tokens. Per cell: ``warmup`` discarded passes, then ``repeats`` rounds
    of one measured pass, or of as many as ``round_s`` allows; time to first token is the median over passes, step time
    the median over all decode steps of all passes; ``_lo``, ``_hi`` are quartiles. Peak memory: see
    ``timing.pass_memory``. A cell that would take longer than ``max_cell_s`` is ``skipped``, one whose memory does not
    suffice, by prediction or in fact, ``out_of_memory``; longer prefills and larger batches are then not tried. One
    whose process fails is ``failed``, and tried again by the next call.

    Args:
        models: what to measure.
        config: group ``inference`` of the configuration (prefill_lengths, batch_sizes, generate_steps, repeats, warmup,
            max_cell_s, num_threads, dtype; device, cpu by default; prefill_chunk, null by default; round_s, 0 by
            default).
        out_dir: folder of ``<name>.parquet``, ``.csv`` and ``.jsonl``. Every measured pass goes into the last at once;
            what it holds already (same model, settings, device, code) is not measured again.
        progress: whether a bar on stderr names the cell.
        name: of the table.

    Returns:
        The table ``measurements`` of docs/tables.md, in SI units.

    Raises:
        ValueError: no models, two of one name, or a setting outside its range.
        BenchmarkError: every cell failed.
    """
    check(config)
    if not models or len({m.name for m in models}) != len(models):
        raise ValueError(f"models to measure need distinct names, at least one: {[m.name for m in models]}")
    where = str(config.get("device") or "cpu")
    dtype = resolve_compute_dtype(str(config["dtype"]), where)
    settings = {key: config[key] for key in ("generate_steps", "repeats", "warmup", "max_cell_s", "num_threads")}
    settings |= {"prefill_chunk": config.get("prefill_chunk"), "dtype": dtype, "device": device_name(where)}
    settings["round_s"] = float(config.get("round_s") or 0.0)
    records, repeats = Records(Path(out_dir) / f"{name}.jsonl"), int(config["repeats"])
    grid = [(batch, length) for batch in sorted(config["batch_sizes"]) for length in sorted(config["prefill_lengths"])]
    plan: list[tuple[BenchmarkModel, list[Cell]]] = []
    for entry in models:
        about = {"model": entry.name, "trained": entry.trained, "shape": entry.shape.as_dict(), **settings}
        about["code"] = code_digest()
        cells = [Cell(batch, length, digest(about | {"cell": [batch, length]})) for batch, length in grid]
        plan.append((entry, [records.find(cell) for cell in cells]))
    bar = tqdm(total=len(models) * len(grid), unit="cell", file=sys.stderr, disable=not progress, mininterval=0.5)
    with bar:
        for rounds in range(1, repeats + 1):
            for entry, cells in plan:

                def begin(cell: Cell, entry: BenchmarkModel = entry, rounds: int = rounds) -> None:
                    what = f"round {rounds}: {entry.name} batch {cell.batch_size} prefill {cell.prefill_length}"
                    bar.set_description(what, refresh=False)

                def changed(cell: Cell) -> None:
                    records.keep(cell)
                    bar.n = sum(share_done(cell, repeats) for _, cells in plan for cell in cells)
                    bar.update(0)

                until = repeats if weight_bytes(entry.shape, dtype_bytes(dtype)) > LARGE_BYTES else rounds
                measure_model(entry, {**config, **settings, "device": where}, where, cells, until, begin, changed)
    rows = [_row(entry, cell, settings) for entry, cells in plan for cell in cells]
    table = finish_table(rows)
    if (table["status"] == "failed").all():
        raise BenchmarkError(f"not one cell could be measured: {'; '.join(sorted(set(table['detail'])))}")
    write_table(table, Path(out_dir) / name)
    return table


def measured_device(config: Mapping[str, Any]) -> pd.DataFrame:
    """The table ``device``: what this machine reaches with the settings of the group ``inference``."""
    where = str(config.get("device") or "cpu")
    dtype = resolve_compute_dtype(str(config["dtype"]), where)
    return probe_device(where, device_name(where), dtype, int(config["num_threads"]))
