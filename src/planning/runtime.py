"""Time to first token and step time of many shapes: by the runtime model of a study, or by a data sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.accounting import ModelShape, dtype_bytes, prefill_bytes, prefill_flops, step_bytes, step_flops
from xlstm_scaling.accounting.hardware import DEVICES, Device, find_device
from xlstm_scaling.planning.errors import PlanningError

Array = NDArray[np.float64]
#: shares of the data sheet's peaks that a roofline estimate assumes; no overhead of launches is in it
ROOFLINE_COMPUTE, ROOFLINE_BANDWIDTH = 0.5, 0.6


@dataclass(frozen=True)
class Load:
    """What is served side by side: requests of P prompt tokens and G generated ones."""

    prefill_length: int
    generate_length: int = 1
    batch_size: int = 1

    @property
    def last_position(self) -> int:
        """Tokens before the last one generated: its step is the slowest. One step is timed at least."""
        return self.prefill_length + max(self.generate_length - 2, 0)


class Runtime(Protocol):
    """Times of one device. ``about``: what they come from, for people; ``assumed``: no measurement is behind them.

    ``ranges``: quantity -> (least, largest) measured. ``errors``: (arch, quantity) -> held-out relative error.
    """

    device: str
    dtype: str
    about: str
    assumed: bool
    ranges: Mapping[str, tuple[float, float]]
    errors: Mapping[tuple[str, str], float]

    def times(self, shapes: Sequence[ModelShape], load: Load) -> tuple[Array, Array]:
        """(time to first token, step time) [s] of shapes of one architecture, (K,) each."""
        ...


@dataclass(frozen=True)
class Roofline:
    """FLOPs over half the peak, or bytes over 60 % of the bandwidth, whichever takes longer: an assumption."""

    sheet: Device
    dtype: str = "bfloat16"
    assumed: bool = True
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    errors: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return self.sheet.name

    @property
    def about(self) -> str:
        return (
            f"assumed, not measured: roofline of the {self.sheet.name}'s data sheet at {ROOFLINE_COMPUTE:.0%} of its "
            f"{self.dtype} FLOP/s and {ROOFLINE_BANDWIDTH:.0%} of its bandwidth, without launch overheads"
        )

    def times(self, shapes: Sequence[ModelShape], load: Load) -> tuple[Array, Array]:
        batch, prompt, position = load.batch_size, load.prefill_length, load.last_position
        compute = ROOFLINE_COMPUTE * self.sheet.flops_per_s(self.dtype)
        memory = ROOFLINE_BANDWIDTH * self.sheet.bytes_per_s
        width = {"weight": dtype_bytes(self.dtype), "act": dtype_bytes(self.dtype)}
        ttft = [
            max(prefill_flops(s, prompt, batch) / compute, prefill_bytes(s, prompt, batch, **width) / memory)
            for s in shapes
        ]
        step = [
            max(step_flops(s, position, batch) / compute, step_bytes(s, position, batch, **width) / memory)
            for s in shapes
        ]
        return np.array(ttft), np.array(step)


@dataclass(frozen=True)
class FittedRuntime:
    """The runtime model of a study: ``rows`` (arch, quantity) -> row of the table ``runtime_model``."""

    rows: Mapping[tuple[str, str], Mapping[str, Any]]
    device: str
    source: str
    dtype: str = "bfloat16"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    assumed: bool = False

    @property
    def about(self) -> str:
        return f"runtime model of {self.device!r} fitted to measurements ({self.source})"

    @property
    def errors(self) -> dict[tuple[str, str], float]:
        return {key: float(row["mape_held_out"]) for key, row in self.rows.items()}

    def times(self, shapes: Sequence[ModelShape], load: Load) -> tuple[Array, Array]:
        ttft = [self._time("ttft", shape, load) for shape in shapes]
        return np.array(ttft), np.array([self._time("step_time", shape, load) for shape in shapes])

    def _time(self, quantity: str, shape: ModelShape, load: Load) -> float:
        if (shape.arch, quantity) not in self.rows:
            raise PlanningError(
                f"{self.source} has no usable runtime model of {shape.arch}'s {quantity} on {self.device!r}; "
                "without --runtime a roofline of the data sheet is assumed"
            )
        return predict(self.rows[shape.arch, quantity], quantity, shape, load)


def predict(row: Mapping[str, Any], quantity: str, shape: ModelShape, load: Load) -> float:
    """Time [s] by a row of ``runtime_model``; logits of the prompt's last token only."""
    from xlstm_scaling.fitting.runtime_model import predict_step_time_s, predict_ttft_s

    if quantity == "ttft":
        return float(predict_ttft_s(row, shape, load.batch_size, load.prefill_length, logits="last"))
    return float(predict_step_time_s(row, shape, load.batch_size, load.last_position))


def load_runtime(folder: Path | None, device: str | None, implied: Path | None = None) -> Runtime | None:
    """The runtime to plan with.

    Args:
        folder: ``inference`` folder of a study (or its table); used whatever its device is called.
        device: a name; with a folder it picks one of several devices, without one it names a data sheet.
        implied: a folder to use where none is given, if its device is the one named, or none is.

    Returns None where there is neither. Raises PlanningError: nothing usable in a folder that was given, several
    devices in it and none named, or a device without data sheet or runtime model.
    """
    if folder is not None:
        found = fitted_runtime(folder, device)
        if found is None:
            raise PlanningError(f"{folder} holds no runtime_model.parquet: give the folder of the stage `inference`")
        return found
    if implied is not None:
        found = fitted_runtime(implied, device, matching=True)
        if found is not None:
            return found
    return None if device is None else Roofline(named_device(device))


def named_device(name: str) -> Device:
    """The data sheet of a device; PlanningError lists the names that have one."""
    found = find_device(name)
    if found is None:
        raise PlanningError(f"no device {name!r}; there are data sheets of: {', '.join(DEVICES)}")
    return found


def fitted_runtime(folder: Path, device: str | None, matching: bool = False) -> FittedRuntime | None:
    """The runtime model in a folder; None where it has none, or, if ``matching``, none of that device."""
    path = Path(folder)
    path = path if path.suffix == ".parquet" else path / "runtime_model.parquet"
    if not path.is_file():
        return None
    return runtime_of_table(pd.read_parquet(path), device, str(path.parent), matching)


def runtime_of_table(
    table: pd.DataFrame, device: str | None, source: str, matching: bool = False
) -> FittedRuntime | None:
    """The runtime model of a table ``runtime_model``; None where it has none of that device and ``matching``."""
    if "dtype" not in table:
        raise PlanningError(
            f"the runtime model in {source} was made by an older version: run the stage `inference` again"
        )
    table = table[table["status"] == "ok"]
    known = sorted(table["device"].unique())
    if device is not None:
        chosen = [name for name in known if same_device(device, name)]
        if not chosen and matching:
            return None
        if not chosen and len(known) > 1:
            raise PlanningError(f"{source} has no device {device!r}; there are: {', '.join(known)}")
        known = chosen or known
    if len(known) != 1:
        raise PlanningError(
            f"{source} has the devices {', '.join(known) or 'none that is usable'}: name one by --device"
        )
    mine = table[table["device"] == known[0]]
    rows = {(str(row["arch"]), str(row["quantity"])): row for row in mine.to_dict("records")}
    return FittedRuntime(rows, known[0], source, str(mine["dtype"].iloc[0]), _ranges(mine))


def same_device(wanted: str, known: str) -> bool:
    """Whether two names mean the same device: equal, or of one data sheet."""
    if wanted.lower() == known.lower():
        return True
    sheet = find_device(wanted)
    return sheet is not None and sheet == find_device(known)


def _ranges(rows: pd.DataFrame) -> dict[str, tuple[float, float]]:
    names = [name for name in ("num_params", "batch_size", "prefill_length") if f"{name}_min" in rows]
    return {name: (float(rows[f"{name}_min"].min()), float(rows[f"{name}_max"].max())) for name in names}
