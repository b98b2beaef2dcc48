"""Time to first token and step time on this machine, over models, prefill lengths and batch sizes."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from xlstm_scaling.accounting import ModelShape, count_params, make_shape
from xlstm_scaling.inference.cells import BenchmarkModel, Cell, ModelRun
from xlstm_scaling.inference.records import Records, finish_table
from xlstm_scaling.models import LanguageModel, build_model
from xlstm_scaling.study.files import digest, write_table
from xlstm_scaling.study.machine import resolve_compute_dtype

BUSY_SHARE = 0.2  # of all CPUs; above it the rest of the machine is mentioned in `detail`


def untrained_models(
    sizes: Mapping[str, Mapping[str, Any]],
    architectures: Sequence[str],
    vocab_size: int,
    chunk_size: int = 64,
    model_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[BenchmarkModel]:
    """Models of given sizes with random weights: how long a token takes does not depend on what was learned.

    Args:
        sizes: name → embedding_dim, num_blocks, num_heads (architecture → number of heads; others are left out).
        architectures: architectures to build.
        vocab_size: of all models [tokens].
        chunk_size: mLSTM chunk that FLOPs and bytes are counted at [tokens].
        model_options: architecture → options of ``build_model``.

    Raises:
        ValueError: an unknown architecture or dimensions that do not divide.
    """
    models = []
    for arch in architectures:
        options = dict((model_options or {}).get(arch, {}))
        for name, size in sizes.items():
            if arch not in size["num_heads"]:
                continue
            heads = size["num_heads"][arch]
            shape = make_shape(arch, size["embedding_dim"], size["num_blocks"], heads, vocab_size, chunk_size)
            build = _Build(shape, options)
            models.append(BenchmarkModel(f"{arch}-{name}", arch, shape, trained=False, build=build))
    return models


@dataclass(frozen=True)
class _Build:
    shape: ModelShape
    options: Mapping[str, Any]

    def __call__(self) -> LanguageModel:
        return build_model(self.shape, seed=0, **self.options)


def device_name(device: str = "cpu") -> str:
    """What the tables call this machine: the name of its GPU or CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(config: Mapping[str, Any]) -> None:
    for key in ("generate_steps", "repeats", "num_threads"):
        if int(config[key]) < 1:
            raise ValueError(f"inference.{key} must be at least 1, got {config[key]}")
    if int(config["warmup"]) < 1:
        raise ValueError(
            f"inference.warmup must be at least 1 (it finds out how long a cell takes), got {config['warmup']}"
        )
    for key in ("prefill_lengths", "batch_sizes"):
        if not config[key] or min(config[key]) < 1:
            raise ValueError(f"inference.{key} must list positive integers, got {config[key]}")
    if not float(config["max_cell_s"]) > 0:
        raise ValueError(f"inference.max_cell_s must be positive, got {config['max_cell_s']}")


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
    others = float(np.median(cell.others)) if cell.others else 0.0
    if ok and others > BUSY_SHARE:
        cell.detail = f"other processes used {100 * others:.0f} % of the CPUs meanwhile"
    row |= {"peak_memory_bytes": cell.peak_memory_bytes, "repeats": len(cell.ttft_s) if ok else 0}
    row |= {key: settings[key] for key in ("dtype", "num_threads", "device")}
    return row | {"status": cell.status, "detail": cell.detail}


def measure(
    models: Sequence[BenchmarkModel], config: Mapping[str, Any], out_dir: Path | str, progress: bool = True
) -> pd.DataFrame:
    """Measure every model over ``prefill_lengths`` × ``batch_sizes``.

    A pass allocates an empty state, reads the prompt (random ids), takes the most likely token, and decodes
    ``generate_steps`` tokens. Per cell: ``warmup`` discarded passes, ``repeats`` measured ones; time to first token is
    the median over passes, step time the median over all decode steps of all passes; ``_lo``, ``_hi`` are quartiles.
    A cell that would take longer than ``max_cell_s`` is ``skipped``, one whose memory does not suffice
    ``out_of_memory``; longer prefills of the same batch are then not tried. Peak memory: see ``timing.pass_memory``.

    Args:
        models: what to measure; one at a time is in memory.
        config: group ``inference`` of the configuration (prefill_lengths, batch_sizes, generate_steps, repeats, warmup,
            max_cell_s, num_threads, dtype; device, cpu by default).
        out_dir: folder of ``measurements.parquet``, ``.csv`` and ``measurements.jsonl``. Cells go into the last as they
            are finished; those that it holds already (same model, settings, device) are not measured again.
        progress: whether a bar on stderr names the cell.

    Returns:
        The table ``measurements`` of docs/tables.md, in SI units.

    Raises:
        ValueError: no models, two of one name, or a setting outside its range.
    """
    _check(config)
    if not models or len({m.name for m in models}) != len(models):
        raise ValueError(f"models to measure need distinct names, at least one: {[m.name for m in models]}")
    where = str(config.get("device") or "cpu")
    dtype = resolve_compute_dtype(str(config["dtype"]), where)
    settings = {key: config[key] for key in ("generate_steps", "repeats", "warmup", "max_cell_s", "num_threads")}
    settings |= {"dtype": dtype, "device": device_name(where)}
    records = Records(Path(out_dir) / "measurements.jsonl")
    grid = [(batch, length) for batch in sorted(config["batch_sizes"]) for length in sorted(config["prefill_lengths"])]
    wanted: list[str] = []
    bar = tqdm(total=len(models) * len(grid), unit="cell", file=sys.stderr, disable=not progress, mininterval=0.5)
    with _threads(int(config["num_threads"])), bar:
        for entry in models:
            about = {"model": entry.name, "trained": entry.trained, "shape": entry.shape.as_dict(), **settings}
            cells = [Cell(batch, length, digest(about | {"cell": [batch, length]})) for batch, length in grid]
            wanted += [cell.key for cell in cells]
            missing = [cell for cell in cells if cell.key not in records]
            bar.update(len(cells) - len(missing))

            def done(cell: Cell, entry: BenchmarkModel = entry) -> None:
                records.append(cell.key, _row(entry, cell, settings))
                bar.update()

            def name(cell: Cell, entry: BenchmarkModel = entry) -> None:
                bar.set_description(
                    f"{entry.name} batch {cell.batch_size} prefill {cell.prefill_length}", refresh=False
                )

            if missing:
                ModelRun(entry, {**config, "dtype": dtype}, where, missing).run(done, name)
    table = finish_table([records[key] for key in wanted])
    write_table(table, Path(out_dir) / "measurements")
    return table
