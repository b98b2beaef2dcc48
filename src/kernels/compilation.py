"""Ahead-of-time compilation of every Triton kernel for GPUs that are not here, and what became of it.

The launches of an operation, forward and backward, are recorded on ``meta`` tensors (``triton_launch.recording``) and
compiled for each target as Triton's own launcher would specialise them. A kernel fails that does not compile, spills
registers to memory, takes more shared (or tensor) memory than a program may use, or computes matrix products without
matrix units. ``xlstm-scaling certify --compile`` prints the table; it needs Triton, no GPU.

Registers, spills and matrix instructions come from the machine code (cuobjdump and nvdisasm, which Triton's wheel
brings; the assembly on AMD), products from the intermediate code: ``tt.dot`` that keeps a blocked layout runs on scalar
units.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch

from xlstm_scaling.kernels.arguments import add_compile_arguments
from xlstm_scaling.kernels.mlstm.state import MLSTMState
from xlstm_scaling.kernels.problems import SETS, Problem, mlstm
from xlstm_scaling.kernels.triton_launch import INTERPRETED, PACKAGED_TABLES, TARGETS, Launch, Target, recording

_POINTER_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
#: longest chunk of the mLSTM (imported, its module would want Triton)
MAX_CHUNK_SIZE = 1024
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


@dataclass(frozen=True)
class Specialised:
    """A launch in the terms of Triton's compiler: argument types, constants by position, attributes by position."""

    kernel: Any  # triton.JITFunction
    target: Target
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        constants = {name: str(value) for name, value in self.constants.items()}
        kernel = f"{self.kernel.fn.__module__}.{self.kernel.fn.__qualname__}"
        parts = (self.signature, constants, self.attributes, self.options, self.target.backend, self.target.arch)
        return repr((kernel, *parts))


def specialise(launch: Launch, target: Target) -> Specialised:
    """The types, constants and attributes that Triton's launcher derives from the arguments of ``launch``.

    Pointers and integers divisible by 16 are known to be; the integer 1 and None are constants. It is the launcher's
    own to the letter, so that what was compiled ahead is found in Triton's cache when it is launched. ValueError on an
    argument of a type that kernels do not take.
    """
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    values = dict(launch.arguments)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for position, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = values.pop(name) if name in values else parameter.default
        kind, divisible, small = _kind(launch.name, name, value, not parameter.do_not_specialize)
        if parameter.is_constexpr or kind == "constexpr":
            signature[name] = "constexpr"
            constants[position,], attributes[position,] = value, []
            continue
        annotation = parameter.annotation_type
        signature[name] = annotation if annotation and not kind.startswith("*") else kind
        if kind in ("fp32", "u1"):
            continue  # has no attributes
        notes = []
        if divisible and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            notes.append(["tt.divisibility", 16])
        if small and target.backend == "hip":
            notes.append(["tt.pointer_range", 32])
        attributes[position,] = notes
    options.update(values)  # what is no parameter is an option of the compiler
    return Specialised(launch.kernel, target, signature, constants, attributes, options)


def _kind(kernel: str, name: str, value: Any, specialised: bool) -> tuple[str, bool, bool]:
    """(type, divisible by 16, a tensor under 2 GiB) of an argument."""
    if isinstance(value, torch.Tensor):
        return f"*{_POINTER_TYPES[value.dtype]}", value.data_ptr() % 16 == 0, value.untyped_storage().size() < 2**31
    if isinstance(value, bool):
        return "u1", False, False
    if isinstance(value, int):
        if specialised and value == 1:
            return "constexpr", False, False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return kind, value % 16 == 0, False
    if isinstance(value, float):
        return "fp32", False, False
    if value is None or type(value).__module__.startswith("triton"):  # dtypes, constants, functions
        return "constexpr", False, False
    if isinstance(value, str):
        return "constexpr", False, False
    raise ValueError(f"kernel {kernel}: argument {name} is a {type(value).__name__}")


def compile_launch(launch: Launch, target: Target, problem: str = "") -> CompiledKernel:
    """Compile one recorded launch and look at the result; what goes wrong is a failure of the row, not an error."""
    return _compile(specialise(launch, target), problem)


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


# all problems, all targets


@dataclass(frozen=True)
class Variant:
    """An mLSTM problem in a chunk length of its own, or from a first state to a last, with the gradients of both."""

    problem: Problem
    chunk_size: int | None = None
    states: bool = False

    @property
    def name(self) -> str:
        chunk = "" if self.chunk_size is None else f" chunk_size={self.chunk_size}"
        return f"{self.problem.name}{chunk}{' states' if self.states else ''}"

    def make_inputs(self, device: str) -> dict[str, torch.Tensor]:
        inputs, s = self.problem.make_inputs(device), self.problem.size
        if self.states:
            shapes = {"C": (s["d_qk"], s["d_v"]), "n": (s["d_qk"],), "m": ()}
            for name, shape in shapes.items():
                inputs[name] = torch.zeros(s["B"], s["H"], *shape, device=device, requires_grad=True)
        return inputs

    def run(self, inputs: Mapping[str, torch.Tensor], backend: str) -> None:
        function, state = self.problem.implementation(backend), None
        if self.states:
            state = MLSTMState(*(inputs[name] for name in "Cnm"))
        h, last = function(*(inputs[name] for name in "qkvif"), state, self.chunk_size)
        outputs = [h, *last] if self.states else [h]
        torch.autograd.grad(outputs, list(inputs.values()), [torch.ones_like(y) for y in outputs])


def variants() -> list[Variant]:
    """Code of the mLSTM that no problem's defaults reach: the shortest and longest chunks, and states."""
    wide, narrow = mlstm(1, 8, 8192, 256, 512), mlstm(1, 6, 8192, 64, 128)
    in_fp32 = mlstm(2, 6, 1000, 64, 128, torch.float32, strided=True)
    chunks = [Variant(problem, size) for problem in (wide, narrow) for size in (64, MAX_CHUNK_SIZE)]
    return [*chunks, *(Variant(problem, states=True) for problem in (narrow, in_fp32))]


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


def packaged_targets() -> dict[str, Target]:
    """Devices that have a packaged table of configurations: their tuned configurations must compile too."""
    found = {}
    for path in sorted(PACKAGED_TABLES.glob("*.json")):
        target = json.loads(path.read_text()).get("target")
        if target is not None:
            found[path.stem] = Target(name=path.stem, **target)
    return found


# the command

COLUMNS = ("target", "kernel", "problem", "configuration", "registers", "spill_bytes", "shared_bytes", "products",
           "matrix_instructions", "failures")  # fmt: skip
_HEADINGS = {
    "spill_bytes": "spills [B]", "shared_bytes": "shared [B]", "matrix_instructions": "matrix unit",
    "failures": "verdict",
}  # fmt: skip


def table(rows: Sequence[CompiledKernel], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as text, aligned."""
    lines = [[_HEADINGS.get(name, name) for name in columns]]
    lines += [[_cell(name, getattr(row, name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cell(name: str, value: Any) -> str:
    if name == "failures":
        return "; ".join(value) or "ok"
    return "-" if value is None or value == "" else str(value)


def write(rows: Sequence[CompiledKernel], path: Path) -> None:
    """The table as .csv or .json; ValueError on another ending."""
    records = [asdict(row) for row in rows]
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".json":
        partial.write_text(json.dumps(records, indent=1) + "\n")
    elif path.suffix == ".csv":
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(CompiledKernel)])
            writer.writeheader()
            writer.writerows(entry | {"failures": "; ".join(entry["failures"])} for entry in records)
    else:
        raise ValueError(f"{path}: the table is written as .csv or .json")
    partial.replace(path)


def compile_command(args: argparse.Namespace) -> int:
    """Compile, print the table, return 1 if a kernel fails. ValueError names an unknown target or missing Triton."""
    targets = {**TARGETS, **packaged_targets()}
    names = args.target or list(targets)
    if unknown := [name for name in names if name not in targets]:
        raise ValueError(f"no target {', '.join(unknown)}; known: {', '.join(targets)}")
    if args.out is not None and args.out.suffix not in (".csv", ".json"):
        raise ValueError(f"{args.out}: the table is written as .csv or .json")
    try:
        import triton
    except ImportError:
        raise ValueError("ahead-of-time compilation needs Triton, not a GPU (pip install triton; Linux)") from None
    if INTERPRETED:  # decided when Triton is imported, so that only a new process can compile
        return _in_a_clean_process(args)
    start = time.perf_counter()
    chosen = [*SETS[args.shapes](), *(variants() if args.shapes == "all" else ())]
    rows = compile_problems(chosen, [targets[name] for name in names], args.processes, _interactive())
    failed = [row for row in rows if not row.ok]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write(rows, args.out)
    shown = failed if args.failures_only else rows
    if shown:
        print(table(shown))
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__} for {', '.join(names)} "
          f"in {time.perf_counter() - start:.0f} s: {len(failed)} failed")  # fmt: skip
    return 1 if failed or not rows else 0


def _in_a_clean_process(args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__]
    command += ["--shapes", args.shapes, "--processes", str(args.processes)]
    command += ["--target", *args.target] if args.target else []
    command += ["--out", str(args.out)] if args.out is not None else []
    command += ["--failures-only"] if args.failures_only else []
    return subprocess.run(command, env=clean_environment(), check=False).returncode


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what turns Triton into an interpreter."""
    return {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}


def _interactive() -> bool:
    return sys.stderr.isatty()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_scaling.kernels.compilation", description="Compile every Triton kernel ahead of time."
    )
    add_compile_arguments(parser)
    parser.add_argument("--out", type=Path, help="write the table here, .csv or .json")
    try:
        return compile_command(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"compilation: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
