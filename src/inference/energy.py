"""Energy that a device has used, from its own counters: NVML for NVIDIA GPUs, RAPL (Linux powercap) for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
#: readings that a measured time must span, so that the counter's steps are at most a twentieth of it
LEAST_READINGS = 20


class EnergyMeter(Protocol):
    """A counter of energy; it runs for the whole device, whatever computes on it."""

    name: str
    #: how often the counter changes [s]
    interval_s: float

    def read(self) -> Sequence[float]:
        """The counters now [J]."""

    def used_j(self, before: Sequence[float], after: Sequence[float]) -> float:
        """Energy between two readings [J]."""


@dataclass(frozen=True)
class RaplZone:
    """A powercap zone: its counter in microjoules starts again at 0 after ``range_uj``."""

    name: str
    counter: Path
    range_uj: int


class Rapl:
    """CPU packages and their memory (Intel and AMD, Linux powercap; kernel documentation, power/powercap)."""

    name = "RAPL"
    interval_s = 1e-3

    def __init__(self, zones: Sequence[RaplZone]) -> None:
        self.zones = tuple(zones)

    def read(self) -> list[float]:
        return [int(zone.counter.read_text()) / 1e6 for zone in self.zones]

    def used_j(self, before: Sequence[float], after: Sequence[float]) -> float:
        total = 0.0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            total += last - first if last >= first else last - first + zone.range_uj / 1e6
        return total


def find_rapl(root: Path = POWERCAP) -> tuple[Rapl | None, str]:
    """The counters of all packages and of memory outside of them; else None and the reason.

    ``core`` and ``uncore`` are parts of a package, ``psys`` holds packages, and ``intel-rapl-mmio`` has the same ones
    again: they would count twice.
    """
    zones, closed = [], []
    for folder in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
        try:
            name = (folder / "name").read_text().strip()
        except OSError:
            continue
        if not (name.startswith("package") or name == "dram"):
            continue
        try:
            int((folder / "energy_uj").read_text())
            zones.append(RaplZone(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        except PermissionError:
            closed.append(folder / "energy_uj")
        except (OSError, ValueError):
            continue
    if closed:
        return None, f"{closed[0]} may be read by root only"
    if not zones:
        return None, f"no RAPL counter in {root}: a virtual machine, or a CPU without one"
    return Rapl(zones), ""


class Nvml:
    """The energy counter of one NVIDIA GPU (Volta and newer)."""

    name = "NVML"
    interval_s = 0.1

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    def read(self) -> list[float]:
        return [self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3]

    def used_j(self, before: Sequence[float], after: Sequence[float]) -> float:
        return after[0] - before[0]


def find_nvml(device: str) -> tuple[Nvml | None, str]:
    """The counter of a torch device; else None and the reason."""
    try:
        import pynvml
    except ImportError:
        return None, "NVML is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        meter = Nvml(pynvml, handle)
        meter.read()
    except (pynvml.NVMLError, RuntimeError, AssertionError) as error:
        return None, f"NVML gives no energy: {error}"
    return meter, ""


def find_meter(device: str, powercap: Path = POWERCAP) -> tuple[EnergyMeter | None, str]:
    """The energy counter of a device, or None and why there is none."""
    return find_nvml(device) if device.startswith("cuda") else find_rapl(powercap)


def per_token_j(energies_j: Sequence[float], times_s: Sequence[float], tokens: int, interval_s: float) -> float:
    """Energy per token [J] of passes over ``tokens`` tokens each; NaN where they are too short for the counter."""
    if not energies_j or sum(times_s) < LEAST_READINGS * interval_s:
        return float("nan")
    return sum(energies_j) / (len(energies_j) * tokens)
