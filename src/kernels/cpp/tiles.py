"""The CPU's bf16 matrix units (AMX): whether they are used, and libraries that use them (``tiles.hpp``).

They are used where the CPU has them and a process of its own has multiplied matrices on them (``tiles.cpp``), so that a
compiler, a system or a virtual machine that promises too much costs a warning and not a training run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import warnings

from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.study.machine import cpu_flags

#: auto; off: fp32 products; emulated: the same in plain C++, to test on any CPU
SETTING_VARIABLE = "XLSTM_SCALING_MATRIX_UNITS"
SETTINGS = ("auto", "off", "emulated")
#: what the CPU must have
FLAGS = frozenset({"amx_tile", "amx_bf16"})
#: largest error of a product of numbers in two parts, of the sum of magnitudes (2^-15)
ACCURACY = 3e-5
UNITS, EMULATED = "TILES=1", "TILES=2"
#: the library that is asked first
CHECK = "tiles"
_CHECK = f"""
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
random = np.random.default_rng(1)
for m, n, k in ((1, 1, 1), (16, 16, 32), (33, 20, 70), (64, 128, 64)):
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n)))
    found = np.full((m, n), np.nan, np.float32)
    status = library.tiles_multiply(m, n, k, *(ctypes.c_void_p(x.ctypes.data) for x in (a, b, found)))
    if status == 2:
        sys.exit("the system does not let a process use them")
    size = np.abs(a).astype(float) @ np.abs(b)
    if status or not (np.abs(found - a.astype(float) @ b) <= {ACCURACY} * size).all():
        sys.exit(f"a product of ({{m}}, {{k}}) by ({{k}}, {{n}}) is wrong")
"""


def setting() -> str:
    """The environment's setting; ValueError unless it is auto, off or emulated."""
    found = os.environ.get(SETTING_VARIABLE, "auto")
    if found not in SETTINGS:
        raise ValueError(f"{SETTING_VARIABLE}={found!r} is not one of {', '.join(SETTINGS)}")
    return found


def library_with_tiles(name: str) -> ctypes.CDLL:
    """``build.library``, with tiles where they are used; BuildError says why there is none."""
    return _library(name, setting())[0]


def in_use(name: str) -> str:
    """What a library multiplies bf16 with: units, emulated, or off (in fp32); BuildError says why there is none."""
    return _library(name, setting())[1]


@functools.cache
def _library(name: str, setting: str) -> tuple[ctypes.CDLL, str]:
    if setting == "emulated":
        return build.library(name, EMULATED), "emulated"
    if setting == "auto" and cpu_flags() >= FLAGS:
        try:
            reason = fault()
            if not reason:
                return build.library(name, UNITS), "units"
        except build.BuildError as error:
            reason = str(error)
        warnings.warn(
            f"the CPU's bf16 matrix units are not used, the mLSTM multiplies in fp32: {reason}\n"
            f"({SETTING_VARIABLE}=off does without them and without this warning)",
            stacklevel=3,
        )
    return build.library(name), "off"


def fault() -> str:
    """Why this machine's units cannot be used, '' if they can; BuildError if they cannot be compiled for.

    Asked once a machine: the answer is kept beside the library.
    """
    build.library(CHECK, UNITS)
    library = build.library_path(CHECK, UNITS)
    kept = library.with_suffix(".checked")
    if kept.is_file():
        return kept.read_text()
    command = [sys.executable, "-c", _CHECK, str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=build.TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "a product did not end"  # of a busy machine perhaps: asked again
    said = done.stderr.strip().splitlines()[-1:] or [f"a product ended with {done.returncode}"]
    reason = said[0] if done.returncode else ""
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(reason)
    part.replace(kept)
    return reason
