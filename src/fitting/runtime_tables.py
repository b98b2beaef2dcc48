"""Columns and checks of the runtime model's tables (docs/tables.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.accounting.hardware import find_device

from .runtime_solver import TERMS
from .tables import FitError

Array = NDArray[np.float64]
#: ``ttft_raw``: times to first token of a second published version, where there is one; counted as ``ttft``
QUANTITIES = ("ttft", "ttft_raw", "step_time")
#: the column of each term's constant
PARAMETERS = {
    "linear_flops": "linear_flops_per_s",
    "weight_bytes": "weight_bytes_per_s",
    "mixing_flops": "mixing_flops_per_s",
    "scores": "scores_per_s",
    "state_bytes": "state_bytes_per_s",
    "wait": "parallel_streams",
    "cache": "cache_bytes",
    "activation_bytes": "activation_bytes_per_s",
    "constant": "overhead_s",
    "block": "overhead_per_block_s",
    "batched_block": "overhead_per_batched_block_s",
    "sequence": "overhead_per_sequence_s",
}
#: constants that are the inverse of their cost
RATES = tuple(term for term in TERMS if PARAMETERS[term].endswith("_per_s"))
#: a rate may be so many times what a probe saw; a cache may hold so many times less than its data sheet says, and so
#: many times more or less than a probe saw: that one reads alone, models write as well
PROBE_MARGIN, CACHE_MARGIN, PROBED_CACHE_MARGIN = 1.1, 2.0, 4.0
#: columns of the table of measurements, after ``ttft_`` or ``step_time_``
COUNTS = ("linear_flops", "weight_bytes", "mixing_flops", "scores", "state_bytes", "streams", "activation_bytes")
SETTINGS = ("dtype", "num_threads", "prefill_logits")
KEYS = ("arch", "model", "num_params", "batch_size", "prefill_length", "dtype", "num_threads", "device")
RANGES = ("num_params", "batch_size", "prefill_length")
TEXT = ("arch", "quantity", "device", "dtype", "prefill_logits", "status", "detail")
MODEL_COLUMNS = (
    *("arch", "quantity", "device", "dtype", "prefill_logits", "norm_p"),
    *(f"{PARAMETERS[term]}{end}" for term in TERMS for end in ("", "_lo", "_hi")),
    *("mape_fit", "mape_held_out", "mape_noise", "num_measurements"),
    *(f"{name}_{end}" for name in RANGES for end in ("min", "max")),
    *("status", "detail"),
)
PREDICTION_COLUMNS = (*KEYS, "quantity", "measured_s", "predicted_s", "flops", "bytes", "held_out")


def counted_as(quantity: str) -> str:
    """The beginning of the columns that count the work of a quantity."""
    return "ttft" if quantity == "ttft_raw" else quantity


def constants(costs: Array) -> dict[str, float]:
    """Costs (K,) by the names of the columns: a rate of a term that costs nothing is NaN, an overhead is 0."""
    values = {}
    for term, cost in zip(TERMS, costs.tolist()):
        rate = 1.0 / cost if cost > 0 else float("nan")
        values[PARAMETERS[term]] = rate if term in RATES else cost
    return values


def costs_of(row: Mapping[str, Any]) -> Array:
    """The costs (K,) of a row of ``runtime_model``; the inverse of `constants`. A constant that the row lacks (of a
    table from before there was such a one) is none."""
    values = np.array([float(row.get(PARAMETERS[term], np.nan)) for term in TERMS])
    rate = np.array([term in RATES for term in TERMS])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.where(rate, 1.0 / values, values), nan=0.0, posinf=0.0)


def term_counts(counts: Mapping[str, Any], num_blocks: Any, batch_size: Any) -> Array:
    """Counts (n, K) of `TERMS` from those of `COUNTS`, numbers or arrays (n,) that broadcast."""
    batch = np.asarray(batch_size, dtype=np.float64)
    columns = {name: counts[name] for name in COUNTS if name != "streams"}
    columns |= {"wait": 1.0 / np.asarray(counts["streams"], dtype=np.float64), "constant": 1.0, "block": num_blocks}
    columns |= {"batched_block": num_blocks * (batch > 1), "sequence": batch}
    columns["cache"] = 1.0 / (np.asarray(counts["weight_bytes"]) + np.asarray(counts["state_bytes"]))
    return np.stack(np.broadcast_arrays(*(np.asarray(columns[term], dtype=np.float64) for term in TERMS)), axis=-1)


def device_limits(device: str, dtype: str, probed: pd.DataFrame | None = None) -> dict[str, tuple[float, float]]:
    """What is known of a device before any model ran on it, each (least, largest): ``flops_per_s``, ``bytes_per_s``,
    and ``cache_bytes``, what its last cache holds.

    By its data sheet (``accounting.hardware``), else by the table ``device`` of a probe: no rate is above the best of
    its upper quartiles by more than `PROBE_MARGIN`, and the cache is that of the probe within a factor of
    `PROBED_CACHE_MARGIN`: other virtual machines may share it. What neither says is not there.
    """
    if (sheet := find_device(device)) is not None and dtype in ("bfloat16", "float16", "float32"):
        cache = {"cache_bytes": (sheet.cache_bytes / CACHE_MARGIN, sheet.cache_bytes)}
        cache = cache if np.isfinite(sheet.cache_bytes) else {}
        return {"flops_per_s": (0.0, sheet.flops_per_s(dtype)), "bytes_per_s": (0.0, sheet.bytes_per_s)} | cache
    if probed is None:
        return {}
    mine = probed[(probed["device"] == device) & (probed["dtype"] == dtype)]
    limits = {}
    for quantity, rows in mine.groupby("quantity"):
        if quantity in ("flops_per_s", "bytes_per_s"):
            limits[str(quantity)] = (0.0, PROBE_MARGIN * float(rows["value_hi"].max()))
        elif quantity == "cache_bytes":
            value = float(rows["value"].iloc[0])
            limits["cache_bytes"] = (value / PROBED_CACHE_MARGIN, value * PROBED_CACHE_MARGIN)
    return limits


def peak_rates(limits: Mapping[str, tuple[float, float]]) -> Array:
    """The largest rates (K,) that `device_limits` allow; infinite where they do not say."""
    ends = [f"{term.split('_')[-1]}_per_s" for term in TERMS]
    return np.array([limits[end][1] if end in limits else np.inf for end in ends])


def check_measurements(measurements: pd.DataFrame, config: Mapping[str, Any]) -> None:
    """Raises FitError where a column is absent or a setting of ``runtime_model`` is too small."""
    counts = [f"{quantity}_{name}" for quantity in ("ttft", "step_time") for name in (*COUNTS, "flops", "bytes")]
    needed = [*KEYS, "prefill_logits", "num_blocks", "status", "ttft_s", "step_time_s", *counts]
    missing = [column for column in needed if column not in measurements.columns]
    if missing:
        raise FitError(
            f"the table of measurements lacks the columns {missing}; inference.counts.add_counts adds the counts"
        )
    for key, least in (("norm_p", 1.0), ("huber_delta", 1e-12), ("min_measurements", 4)):
        if float(config[key]) < least:
            raise FitError(f"runtime_model.{key} must be at least {least:g}, got {config[key]}")


def usable_rows(group: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Measurements that are ok and have a time and counts; a prompt of no tokens has no time to first token."""
    kind = counted_as(quantity)
    columns = [f"{quantity}_s", f"{kind}_flops", f"{kind}_bytes"]
    numbers = group[columns].to_numpy(dtype=np.float64, na_value=np.nan)
    good = (group["status"] == "ok").to_numpy(dtype=bool) & (np.isfinite(numbers) & (numbers > 0)).all(axis=1)
    if kind == "ttft":
        good &= (group["prefill_length"] > 0).to_numpy(dtype=bool)
    return group[good].sort_values(["num_params", "batch_size", "prefill_length", "model"], kind="stable")


def noise(rows: pd.DataFrame, quantity: str) -> float:
    """Mean absolute relative error of medians of repeats, by the spread of the repeats alone; NaN where not known.

    Of normal errors: quartiles are 1.349 σ apart, the median of n has the error 1.2533 σ / √n (large n), and a mean
    absolute error is √(2/π) of it. Repeats that share a drift of the machine have more. The quartiles of step times are
    of all steps, which are not independent: they say nothing of it.
    """
    columns = [f"{quantity}_s", f"{quantity}_s_lo", f"{quantity}_s_hi", "repeats"]
    if counted_as(quantity) != "ttft" or not set(columns) <= set(rows.columns):
        return float("nan")
    median, lo, hi, repeats = (rows[column].to_numpy(dtype=np.float64, na_value=np.nan) for column in columns)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(2 / np.pi) * 1.2533 * (hi - lo) / 1.349 / median / np.sqrt(repeats)
    error = error[np.isfinite(error)]
    return float(error.mean()) if len(error) else float("nan")


def has_second_version(group: pd.DataFrame) -> bool:
    """Whether the times of ``ttft_raw_s`` are there and differ from those of ``ttft_s``."""
    if "ttft_raw_s" not in group:
        return False
    both = group[["ttft_s", "ttft_raw_s"]].dropna()
    return bool((np.abs(both["ttft_raw_s"] / both["ttft_s"] - 1.0) > 1e-6).any())


def reasons(measurements: pd.DataFrame) -> str:
    """Why no measurement is usable: how many have which status."""
    if measurements.empty:
        return "the table is empty"
    return ", ".join(f"{number} {status}" for status, number in measurements["status"].value_counts().items()) + (
        "; no finite positive time among those that are ok" if (measurements["status"] == "ok").any() else ""
    )


def model_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table ``runtime_model``: every column with its type."""
    table = pd.DataFrame(list(rows)).reindex(columns=list(MODEL_COLUMNS))
    for name in MODEL_COLUMNS:
        table[name] = table[name].astype(
            "str" if name in TEXT else "int64" if name == "num_measurements" else "float64"
        )
    return table


def prediction_table(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """The table ``runtime_predictions`` from those of each architecture, device and quantity."""
    filled = [part for part in parts if len(part)]
    table = pd.concat(filled) if filled else pd.DataFrame(columns=list(PREDICTION_COLUMNS))
    table["held_out"] = table["held_out"].astype(bool)
    return table.reset_index(drop=True)
