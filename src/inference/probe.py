"""What a device reaches: large matrix products, and its memory's bandwidth; measured in a few seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from xlstm_scaling.accounting.hardware import DEVICES, find_device
from xlstm_scaling.accounting.memory import HEADROOM
from xlstm_scaling.inference.cells import Load
from xlstm_scaling.inference.timing import available_bytes
from xlstm_scaling.inference.worker import call

DEVICE_COLUMNS = (
    *("device", "dtype", "num_threads", "quantity", "value", "value_lo", "value_hi", "repeats", "load"),
    *("source", "method"),
)
#: rows and columns of the matrices that are multiplied, and bytes that are read: far more than caches hold
SIZES = {"cpu": (1536, 2**28), "cuda": (8192, 2**31)}
PROBE_S = 1.0  # each quantity is measured for about so long
LEAST_REPEATS = 5


def _times(work: Callable[[], Any], device: str) -> list[float]:
    """Seconds of repeated calls, after one that is discarded."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once()]
    while len(times) < LEAST_REPEATS or sum(times) < PROBE_S:
        times.append(once())
    return times


def _probe(send: Callable, device: str, dtype_name: str) -> list[dict[str, Any]]:
    dtype, kind = getattr(torch, dtype_name), device.split(":")[0]
    side, size = SIZES[kind]
    while 3 * size > HEADROOM * available_bytes(device):
        size //= 2
    rows: list[dict[str, Any]] = []

    def add(quantity: str, amount: float, method: str, work: Callable[[], Any]) -> None:
        load = Load()
        rates = [amount / seconds for seconds in _times(work, device)]
        lo, _, hi = statistics.quantiles(rates, n=4)
        row = {"quantity": quantity, "value": statistics.median(rates), "value_lo": lo, "value_hi": hi}
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
    return rows


def device_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table ``device`` of docs/tables.md."""
    table = pd.DataFrame(rows, columns=list(DEVICE_COLUMNS))
    numbers = ("value", "value_lo", "value_hi", "load")
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
