"""Columns, checks and predictions of the runtime model's tables (docs/tables.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .runtime_solver import TERMS
from .tables import FitError

Array = NDArray[np.float64]
QUANTITIES = ("ttft", "step_time")
#: the column of each term's constant; the two rates are the inverse of their cost
PARAMETERS = dict(
    zip(
        TERMS,
        (
            "effective_flops_per_s",
            "bandwidth_bytes_per_s",
            *(f"overhead{s}_s" for s in ("", "_per_block", "_per_sequence")),
        ),
    )
)
RATES = TERMS[:2]
KEYS = ("arch", "model", "num_params", "batch_size", "prefill_length", "dtype", "num_threads", "device")
MODEL_COLUMNS = (
    *("arch", "quantity", "device"),
    *(f"{name}{end}" for name in PARAMETERS.values() for end in ("", "_lo", "_hi")),
    *("mape_fit", "mape_held_out", "num_measurements", "status", "detail"),
)
PREDICTION_COLUMNS = (*KEYS, "quantity", "measured_s", "predicted_s", "flops", "bytes", "held_out")


def predict_runtime(
    constants: Mapping[str, float],
    flops: ArrayLike,
    num_bytes: ArrayLike,
    num_blocks: ArrayLike,
    batch_size: ArrayLike,
    norm_p: float = 4.0,
) -> Array:
    """Times [s] from one row of the table ``runtime_model``; the arguments broadcast.

    A rate that is NaN never binds: its term is absent. An overhead that is NaN counts as none.
    """

    def cost(name: str) -> float:
        value = float(constants[name])
        return 0.0 if np.isnan(value) else 1.0 / value

    compute = cost("effective_flops_per_s") * np.asarray(flops, dtype=np.float64)
    memory = cost("bandwidth_bytes_per_s") * np.asarray(num_bytes, dtype=np.float64)
    larger = np.maximum(np.maximum(compute, memory), np.finfo(np.float64).tiny)
    roof = larger * ((compute / larger) ** norm_p + (memory / larger) ** norm_p) ** (1.0 / norm_p)
    constant, per_block, per_sequence = (np.nan_to_num(float(constants[PARAMETERS[t]])) for t in TERMS[2:])
    return roof + constant + per_block * np.asarray(num_blocks) + per_sequence * np.asarray(batch_size)


def check_measurements(measurements: pd.DataFrame, config: Mapping[str, Any]) -> None:
    needed = [*KEYS, "num_blocks", "status", *(f"{q}_{end}" for q in QUANTITIES for end in ("s", "flops", "bytes"))]
    missing = [column for column in needed if column not in measurements.columns]
    if missing:
        raise FitError(
            f"the table of measurements lacks the columns {missing}; inference.counts.add_counts adds the counts"
        )
    for key, least in (("norm_p", 1.0), ("huber_delta", 1e-12), ("min_measurements", len(TERMS) + 1)):
        if float(config[key]) < least:
            raise FitError(f"runtime_model.{key} must be at least {least:g}, got {config[key]}")


def usable_rows(group: pd.DataFrame, quantity: str) -> pd.DataFrame:
    columns = [f"{quantity}_s", f"{quantity}_flops", f"{quantity}_bytes"]
    numbers = group[columns].to_numpy(dtype=np.float64, na_value=np.nan)
    good = (group["status"] == "ok").to_numpy(dtype=bool) & (np.isfinite(numbers) & (numbers > 0)).all(axis=1)
    return group[good].sort_values(["num_params", "batch_size", "prefill_length", "model"], kind="stable")


def reasons(measurements: pd.DataFrame) -> str:
    if measurements.empty:
        return "the table is empty"
    return ", ".join(f"{number} {status}" for status, number in measurements["status"].value_counts().items()) + (
        "; no finite positive time among those that are ok" if (measurements["status"] == "ok").any() else ""
    )


def model_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows)).reindex(columns=list(MODEL_COLUMNS))
    for name in MODEL_COLUMNS:
        text = name in ("arch", "quantity", "device", "status", "detail")
        table[name] = table[name].astype("str" if text else "int64" if name == "num_measurements" else "float64")
    return table


def prediction_table(parts: list[pd.DataFrame]) -> pd.DataFrame:
    filled = [part for part in parts if len(part)]
    table = pd.concat(filled) if filled else pd.DataFrame(columns=list(PREDICTION_COLUMNS))
    table["held_out"] = table["held_out"].astype(bool)
    return table.reset_index(drop=True)
