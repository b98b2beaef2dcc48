"""The table of measurements, and the file that cells are kept in while they are measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from xlstm_scaling.inference.cells import Cell

_INTEGERS = (
    *("num_params", "embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v", "ffn_dim", "vocab_size"),
    *("batch_size", "prefill_length", "repeats", "num_threads"),
)
_TEXT = ("arch", "model", "energy_source", "energy_detail", "dtype", "device", "status", "detail")
MEASUREMENT_COLUMNS = (
    *("arch", "model", "num_params", "embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v"),
    *("ffn_dim", "vocab_size", "chunk_size", "attention_every"),
    *("trained", "batch_size", "prefill_length", "prefill_chunk"),
    *("ttft_s", "ttft_s_lo", "ttft_s_hi", "step_time_s", "step_time_s_lo", "step_time_s_hi", "decode_tokens_per_s"),
    *("peak_memory_bytes", "predicted_memory_bytes"),
    *("prefill_energy_j_per_token", "decode_energy_j_per_token", "energy_source", "energy_detail"),
    *("repeats", "load", "dtype", "num_threads", "device", "status", "detail"),
)


def finish_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table ``measurements`` of docs/tables.md with its columns and types; None in a number becomes NaN."""
    table = pd.DataFrame(list(rows), columns=list(MEASUREMENT_COLUMNS))
    for column in MEASUREMENT_COLUMNS:
        if column in _INTEGERS:
            table[column] = table[column].astype("int64")
        elif column == "trained":
            table[column] = table[column].astype("bool")
        elif column in _TEXT:
            table[column] = table[column].astype("object").where(table[column].notna(), "").astype("str")
        else:
            table[column] = table[column].astype("float64")
    return table


class Records:
    """Cells by key in a JSON-lines file, the last line of a key counts: one is added after every measured pass.

    A line that an interruption cut short is ignored. Raises OSError where the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cells: dict[str, Cell] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                cell = Cell(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue
            self._cells[cell.key] = cell
        if text and not text.endswith("\n"):
            with path.open("a") as stream:
                stream.write("\n")

    def find(self, empty: Cell) -> Cell:
        """What is known of this cell: measured, too large for the memory, measured in part, or ``empty``. One whose
        process failed, or that took too long, is tried again: whoever calls again may have a quieter machine."""
        known = self._cells.get(empty.key, empty)
        return empty if known.status in ("failed", "skipped") else known

    def keep(self, cell: Cell) -> None:
        """Write a cell as it is now."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(asdict(cell)) + "\n")
        self._cells[cell.key] = cell
