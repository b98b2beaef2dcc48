"""``xlstm-scaling certify --compile``: every Triton kernel compiled for GPUs that are not here, as a table.

Needs Triton, no GPU. What fails a kernel: see `compilation`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from xlstm_scaling.kernels.compilation import CompiledKernel, compile_problems
from xlstm_scaling.kernels.problems import SETS, variants
from xlstm_scaling.kernels.triton_launch import INTERPRETED, PACKAGED_TABLES, TARGETS, Target
from xlstm_scaling.study.files import atomic_write, write_json_atomic

COLUMNS = ("target", "kernel", "problem", "configuration", "registers", "spill_bytes", "shared_bytes", "products",
           "matrix_instructions", "failures")  # fmt: skip
_HEADINGS = {
    "spill_bytes": "spills [B]", "shared_bytes": "shared [B]", "matrix_instructions": "matrix unit",
    "failures": "verdict",
}  # fmt: skip


def packaged_targets() -> dict[str, Target]:
    """Devices that have a packaged table of configurations: their tuned configurations must compile too."""
    found = {}
    for path in sorted(PACKAGED_TABLES.glob("*.json")):
        target = json.loads(path.read_text()).get("target")
        if target is not None:
            found[path.stem] = Target(name=path.stem, **target)
    return found


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
    if path.suffix == ".json":
        write_json_atomic(path, records)
    elif path.suffix == ".csv":
        with atomic_write(path, "w") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(CompiledKernel)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(entry | {"failures": "; ".join(entry["failures"])} for entry in records)
    else:
        raise ValueError(f"{path}: the table is written as .csv or .json")


def run_compile(args: argparse.Namespace) -> int:
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
    start, progress = time.perf_counter(), not args.quiet and sys.stderr.isatty()
    chosen = [*SETS[args.shapes](), *(variants() if args.shapes == "all" else ())]
    rows = compile_problems(chosen, [targets[name] for name in names], args.processes, progress)
    failed = [row for row in rows if not row.ok]
    if args.out is not None:
        write(rows, args.out)
    shown = failed if args.failures_only else rows
    if shown:
        print(table(shown))
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__} for {', '.join(names)} "
          f"in {time.perf_counter() - start:.0f} s: {len(failed)} failed")  # fmt: skip
    return 1 if failed or not rows else 0


def _in_a_clean_process(args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "xlstm_scaling.cli", "certify", "--compile"]
    command += ["--shapes", args.shapes, "--processes", str(args.processes)]
    command += ["--target", *args.target] if args.target else []
    command += ["--out", str(args.out)] if args.out is not None else []
    command += ["--failures-only"] if args.failures_only else []
    command += ["--quiet"] if args.quiet else []
    return subprocess.run(command, env=clean_environment(), check=False).returncode


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what turns Triton into an interpreter."""
    return {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
