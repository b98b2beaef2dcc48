"""What a device reaches: large matrix products, its memory's bandwidth, on a CPU that of its caches, and what the last
of them holds; measured in a few seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from xlstm_scaling.accounting.caches import memory_share
from xlstm_scaling.accounting.hardware import DEVICES, find_device
from xlstm_scaling.accounting.memory import HEADROOM
from xlstm_scaling.inference.cells import Load
from xlstm_scaling.inference.timing import available_bytes
from xlstm_scaling.inference.worker import call

DEVICE_COLUMNS = (
    *("device", "dtype", "num_threads", "quantity", "working_set_bytes", "value", "value_lo", "value_hi"),
    *("repeats", "load", "source", "method"),
)
#: rows and columns of the matrices that are multiplied, and bytes that are read: far more than caches hold
SIZES = {"cpu": (1536, 2**28), "cuda": (8192, 2**31)}
PROBE_S = 1.0  # each quantity is measured for about so long
LEAST_REPEATS = 5
#: bytes that are read over and over on a CPU, each so long; by all threads, unlike some products with a vector
WORKING_SETS, WORKING_SET_S = [2**20 * k for k in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)], 0.15
#: a cache that is not so many times as fast as memory is none
LEAST_SPEEDUP = 1.3


def _times(work: Callable[[], Any], device: str, probe_s: float = PROBE_S) -> list[float]:
    """Seconds of repeated calls, after one that is discarded."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once()]
    while len(times) < LEAST_REPEATS or sum(times) < probe_s:
        times.append(once())
    return times


def _probe(send: Callable, device: str, dtype_name: str) -> list[dict[str, Any]]:
    dtype, kind = getattr(torch, dtype_name), device.split(":")[0]
    side, size = SIZES[kind]
    while 3 * size > HEADROOM * available_bytes(device):
        size //= 2
    rows: list[dict[str, Any]] = []

    def add(quantity: str, amount: float, method: str, work: Callable[[], Any], **about: float) -> None:
        load = Load()
        rates = [amount / seconds for seconds in _times(work, device, WORKING_SET_S if about else PROBE_S)]
        lo, _, hi = statistics.quantiles(rates, n=4)
        row = {"quantity": quantity, "value": statistics.median(rates), "value_lo": lo, "value_hi": hi} | about
        # on a GPU the host waits, and says nothing of the device
        busy = load.others() if kind == "cpu" else math.nan
        rows.append(row | {"repeats": len(rates), "load": busy, "source": "measured", "method": method})

    with torch.inference_mode():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        text = f"product of two matrices of {side} x {side}"
        add("flops_per_s", 2.0 * side**3, text, lambda: torch.mm(a, b, out=out))
        columns = 4096
        matrix = torch.ones(size // columns // dtype.itemsize, columns, dtype=dtype, device=device)
        vector = torch.ones(columns, dtype=dtype, device=device)
        num_bytes = float(matrix.nbytes)
        text = f"product of a matrix of {num_bytes / 1e6:.0f} MB and a vector: bytes read"
        add("bytes_per_s", num_bytes, text, lambda: torch.mv(matrix, vector))
        copied = torch.empty_like(matrix)
        text = f"copy of {num_bytes / 1e6:.0f} MB: bytes read and written"
        add("bytes_per_s", 2 * num_bytes, text, lambda: copied.copy_(matrix))
        numbers = matrix.view(-1).view(torch.float32)
        for working_set in WORKING_SETS if kind == "cpu" and num_bytes >= 2 * WORKING_SETS[-1] else []:
            part = numbers[: working_set // numbers.itemsize]
            text = f"sum of {working_set / 1e6:.1f} MB of numbers, over and over: bytes read"
            add("cached_bytes_per_s", float(part.nbytes), text, part.sum, working_set_bytes=float(working_set))
    return rows + _cache(rows)


def _cache(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row ``cache_bytes``, where reading over and over tells of a cache."""
    curve = [row for row in rows if row["quantity"] == "cached_bytes_per_s"]
    if not curve:
        return []
    columns = ("working_set_bytes", "value", "value_lo", "value_hi")
    sets, *rates = (np.array([row[name] for row in curve]) for name in columns)
    found = [held_by_cache(sets, rate) for rate in rates]
    if math.isnan(found[0]):
        return []
    row = {"quantity": "cache_bytes", "value": found[0], "value_lo": np.nanmin(found), "value_hi": np.nanmax(found)}
    loads = [row["load"] for row in curve]
    row |= {"repeats": len(curve), "load": statistics.median(loads), "source": "measured"}
    return [row | {"method": "where the rate of reading the same bytes over and over falls to that of memory"}]


def held_by_cache(working_set_bytes: NDArray[np.float64], bytes_per_s: NDArray[np.float64]) -> float:
    """What the last cache holds [bytes], by the rate (n,) at which working sets (n,) are read over and over.

    The best C of time per byte = 1 / fast + memory_share(C / working set) · (1 / slow − 1 / fast), in logarithms, with
    the rates of the best fit, from the working set on that is read fastest: smaller ones are slower for what a call
    costs. NaN where memory is as fast, within `LEAST_SPEEDUP`.
    """
    start = min(int(np.argmax(bytes_per_s)), len(bytes_per_s) - 2)
    working_set_bytes, bytes_per_s = working_set_bytes[start:], bytes_per_s[start:]
    best, capacity, speedup = math.inf, math.nan, 1.0
    for candidate in np.geomspace(working_set_bytes[0], working_set_bytes[-1], 200):
        share = memory_share(candidate / working_set_bytes)
        weighted = np.stack([np.ones_like(share), share], axis=1) * bytes_per_s[:, None]  # relative errors
        (hit, missed), _ = nnls(weighted, np.ones_like(share))
        time = hit + missed * share
        error = np.abs(np.log(np.maximum(time, 1e-300) * bytes_per_s)).sum()
        if error < best:
            best, capacity, speedup = error, float(candidate), 1 + missed / max(hit, 1e-300)
    return capacity if speedup >= LEAST_SPEEDUP else math.nan


def device_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table ``device`` of docs/tables.md."""
    table = pd.DataFrame(rows, columns=list(DEVICE_COLUMNS))
    numbers = ("working_set_bytes", "value", "value_lo", "value_hi", "load")
    kinds = {name: "float64" if name in numbers else "str" for name in DEVICE_COLUMNS}
    return table.astype(kinds | {"num_threads": "int64", "repeats": "int64"})


def probe_device(device: str, name: str, dtype: str, num_threads: int) -> pd.DataFrame:
    """Measure a device, in a process of its own -> the table ``device``: medians and quartiles.

    Args:
        device: cpu or cuda.
        name: what the tables call it.
        dtype: of the matrices.
        num_threads: of torch, on a CPU.
    """
    rows = call(_probe, device, dtype, num_threads=num_threads)
    return device_table([{"device": name, "dtype": dtype, "num_threads": num_threads, **row} for row in rows])


def published_device(settings: Mapping[str, Any]) -> pd.DataFrame:
    """The table ``device`` by a data sheet, for measurements that others made; without rows where none is named.

    Args:
        settings: ``runs.inference``: device, dtype and ``datasheet``, a name of ``accounting.hardware``.

    Raises:
        ValueError: no such data sheet, or no peak for the dtype.
    """
    if settings["datasheet"] is None:
        return device_table([])
    found = find_device(str(settings["datasheet"]))
    if found is None:
        known = ", ".join(DEVICES)
        raise ValueError(f"runs.inference.datasheet: no data sheet of {settings['datasheet']!r}; known: {known}")
    dtype = str(settings["dtype"])
    about = {"device": settings["device"], "dtype": dtype, "num_threads": 0, "repeats": 0, "source": "data sheet"}
    about |= {"load": math.nan, "value_lo": math.nan, "value_hi": math.nan, "method": f"peak of one {found.name}"}
    rates = {"flops_per_s": found.flops_per_s(dtype), "bytes_per_s": found.bytes_per_s}
    return device_table([{**about, "quantity": quantity, "value": value} for quantity, value in rates.items()])


def peaks(table: pd.DataFrame, device: str) -> Mapping[str, float]:
    """``flops_per_s`` and ``bytes_per_s`` of a device, the best of each; NaN where there is none."""
    rows = table[table["device"] == device]
    best = rows.groupby("quantity")["value"].max()
    return {quantity: float(best.get(quantity, np.nan)) for quantity in ("flops_per_s", "bytes_per_s")}
