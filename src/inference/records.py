"""The table of measurements, and the file that cells are appended to while they are measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

_INTEGERS = (
    *("num_params", "embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v", "ffn_dim", "vocab_size"),
    *("batch_size", "prefill_length", "repeats", "num_threads"),
)
MEASUREMENT_COLUMNS = (
    *("arch", "model", "num_params", "embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v"),
    *("ffn_dim", "vocab_size", "chunk_size", "trained", "batch_size", "prefill_length"),
    *("ttft_s", "ttft_s_lo", "ttft_s_hi", "step_time_s", "step_time_s_lo", "step_time_s_hi", "decode_tokens_per_s"),
    *("peak_memory_bytes", "repeats", "dtype", "num_threads", "device", "status", "detail"),
)


def finish_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table ``measurements`` of docs/tables.md with its columns and types; None in a number becomes NaN."""
    table = pd.DataFrame(list(rows), columns=list(MEASUREMENT_COLUMNS))
    for column in MEASUREMENT_COLUMNS:
        if column in _INTEGERS:
            table[column] = table[column].astype("int64")
        elif column == "trained":
            table[column] = table[column].astype("bool")
        elif column in ("arch", "model", "dtype", "device", "status", "detail"):
            table[column] = table[column].astype("str")
        else:
            table[column] = table[column].astype("float64")
    return table


class Records:
    """Rows by key in a JSON-lines file; a line that an interruption cut short is ignored.

    Raises OSError where the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self._rows[record["key"]] = record["row"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            with path.open("a") as stream:
                stream.write("\n")

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def append(self, key: str, row: Mapping[str, Any]) -> None:
        """Write one row at once, numbers that are NaN as null."""
        clean = {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}
        with self.path.open("a") as stream:
            stream.write(json.dumps({"key": key, "row": clean}) + "\n")
        self._rows[key] = clean
