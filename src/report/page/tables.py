"""The first rows of the tables that readers ask for, each with its file beside the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

#: rows that are shown
ROWS = 12
#: columns that fit on a sheet of paper
PAPER_COLUMNS = 12
#: table -> (title, columns in order; () for all of them)
INTEREST: dict[str, tuple[str, tuple[str, ...]]] = {
    "runs": (
        "Runs",
        (
            *("run_id", "arch", "status", "experiment_set", "context_length", "num_params", "num_tokens", "num_flops"),
            *("tokens_per_param", "learning_rate", "epochs", "val_loss", "train_loss", "tokens_per_s", "mfu"),
        ),
    ),
    "fits/isoflop": ("IsoFLOP minima", ()),
    "fits/power_laws": ("Power laws of the minima", ()),
    "fits/surface": (
        "Loss surfaces",
        (
            *("arch", "context_length", "subset", "form", "huber_delta", "status", "A", "B", "E", "alpha", "beta"),
            *("gamma", "exponent_params", "exponent_params_lo", "exponent_params_hi", "rmse_log", "num_runs", "detail"),
        ),
    ),
    "fits/overtraining": ("Over-training slopes", ()),
    "fits/pareto_ratio": ("FLOPs for equal loss", ()),
    "fits/forecasts": ("Forecasts of larger budgets", ()),
    "optimal": ("Optimal size, tokens and compute", ()),
    "evaluation/length": (
        "Loss by position",
        (
            *("arch", "context_length", "num_params", "position_min", "position_max", "num_documents", "loss"),
            *("loss_lo", "loss_hi", "reference_loss", "excess", "excess_lo", "excess_hi", "status", "detail"),
        ),
    ),
    "inference/measurements": (
        "Inference measurements",
        (
            *("arch", "model", "num_params", "batch_size", "prefill_length", "ttft_s", "ttft_s_lo", "ttft_s_hi"),
            *("step_time_s", "step_time_s_lo", "step_time_s_hi", "peak_memory_bytes", "device", "status", "detail"),
        ),
    ),
    "inference/runtime_model": (
        "Runtime models",
        (
            *("arch", "quantity", "device", "dtype", "linear_flops_per_s", "mixing_flops_per_s", "weight_bytes_per_s"),
            *("state_bytes_per_s", "overhead_s", "overhead_per_block_s", "mape_fit", "mape_held_out", "mape_noise"),
            *("num_measurements", "status", "detail"),
        ),
    ),
}


@dataclass(frozen=True)
class Preview:
    """The head of a table; ``cells`` are (shown, number or not)."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[tuple[str, bool]]]
    num_rows: int
    csv: str

    @property
    def wide(self) -> bool:
        """Whether paper is too narrow for it."""
        return len(self.columns) > PAPER_COLUMNS


def previews(tables: Mapping[str, pd.DataFrame]) -> list[Preview]:
    """Those that are there and have rows."""
    return [
        preview(name, title, tables[name], columns)
        for name, (title, columns) in INTEREST.items()
        if name in tables and len(tables[name])
    ]


def preview(name: str, title: str, table: pd.DataFrame, columns: tuple[str, ...] = (), rows: int = ROWS) -> Preview:
    """The first rows; columns that are empty throughout are left out."""
    chosen = [column for column in columns or table.columns if column in table and not _empty(table[column])]
    body = [[cell(value) for value in row] for row in table[chosen].head(rows).itertuples(index=False, name=None)]
    return Preview(name, title, chosen, body, len(table), f"{name}.csv")


def cell(value: Any) -> tuple[str, bool]:
    """A value for people, to four digits, and whether it is a number."""
    if isinstance(value, bool):
        return ("yes" if value else "no"), False
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "", False
    if isinstance(value, (int, float)) or hasattr(value, "dtype"):
        number = float(value)
        if number == round(number) and abs(number) < 1e7:
            return f"{number:,.0f}", True
        return f"{number:.4g}", True
    return str(value), False


def _empty(column: pd.Series) -> bool:
    return bool(column.isna().all() or (column.astype(str).str.strip() == "").all())
