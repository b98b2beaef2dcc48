"""The roofline of inference: FLOPs per byte of prefill and of generation, and where they cross a device's ridge.

A phase whose arithmetic intensity (FLOPs over bytes moved) lies above the ridge (FLOP/s over bandwidth) is bound by
computing, below it by memory (Williams et al., 2009). FLOPs and bytes are those of ``accounting``, inference part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import ModelShape, prefill_work, shape_of_row, step_work
from xlstm_scaling.inference.counts import LOGITS_COLUMN, dtype_bytes
from xlstm_scaling.inference.probe import peaks
from xlstm_scaling.study.files import write_table

PHASES = ("prefill", "generation")
#: longest context, and largest batch, that are looked at
MOST_TOKENS, MOST_SEQUENCES = 2**20, 2**16
LEAST_TOKENS = 16

NEEDED = ("ttft_flops", "ttft_bytes", "step_time_flops", "step_time_bytes")
_KEYS = ("arch", "model", "num_params", "device", "dtype", "phase", "against")
ROOFLINE_COLUMNS = (
    *_KEYS, "batch_size", "prefill_length", "flops", "bytes", "intensity", "time_s", "flops_per_s", "ridge"
)  # fmt: skip
CROSSING_COLUMNS = (
    *_KEYS, "batch_size", "prefill_length", "ridge", "crossing", "intensity_min", "intensity_max", "status", "detail"
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """The intensity of one phase of a model against ``context`` or ``batch``; ``kept``: the other of the two numbers.

    ``size``: bytes of a weight and of an activation; ``logits``: a prefill's, of its ``last`` token or of ``all``.
    """

    shape: ModelShape
    phase: str
    against: str
    kept: int
    size: int
    logits: str = "last"

    @property
    def ends(self) -> tuple[int, int]:
        """The numbers that are looked at."""
        return (LEAST_TOKENS, MOST_TOKENS) if self.against == "context" else (1, MOST_SEQUENCES)

    def place(self, x: int) -> dict[str, int]:
        """Batch and prefill at ``x`` tokens or sequences."""
        batch, length = (self.kept, x) if self.against == "context" else (x, self.kept)
        return {"batch_size": batch, "prefill_length": length}

    def counts(self, x: int) -> dict[str, float]:
        """FLOPs, bytes and FLOPs per byte of a whole prefill, or of one step after it."""
        place = self.place(x)
        numbers = (self.shape, place["prefill_length"], place["batch_size"], self.size, self.size)
        work = prefill_work(*numbers, logits=self.logits) if self.phase == "prefill" else step_work(*numbers)
        return {"flops": float(work.flops), "bytes": float(work.bytes), "intensity": float(work.flops / work.bytes)}


def crossing(intensity: Callable[[int], float], ridge: float, least: int, most: int) -> tuple[int | None, str]:
    """Where a function of a whole number crosses the ridge first -> (number, status).

    ``rises``: the least number at which it is above; ``falls``: the least at which it is not any more; ``above`` or
    ``below``: it is so at all of ``least``, twice it, … ``most``, and there is no number.
    """
    grid = list(_doublings(least, most))
    above = [intensity(x) >= ridge for x in grid]
    change = next((k for k in range(1, len(grid)) if above[k] != above[0]), None)
    if change is None:
        return None, "above" if above[0] else "below"
    before, after = grid[change - 1], grid[change]
    while after - before > 1:
        middle = (before + after) // 2
        if (intensity(middle) >= ridge) == above[0]:
            before = middle
        else:
            after = middle
    return after, "falls" if above[0] else "rises"


def _doublings(least: int, most: int) -> Iterator[int]:
    x = least
    while x < most:
        yield x
        x *= 2
    yield most


def _detail(curve: Curve, place: int | None, status: str, values: tuple[float, float]) -> str:
    """A sentence: how far, or from where on, a phase is bound by what."""
    what = {"context": "tokens", "batch": "sequences"}[curve.against]
    bound = "bound by computing" if status in ("above", "rises") else "bound by memory"
    if place is not None:
        return f"{curve.phase} is {bound} from {place:,} {what} on"
    which = f"at most {values[1]:.3g}" if status == "below" else f"at least {values[0]:.3g}"
    return f"{curve.phase} is {bound} up to {curve.ends[1]:,} {what}: {which} FLOPs per byte"


def _curve_rows(curve: Curve, about: dict[str, Any], ridge: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of ``roofline`` of one curve, and its row of ``crossings``."""
    keys = about | {"phase": curve.phase, "against": curve.against, "ridge": ridge}
    points = [keys | curve.place(x) | curve.counts(x) for x in _doublings(*curve.ends)]
    values = [point["intensity"] for point in points]
    kept = "batch_size" if curve.against == "context" else "prefill_length"
    row = keys | {kept: curve.kept, "intensity_min": min(values), "intensity_max": max(values)}
    if not np.isfinite(ridge):
        return points, row | {"status": "no_ridge", "detail": "nothing is known of the device's peaks"}
    place, status = crossing(lambda x: curve.counts(x)["intensity"], ridge, *curve.ends)
    detail = _detail(curve, place, status, (min(values), max(values)))
    return points, row | {"crossing": place, "status": status, "detail": detail}


def _measured(rows: pd.DataFrame, ridges: dict[str, float]) -> list[dict[str, Any]]:
    """What was measured, as FLOPs per byte and per second."""
    found = []
    for quantity, phase in (("ttft", "prefill"), ("step_time", "generation")):
        time_s = rows[f"{quantity}_s"].astype(float)
        for row in rows[(rows["status"] == "ok") & (time_s > 0) & (rows["prefill_length"] > 0)].to_dict("records"):
            flops, num_bytes, time = row[f"{quantity}_flops"], row[f"{quantity}_bytes"], row[f"{quantity}_s"]
            keys = {name: row[name] for name in _KEYS if name in row}
            keys |= {"phase": phase, "against": "measured", "ridge": ridges[row["device"]]}
            keys |= {name: row[name] for name in ("batch_size", "prefill_length")}
            rates = {"flops": flops, "bytes": num_bytes, "intensity": flops / num_bytes, "time_s": time}
            found.append(keys | rates | {"flops_per_s": flops / time})
    return found


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(columns))
    text = {"arch", "model", "device", "dtype", "phase", "against", "status", "detail"}
    return table.astype({name: "str" if name in text else "float64" for name in columns})


def roofline_tables(counted: pd.DataFrame, device: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Arithmetic intensities and where they cross the ridge: the tables ``roofline`` and ``crossings``.

    Args:
        counted: measurements with the counts of ``counts.add_counts``.
        device: the table ``device``.

    Returns:
        ``roofline``: every model's intensity against the context (at the smallest and the largest batch measured) and
        against the batch (at the shortest and the longest prefill measured), and that of every measurement with the
        FLOP/s it reached. ``crossings``: one row a curve. See docs/tables.md.

    Raises:
        KeyError: the counts are missing.
    """
    if missing := [name for name in NEEDED if name not in counted]:
        raise KeyError(f"measurements lack {', '.join(missing)}: counts.add_counts adds them")
    ridges = {}
    for name in counted["device"].unique():
        peak = peaks(device, name)
        ridges[name] = peak["flops_per_s"] / peak["bytes_per_s"]
    curves: list[dict[str, Any]] = []
    crossings: list[dict[str, Any]] = []
    for _, rows in counted.groupby(["model", "device"], sort=False):
        lengths = rows.loc[rows["prefill_length"] > 0, "prefill_length"]
        if lengths.empty:
            continue
        first, kept = rows.iloc[0], {}
        for against, numbers in (("context", rows["batch_size"]), ("batch", lengths)):
            kept[against] = sorted({int(numbers.min()), int(numbers.max())})
        about = {key: first[key] for key in ("arch", "model", "num_params", "device", "dtype")}
        shape, size = shape_of_row(first), dtype_bytes(str(first["dtype"]))
        logits = str(first.get(LOGITS_COLUMN, "last"))
        for phase, against in product(PHASES, kept):
            for number in kept[against]:
                points, row = _curve_rows(
                    Curve(shape, phase, against, number, size, logits), about, ridges[first["device"]]
                )
                curves += points
                crossings.append(row)
    return _table(curves + _measured(counted, ridges), ROOFLINE_COLUMNS), _table(crossings, CROSSING_COLUMNS)


def write_rooflines(counted: pd.DataFrame, device: pd.DataFrame, folder: Path) -> None:
    """The tables ``device``, ``roofline`` and ``crossings`` in ``folder``; see `roofline_tables`."""
    roofline, crossings = roofline_tables(counted, device)
    for name, table in (("device", device), ("roofline", roofline), ("crossings", crossings)):
        write_table(table, folder / name)
