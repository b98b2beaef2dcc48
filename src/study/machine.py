"""What this machine can do, without importing torch."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

COMPUTE_DTYPES = ("bfloat16", "float32")
#: folder of what this user's machine keeps between studies; by default ~/.cache/xlstm-scaling
CACHE_VARIABLE = "XLSTM_SCALING_CACHE"


def cache_folder() -> Path:
    """Where compiled C++ kernels and composed configurations are kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "xlstm-scaling"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction set flags of the first CPU; empty where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def resolve_compute_dtype(setting: str, device: str = "cpu") -> str:
    """``auto`` becomes bfloat16 on a GPU or on a CPU with bf16 products (AMX, AVX512-BF16), else float32.

    Raises ValueError for an unknown setting.
    """
    if setting in COMPUTE_DTYPES:
        return setting
    if setting != "auto":
        raise ValueError(f"training.compute_dtype = {setting!r} is not one of auto, {', '.join(COMPUTE_DTYPES)}")
    fast = device != "cpu" or {"amx_bf16", "avx512_bf16"} & cpu_flags()
    return "bfloat16" if fast else "float32"


@functools.cache
def keep_freed_memory() -> None:
    """Let the C allocator keep what is freed, where it is glibc's.

    By default it maps and unmaps every block of a megabyte, and each page of a fresh block costs a fault: a third of
    the time of a small model's training step (docs/log.md).
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mmap_threshold, trim_threshold = -3, -1  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
