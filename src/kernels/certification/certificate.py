"""The certificate: which kernels are right on which device, and the question that training asks of it.

Nothing here imports torch before it is needed: the workflow reads this module to decide what reruns.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xlstm_scaling.kernels.cpp import tiles
from xlstm_scaling.study.files import digest, read_json
from xlstm_scaling.study.machine import cpu_flags

#: raised whenever the meaning of a certificate's content changes
SCHEMA_VERSION = 1
KERNELS = Path(__file__).resolve().parents[1]
#: instruction sets that decide which code of PyTorch multiplies
MATTERING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve")

#: (operation, form, backend, dtype)
KernelUse = tuple[str, str, str, str]


class CertificateError(ValueError):
    """Training is refused: a kernel failed, or no valid certificate covers it; the message says what to run."""


@functools.cache
def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe_cpu() -> dict[str, Any]:
    """Model, architecture and the instruction sets that matter; and whether they are used otherwise than by default."""
    flags = [flag for flag in MATTERING_FLAGS if flag in cpu_flags()]
    if (setting := tiles.setting()) != "auto":
        flags.append(f"matrix units {setting}")
    return {"type": "cpu", "name": cpu_model(), "architecture": platform.machine(), "flags": flags}


def describe_device(device: str) -> dict[str, Any]:
    """The device that kernels run on, and the CPU beside it: ``device`` is cpu or cuda."""
    cpu = describe_cpu()
    if device == "cpu":
        return cpu | {"capability": None, "driver": None}
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": properties.gcnArchName if torch.version.hip else f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "runtime": torch.version.hip or torch.version.cuda,
        "cpu": cpu,
    }  # fmt: skip


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    try:
        found = re.search(r"Kernel Module\D*?\s([\d.]+)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def _identity(device: dict) -> dict:
    """What must be equal for a certificate to hold: not the host of a GPU, nor its driver."""
    keys = ("type", "name", "architecture", "flags") if device["type"] == "cpu" else ("type", "name", "capability")
    return {key: device.get(key) for key in keys}


def device_name(device: dict) -> str:
    """The device in words."""
    details = ", ".join(device.get("flags", [])) if device["type"] == "cpu" else f"capability {device['capability']}"
    return f"{device['name']} ({details})" if details else device["name"]


def versions() -> dict[str, str | None]:
    """Versions of what computes; None for what is not installed."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    from xlstm_scaling import __version__

    return {
        "torch": of("torch"),
        "triton": of("triton"),
        "python": platform.python_version(),
        "xlstm-scaling": __version__,
    }


def source_files(folder: Path = KERNELS) -> list[Path]:
    """What a certificate depends on: code, and the tables of configurations."""
    suffixes = (".py", ".json", ".cpp", ".hpp")
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())


def source_digest(folder: Path = KERNELS) -> str:
    """Digest of the kernels' sources: of their contents alone, in no order."""
    return digest(sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in source_files(folder)))


def validity(device: str) -> str:
    """Digest of what this machine is to a certificate, apart from sources; GPUs are asked for where they are."""
    mine = _identity(describe_cpu()) if device == "cpu" else {"type": device}
    return digest({"device": mine, "versions": {key: versions()[key] for key in ("torch", "triton")}})[:16]


def level_option(level: str) -> str:
    """``hardware.certification`` as a word for ``xlstm-scaling certify``; ValueError unless it is quick or full."""
    if level not in ("quick", "full"):
        raise ValueError(f"hardware.certification = {level!r} is neither quick nor full")
    return "--quick" if level == "quick" else ""


def load_certificate(path: Path, device: str = "cpu") -> dict:
    """The certificate in a file. CertificateError where there is none, or one of another schema."""
    command = _command(path, device)
    if not Path(path).is_file():
        raise CertificateError(f"the kernels of this device are not certified: there is no {path}; run: {command}")
    certificate = read_json(path)
    version = certificate.get("schema_version") if isinstance(certificate, dict) else None
    if version != SCHEMA_VERSION:
        raise CertificateError(f"{path} is no certificate of schema {SCHEMA_VERSION} but {version}; run: {command}")
    return certificate


def certificate_digest(certificate: dict) -> str:
    """What a run's result says about the certificate that it was trained under."""
    return digest(certificate)


def require_certified(
    certificate: dict, kernels: Iterable[KernelUse], device: str = "cpu", path: Path | str = "CERTIFICATE"
) -> None:
    """Raise CertificateError unless the certificate covers these kernels on this device, with these sources, and each
    of them passed. The message names the kernel and its worst tensors."""
    command = f"run: {_command(path, device)}"
    mine, theirs = describe_device(device), certificate["device"]
    if _identity(mine) != _identity(theirs):
        raise CertificateError(
            f"{path} certifies another device, {device_name(theirs)}, and this is {device_name(mine)}; {command}"
        )
    now, then = versions(), certificate["versions"]
    for package in ("torch", "triton"):
        if now[package] != then[package]:
            raise CertificateError(f"{path} is for {package} {then[package]}, here is {now[package]}; {command}")
    if certificate["kernel_sources"] != source_digest():
        raise CertificateError(f"{path} certifies other kernel sources than these; {command}")
    entries = {(e["op"], e["form"], e["backend"], e["dtype"]): e for e in certificate["kernels"]}
    for use in kernels:
        op, form, backend, dtype = use
        name = f"{op} {form} ({backend}) in {dtype}"
        entry = entries.get(use) or entries.get((op, "any", backend, dtype))
        if entry is None:
            raise CertificateError(f"{path} does not cover the kernel {name}; {command}")
        if certificate["interpreted"] and backend == "triton" and device != "cpu":
            raise CertificateError(f"{path} is of interpreted kernels, which says nothing about a GPU; {command}")
        if not entry["passed"]:
            failures = entry["failures"]
            shown = "; ".join(failures[:3]) + (f"; and {len(failures) - 3} more" if len(failures) > 3 else "")
            raise CertificateError(
                f"the kernel {name} failed its certification and is refused: {shown}. "
                f"Choose another kernel, or mend it and {command}"
            )


def _command(path: Path | str, device: str) -> str:
    return f"xlstm-scaling certify --device {device} --out {path}"
