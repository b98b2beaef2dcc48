"""Launching Triton kernels: the device they are for, their configuration, and a recorder of launches.

Kernels are launched through ``launch``. Inside ``recording(target)`` nothing runs: each launch is noted with its
argument types, constants and options, so that the very launches of an operation can be compiled ahead of time for a
device that is not here (inputs are then ``meta`` tensors).

Configurations (tile sizes, warps, stages) come from the table of the device, ``configurations/<device>.json``, keyed by
kernel, dtype and shape and made by ``xlstm-scaling tune``; where it has no entry, from the kernel's own default. There
is no autotuning while a model trains.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Triton interprets kernels on the CPU; decided when Triton is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
#: a folder with tables of the user's own, read before the packaged ones
TABLES_VARIABLE = "XLSTM_SCALING_KERNEL_TABLES"
PACKAGED_TABLES = Path(__file__).parent / "configurations"


@dataclass(frozen=True)
class Target:
    """A device to compile for: ``backend`` cuda | hip | interpreter, ``arch`` 80, 90, 100, "gfx942" or "".

    ``name`` keys the table of configurations: the device's name in letters, digits and dashes, or its architecture.
    ``shared_memory_bytes``: the most that one program may use.
    """

    backend: str
    arch: int | str
    name: str
    shared_memory_bytes: int
    warp_size: int = 32

    @property
    def fp32_precision(self) -> str:
        """How fp32 products run on matrix units without losing fp32's digits: three tf32 products, or fp32 units."""
        return "tf32x3" if self.backend == "cuda" else "ieee"


#: architectures compiled ahead of time; shared memory a program may use (CUDA programming guide, AMD CDNA3 guide)
TARGETS = {
    "sm_80": Target("cuda", 80, "sm_80", 163 * 1024),
    "sm_90": Target("cuda", 90, "sm_90", 227 * 1024),
    "sm_100": Target("cuda", 100, "sm_100", 227 * 1024),
    "gfx942": Target("hip", "gfx942", "gfx942", 64 * 1024, warp_size=64),
}
_INTERPRETER = Target("interpreter", "", "interpreter", 1 << 40)
_ACTIVE: ContextVar[Target | None] = ContextVar("target", default=None)
_RECORD: ContextVar[list | None] = ContextVar("record", default=None)
_OBSERVER: ContextVar[Callable[..., None] | None] = ContextVar("observer", default=None)
_OVERRIDES: ContextVar[Mapping[str, Mapping[str, int]] | None] = ContextVar("overrides", default=None)


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, name, 64 * 1024, warp_size=64)
    arch = 10 * properties.major + properties.minor
    return Target("cuda", arch, name, getattr(properties, "shared_memory_per_block_optin", 99 * 1024))


def current_target() -> Target:
    """The device that kernels run on: the recorder's, the interpreter, or the current GPU."""
    if (active := _ACTIVE.get()) is not None:
        return active
    if INTERPRETED:
        return _INTERPRETER
    if not torch.cuda.is_available():
        raise RuntimeError("Triton kernels need a GPU, or TRITON_INTERPRET=1 to be interpreted on the CPU (slowly)")
    return _device_target(torch.cuda.current_device())


def check_device(*tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are where kernels can reach them."""
    if _RECORD.get() is not None:
        return
    wanted = "cpu" if INTERPRETED else "cuda"
    if any(x.device.type != wanted for x in tensors):
        found = ", ".join(sorted({x.device.type for x in tensors}))
        hint = "" if INTERPRETED else "; on a CPU use the kernels of backend 'cpu' or 'torch'"
        raise ValueError(f"Triton kernels run on {wanted} tensors here, got {found}{hint}")
    if not INTERPRETED and any(x.device.index != torch.cuda.current_device() for x in tensors):
        found = ", ".join(sorted({str(x.device) for x in tensors}))
        raise ValueError(f"Triton kernels run on the current GPU, cuda:{torch.cuda.current_device()}, got {found}; "
                         "torch.cuda.set_device chooses it")  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of run."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors (meta), numbers and constants by name
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int = 4, num_stages: int = 2, **arguments: Any) -> None:
    """Run ``kernel`` on ``grid`` with arguments by name, on the current target, or record it."""
    if (record := _RECORD.get()) is not None:
        record.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        return
    kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Record the launches of what is called inside, as ``target`` would get them."""
    launches: list[Launch] = []
    tokens = _ACTIVE.set(target), _RECORD.set(launches)
    try:
        yield launches
    finally:
        _ACTIVE.reset(tokens[0])
        _RECORD.reset(tokens[1])


@contextmanager
def observing(note: Callable[..., None]) -> Iterator[None]:
    """Call ``note(kernel, default, dtype, shape, answer)`` for every ``configuration`` that is asked for inside."""
    token = _OBSERVER.set(note)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


@contextmanager
def configured(overrides: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Use these configurations, by kernel, instead of table and defaults (tuning and tests)."""
    token = _OVERRIDES.set({**(_OVERRIDES.get() or {}), **overrides})
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


def table_key(dtype: torch.dtype, shape: Mapping[str, int]) -> str:
    """How tables name a problem: ``bfloat16 d_qk=128 d_v=256``."""
    return " ".join([str(dtype).removeprefix("torch."), *(f"{name}={size}" for name, size in sorted(shape.items()))])


@functools.cache
def _table(device: str, folder: str) -> dict[str, dict[str, dict[str, int]]]:
    path = Path(folder) / f"{device}.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())["kernels"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of kernel configurations ({error}); make it again: "
                         "xlstm-scaling tune") from error  # fmt: skip


def configuration(kernel: str, default: Mapping[str, int], dtype: torch.dtype, **shape: int) -> dict[str, int]:
    """Tile sizes, ``num_warps`` and ``num_stages`` of a kernel for this dtype and shape on the current target.

    An entry of the device's table must name the same settings as the default; ValueError says which differ.
    """
    found = _configuration(kernel, default, dtype, shape)
    if (note := _OBSERVER.get()) is not None:
        note(kernel, default, dtype, shape, found)
    return found


def _configuration(
    kernel: str, default: Mapping[str, int], dtype: torch.dtype, shape: Mapping[str, int]
) -> dict[str, int]:
    override = (_OVERRIDES.get() or {}).get(kernel)
    if override is not None:
        return {**default, **override}
    device = current_target().name
    key = table_key(dtype, shape)
    for folder in (os.environ.get(TABLES_VARIABLE), str(PACKAGED_TABLES)):
        entry = _table(device, folder).get(kernel, {}).get(key) if folder else None
        if entry is not None:
            if set(entry) != set(default):
                raise ValueError(f"table of {device} in {folder}: {kernel} for {key} sets {sorted(entry)}, "
                                 f"the kernel takes {sorted(default)}; tune again")  # fmt: skip
            return dict(entry)
    return dict(default)
