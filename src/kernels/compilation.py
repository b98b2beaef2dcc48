"""Ahead-of-time compilation of every Triton kernel for GPUs that are not here, and what became of it.

The launches of an operation, forward and backward, are recorded on ``meta`` tensors (``triton_launch.recording``) and
compiled for each target as Triton's own launcher would specialise them. A kernel fails that does not compile, spills
registers to memory, takes more shared (or tensor) memory than a program may use, or computes matrix products without
matrix units. The command is in `compile_command`.

Registers, spills and matrix instructions come from the machine code (cuobjdump and nvdisasm, which Triton's wheel
brings; the assembly on AMD), products from the intermediate code: ``tt.dot`` that keeps a blocked layout runs on scalar
units.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from xlstm_scaling.kernels.problems import Problem, Variant
from xlstm_scaling.kernels.specialisation import Specialised, specialise
from xlstm_scaling.kernels.triton_launch import Launch, Target, recording

#: machine instructions of the matrix units: Blackwell's, Hopper's, those of one warp, AMD's
_MATRIX_INSTRUCTIONS = {
    "tcgen05": r"\bUTC[A-Z]*MMA\b", "wgmma": r"\b[HQIB]GMMA\b", "mma": r"\b[HQIB]MMA\b", "mfma": r"\bv_s?mfmac?_",
}  # fmt: skip
TENSOR_MEMORY_COLUMNS = 512  # of a Blackwell multiprocessor


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of one launch.

    ``registers``: 32-bit registers per thread (AMD: vector registers, accumulators included); ``spill_bytes`` per
    thread, in memory (AMD registers that spill into other registers are no traffic and do not count);
    ``products``: matrix products in the source, ``scalar_products``: those that missed the matrix units;
    ``matrix_instructions``: which machine code holds, and how many (``wgmma 48``); ``failures``: reasons by name,
    empty where all is well.
    """

    target: str
    kernel: str
    problem: str
    configuration: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    shared_limit_bytes: int
    products: int | None
    scalar_products: int | None
    matrix_instructions: str
    compile_s: float
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failures


def _compile(source: Specialised, problem: str) -> CompiledKernel:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = source.target
    row: dict[str, Any] = {
        "target": target.name,
        "kernel": source.kernel.fn.__name__,
        "problem": problem,
        "configuration": _configuration(source),
        "shared_limit_bytes": target.shared_memory_bytes,
    }
    start = time.perf_counter()
    with _captured_stderr() as log:
        try:
            compiled = triton_compile(
                ASTSource(source.kernel, source.signature, source.constants, source.attributes),
                target=GPUTarget(target.backend, target.arch, target.warp_size),
                options=source.options,
            )
            findings = _inspect(compiled, target)
        except Exception as error:
            log.seek(0)
            reason = _last_line(error, log.read())
            findings = {
                "registers": None, "spill_bytes": None, "shared_bytes": None, "products": None,
                "scalar_products": None, "matrix_instructions": "", "failures": (f"does not compile: {reason}",),
            }  # fmt: skip
    return CompiledKernel(**row, **findings, compile_s=round(time.perf_counter() - start, 3))


def _configuration(source: Specialised) -> str:
    """Integer constants in capitals (tile sizes), warps and stages."""
    names = list(source.signature)
    sizes = {names[position[0]]: value for position, value in source.constants.items()}
    tiles = [f"{n}={int(v)}" for n, v in sizes.items() if n.isupper() and isinstance(v, int)]
    return " ".join([*tiles, *(f"{name}={value}" for name, value in source.options.items())])


@contextmanager
def _captured_stderr() -> Iterator[IO[str]]:
    """What the compiler's passes write to the process's stderr, whole modules where they fail."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _last_line(error: Exception, log: str = "") -> str:
    """What an error says in one line; of an error of a compiler pass, the pass's own word."""
    said = re.findall(r"error: (.*)", log)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "; ".join(filter(None, [lines[-1][:200] if lines else "", said[0][:200] if said else ""]))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _inspect(compiled: Any, target: Target) -> dict[str, Any]:
    """Registers, spills, memory and products of compiled code."""
    asm = compiled.asm
    products = len(re.findall(r"= tt\.dot(?:_scaled)? ", asm["ttir"]))
    if target.backend == "cuda":
        registers, stack = _cuda_resources(asm["cubin"])
        machine = _run_on(asm["cubin"], "nvdisasm", "-c") if products or stack else ""
        # a stack that nothing is stored to or loaded from costs nothing
        spill_bytes = stack if re.search(r"\b(?:STL|LDL)\b", machine) else 0
    else:
        registers, spill_bytes = _amd_resources(asm["amdgcn"])
        machine = asm["amdgcn"]
    shared = int(compiled.metadata.shared)
    tensor_memory = int(getattr(compiled.metadata, "tmem_size", 0) or 0)
    scalar = sum(_on_scalar_units(line) for line in asm["ttgir"].splitlines())
    counts = {name: len(re.findall(instruction, machine)) for name, instruction in _MATRIX_INSTRUCTIONS.items()}
    found = [f"{name} {count}" for name, count in counts.items() if count]
    failures = []
    if spill_bytes:
        failures.append(f"spills: {spill_bytes} B a thread")
    if shared > target.shared_memory_bytes:
        failures.append(f"shared memory: {shared} B of {target.shared_memory_bytes} B")
    if tensor_memory > TENSOR_MEMORY_COLUMNS:
        failures.append(f"tensor memory: {tensor_memory} columns of {TENSOR_MEMORY_COLUMNS}")
    if products and (scalar or not found):
        failures.append(f"no tensor cores: {scalar or 'all'} of {products} products run on scalar units")
    return {
        "registers": registers, "spill_bytes": spill_bytes, "shared_bytes": shared, "products": products,
        "scalar_products": scalar, "matrix_instructions": ", ".join(found), "failures": tuple(failures),
    }  # fmt: skip


def _on_scalar_units(line: str) -> bool:
    """Whether a line of Triton's GPU code is a product whose result kept a layout of no matrix unit."""
    if "= tt.dot " not in line:
        return False
    return bool(re.search(r"->\s*tensor<[^>]*#(?:ttg\.)?blocked\d*", line))


def _tool(name: str) -> str:
    """Path of a tool of CUDA's that Triton's wheel brings."""
    from triton import knobs

    return getattr(knobs.nvidia, name).path


def _run_on(content: bytes, tool: str, *options: str) -> str:
    """What a tool of CUDA's prints of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(content)
        return subprocess.run([_tool(tool), *options, str(path)], capture_output=True, text=True, check=True).stdout


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread."""
    usage = _run_on(cubin, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump names no registers: {usage[-200:]}")
    return int(found[1]), int(found[2])


def _amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch memory) per lane, from the metadata of the kernel."""

    def entry(name: str) -> int:
        found = re.search(rf"^\s*-?\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        return int(found[1]) if found else 0

    # .vgpr_count contains the accumulation registers; what spills into those reaches no memory either
    return entry("vgpr_count"), entry("private_segment_fixed_size")


def record(problem: Problem | Variant, target: Target) -> list[Launch]:
    """The launches of ``problem``, forward and backward, as ``target`` would get them; nothing runs."""
    with recording(target) as launches:
        problem.run(problem.make_inputs("meta"), backend="triton")
    return launches


_WORK: list[tuple[Specialised, str]] = []  # inherited by forked workers: kernels do not travel between processes


def _work(index: int) -> tuple[int, CompiledKernel]:
    return index, _compile(*_WORK[index])


def compile_launches(
    launches: Iterable[tuple[Launch, Target, str]], processes: int = 2, progress: bool = False
) -> list[CompiledKernel]:
    """Compile (launch, target, name of problem) side by side, each distinct code once; rows in order of first sight."""
    global _WORK
    work: dict[str, tuple[Specialised, str]] = {}
    for launch, target, problem in launches:
        source = specialise(launch, target)
        work.setdefault(f"{source.key} {target.name}", (source, problem))
    _WORK = list(work.values())
    rows: dict[int, CompiledKernel] = {}
    if processes == 1 or len(_WORK) < 2:
        results = map(_work, range(len(_WORK)))
        rows.update(_with_progress(results, len(_WORK), progress))
    else:
        with multiprocessing.get_context("fork").Pool(min(processes, len(_WORK))) as pool:
            results = pool.imap_unordered(_work, range(len(_WORK)))
            rows.update(_with_progress(results, len(_WORK), progress))
    _WORK = []
    return [rows[index] for index in sorted(rows)]


def _with_progress(results: Iterable, total: int, progress: bool) -> Iterable:
    from tqdm import tqdm

    return tqdm(results, total=total, desc="compiling", unit="kernel", disable=not progress)


def compile_problems(
    problems: Sequence[Problem | Variant], targets: Sequence[Target], processes: int = 2, progress: bool = False
) -> list[CompiledKernel]:
    """Every kernel of every problem for every target; a problem that cannot even be recorded is a row that fails."""
    launches, failed = [], []
    for target in targets:
        for problem in problems:
            try:
                launches += [(launch, target, problem.name) for launch in record(problem, target)]
            except Exception as error:
                failed.append(_not_recorded(problem, target, error))
    return failed + compile_launches(launches, processes, progress)


def _not_recorded(problem: Problem | Variant, target: Target, error: Exception) -> CompiledKernel:
    return CompiledKernel(
        target=target.name, kernel=problem.op, problem=problem.name, configuration="", registers=None, spill_bytes=None,
        shared_bytes=None, shared_limit_bytes=target.shared_memory_bytes, products=None, scalar_products=None,
        matrix_instructions="", compile_s=0.0, failures=(f"cannot be launched: {_last_line(error)}",),
    )  # fmt: skip
