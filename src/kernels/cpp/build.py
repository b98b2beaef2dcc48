"""Compiling the C++ kernels and loading them.

They use no header of PyTorch and take addresses, so a compiler needs seconds, and a compiled library does not depend on
the version of PyTorch. A library is built for one CPU; its name in the cache carries the digest of the sources, the
compiler and the CPU's instruction sets, so machines that share a home folder do not get each other's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from xlstm_scaling.study.machine import CACHE_VARIABLE, cache_folder, cpu_flags

#: the sources; ``.hpp`` are included by them
FOLDER = Path(__file__).parent
#: 0: compile nothing and do without
SWITCH_VARIABLE = "XLSTM_SCALING_CPP"
#: seconds after which a compiler is given up
TIMEOUT_S = 300
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
#: tried in this order: with the instruction sets of this CPU and threads first
_VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


class BuildError(RuntimeError):
    """The C++ kernels cannot be compiled or loaded; the message says why."""


def compiler() -> list[str] | None:
    """The C++ compiler as words of a command: $CXX, else the first of c++, g++, clang++ there is."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return found and [found]


def library_path(name: str, *defines: str) -> Path:
    """Where the library of ``<name>.cpp`` belongs, with macros such as TILES=1; BuildError without a compiler."""
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler was found (c++, g++, clang++, or the one that CXX names)")
    version = _run([*command, "--version"]).stdout
    digest = hashlib.sha256()
    for part in (*command, version, *_FLAGS, *defines, platform.machine(), _instruction_sets()):
        digest.update(part.encode() + b"\0")
    for path in sorted((*FOLDER.glob("*.hpp"), FOLDER / f"{name}.cpp")):
        digest.update(path.read_bytes())
    return cache_folder() / f"{name}-{digest.hexdigest()[:16]}.so"


@functools.cache
def library(name: str, *defines: str) -> ctypes.CDLL:
    """The library compiled from ``<name>.cpp``, from the cache if it is there; BuildError says why there is none."""
    if os.environ.get(SWITCH_VARIABLE) == "0":
        raise BuildError(f"C++ kernels are switched off by {SWITCH_VARIABLE}=0")
    path = library_path(name, *defines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # not there, or damaged
            return ctypes.CDLL(str(path))
        _compile([*compiler(), *(f"-D{define}" for define in defines)], FOLDER / f"{name}.cpp", path)
        return ctypes.CDLL(str(path))
    except OSError as error:  # no home, a full disk
        raise BuildError(f"{path.name} could not be kept in {path.parent} ({CACHE_VARIABLE}): {error}") from error


@functools.cache
def usable(name: str) -> bool:
    """Whether the library is there or can be compiled; if not, a warning says why, once a process."""
    try:
        library(name)
    except BuildError as error:
        if os.environ.get(SWITCH_VARIABLE) != "0":
            warnings.warn(f"{error}\nSlower kernels are used; with a C++ compiler training is faster.", stacklevel=2)
        return False
    return True


def _instruction_sets() -> str:
    return " ".join(sorted(cpu_flags()))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error


def _compile(command: list[str], source: Path, target: Path) -> None:
    """Compile to a temporary name and rename: processes that start together do not see half a library."""
    errors = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        part = Path(folder) / target.name
        for variant in _VARIANTS:
            done = _run([*command, *_FLAGS, *variant, str(source), "-o", str(part)])
            if done.returncode == 0:
                part.replace(target)
                return
            errors.append(f"{' '.join(variant)}: {done.stderr.strip().splitlines()[0] if done.stderr else 'failed'}")
    raise BuildError(f"{shlex.join(command)} could not compile {source.name}:\n" + "\n".join(errors))
