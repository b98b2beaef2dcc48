"""``xlstm-scaling tune``: tunes the Triton kernels on the GPU at hand and writes its table.

Configurations are compiled side by side, those that spill or exceed the shared memory are not run, and times are those
of the GPU's events. What is tried, and in which order: see `tuning`.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from xlstm_scaling.kernels import problems as catalogue
from xlstm_scaling.kernels import triton_launch
from xlstm_scaling.kernels.certification.certificate import versions
from xlstm_scaling.kernels.compilation import compile_launches, record
from xlstm_scaling.kernels.problems import Problem
from xlstm_scaling.kernels.registry import kernels
from xlstm_scaling.kernels.specialisation import specialise
from xlstm_scaling.kernels.triton_launch import (
    PACKAGED_TABLES,
    TABLES_VARIABLE,
    Launch,
    Target,
    configured,
    current_target,
)
from xlstm_scaling.kernels.tuning import Configuration, Subject, observed, stepped, tune
from xlstm_scaling.study.files import read_json, write_json_atomic

MEASURE_S = 0.03  # of each timing, at least


def cuda_timer(function: Callable[[], object]) -> float:
    """Median time [s] of a call by events, after a warm-up."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    repeats = max(5, min(100, math.ceil(MEASURE_S / max(time.perf_counter() - start, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in events:
        first.record()
        function()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events) / 1e3


def subject_of(problem: Problem, device: str = "cuda") -> Subject:
    """A problem on a GPU. Its backward runs in the calling thread, where the configuration under test is known."""

    def make() -> tuple[Callable[[], dict[str, Tensor]], Callable[[], object]]:
        inputs = problem.make_inputs(device)
        state = {name: inputs[name].clone() for name in ("C", "n", "m") if name in inputs}

        def work() -> dict[str, Tensor]:
            with torch.autograd.set_multithreading_enabled(False):
                return problem.run(inputs)

        def results() -> dict[str, Tensor]:
            for name, value in state.items():  # a step uses its state up
                inputs[name].copy_(value)
            return {name: value.detach().clone() for name, value in work().items()}

        return results, work

    return Subject(problem.name, make, lambda: record(problem, current_target()))


class CompileCheck:
    """Compiles launches side by side into Triton's cache and says which cannot be used."""

    def __init__(self, target: Target, processes: int) -> None:
        self.target, self.processes = target, processes
        self.known: dict[str, tuple[str, ...]] = {}  # failures by specialisation

    def prepare(self, launches: Sequence[Launch]) -> None:
        """Compile what was not compiled before."""
        fresh = {specialise(launch, self.target).key: launch for launch in launches}
        fresh = {key: launch for key, launch in fresh.items() if key not in self.known}
        rows = compile_launches([(launch, self.target, key) for key, launch in fresh.items()], self.processes)
        self.known |= {row.problem: tuple(f"{row.kernel}: {reason}" for reason in row.failures) for row in rows}

    def __call__(self, launches: Sequence[Launch]) -> str | None:
        """Why launches cannot be used, None where they can."""
        self.prepare(launches)
        found = (self.known[specialise(launch, self.target).key] for launch in launches)
        return next((failures[0] for failures in found if failures), None)


def named_candidates(problems: Iterable[Problem]) -> dict[str, Sequence[Mapping[str, int]]]:
    """``CANDIDATES`` of the modules that implement the problems' operations with Triton, by kernel."""
    found: dict[str, Sequence[Mapping[str, int]]] = {}
    for op in sorted({problem.op for problem in problems}):
        for kernel in kernels(op, "triton"):
            found |= getattr(sys.modules[kernel.function.__module__], "CANDIDATES", {})
    return found


def candidate_launches(problems: Iterable[Problem], target: Target) -> list[tuple[Launch, Target, str]]:
    """What ``target`` would launch under every candidate, with the candidate's name; nothing runs."""
    found: list[tuple[Launch, Target, str]] = []
    for problem in problems:
        named = named_candidates([problem])
        with observed() as requests:
            plain = {specialise(launch, target).key for launch in record(problem, target)}
        for kernel, request in requests.items():
            for config in filter(None, (stepped(request.default, steps) for steps in named.get(kernel, ()))):
                with configured({kernel: config}):
                    launches = record(problem, target)
                name = f"{kernel} [{request.key}] {config}"
                found += [(launch, target, name) for launch in launches if specialise(launch, target).key not in plain]
    return found


def default_folder() -> Path:
    """Where tables are written: the user's folder if there is one, else the package's."""
    return Path(os.environ.get(TABLES_VARIABLE) or PACKAGED_TABLES)


def write_table(folder: Path, target: Target, entries: Mapping[str, Mapping[str, Configuration]]) -> Path:
    """Merge ``entries`` into ``<folder>/<device>.json`` and forget what was read of it; returns the path."""
    path = folder / f"{target.name}.json"
    known = read_json(path)["kernels"] if path.is_file() else {}
    merged = {kernel: {**known.get(kernel, {}), **entries.get(kernel, {})} for kernel in sorted({*known, *entries})}
    described = {"backend": target.backend, "arch": target.arch, "shared_memory_bytes": target.shared_memory_bytes,
                 "warp_size": target.warp_size}  # fmt: skip
    made_with = {name: versions()[name] for name in ("torch", "triton", "xlstm-scaling")}
    table = {
        "device": target.name, "target": described, "versions": made_with,
        "kernels": {kernel: dict(sorted(by_key.items())) for kernel, by_key in merged.items()},
    }  # fmt: skip
    write_json_atomic(path, table)
    triton_launch._table.cache_clear()
    return path


def tuned_problems() -> list[Problem]:
    """The problems that are tuned where none are named: the speed targets' shapes, in bf16."""
    short = [p for p in catalogue.speed_problems() if p.size["T"] == catalogue.SPEED_LENGTHS[0]]
    heads = [catalogue.cross_entropy(8192, d) for d in (768, 4096)]
    return short + catalogue.step_problems() + heads + catalogue.elementwise_problems()


def select_problems(ops: Sequence[str] | None, dtype: str, shape: Sequence[str] | None) -> list[Problem]:
    """The problems that the options of ``tune`` name; ValueError says what does not exist."""
    wanted_dtype = getattr(torch, dtype)
    chosen = [Problem(p.op, p.form, wanted_dtype, p.sizes, p.backward) for p in tuned_problems()]
    known = sorted({f"{p.op}/{p.form}" for p in chosen})
    if ops:
        chosen = [p for p in chosen if {p.op, f"{p.op}/{p.form}"} & set(ops)]
        if unknown := [op for op in ops if op not in known and op not in {name.split("/")[0] for name in known}]:
            raise ValueError(f"no operation {', '.join(unknown)}; known: {', '.join(known)}")
    if not shape:
        return chosen
    try:
        sizes = {name: int(size) for name, _, size in (entry.partition("=") for entry in shape)}
    except ValueError:
        raise ValueError(f"--shape takes NAME=SIZE, got {' '.join(shape)}") from None
    matching = [p for p in chosen if all(p.size.get(name) == size for name, size in sizes.items())]
    if matching:
        return matching
    own = {(p.op, p.form, p.backward, tuple(p.size)) for p in chosen if set(p.size) == set(sizes)}
    if len(own) != 1:
        names = "; ".join(sorted({f"{p.op}/{p.form}: {' '.join(p.size)}" for p in chosen}))
        raise ValueError(f"no problem has {' '.join(shape)}; for one of your own name all its sizes: {names}")
    op, form, backward, order = own.pop()
    return [Problem(op, form, wanted_dtype, tuple((name, sizes[name]) for name in order), backward)]


def run_tune(args: argparse.Namespace) -> int:
    """Tune on this GPU and write its table. ValueError without a GPU, or where options name nothing."""
    chosen = select_problems(args.op, args.dtype, args.shape)
    if not torch.cuda.is_available():
        raise ValueError("tuning measures on a GPU, and PyTorch sees none; without a table kernels use their defaults")
    if triton_launch.INTERPRETED:
        raise ValueError("tuning measures compiled kernels: unset TRITON_INTERPRET")
    target, folder = current_target(), default_folder() if args.out is None else args.out
    start = time.monotonic()
    report = tune(
        [subject_of(problem) for problem in chosen], cuda_timer, named_candidates(chosen),
        CompileCheck(target, args.processes), 60 * args.minutes, not args.quiet,
        done=lambda so_far: write_table(folder, target, so_far.entries),
    )  # fmt: skip
    for kernel, key, config, reason in report.dropped:
        print(f"dropped: {kernel} [{key}] {config}: {reason}")
    for name, gain in report.gains:
        print(f"{gain:6.2f}x  {name}")
    path = folder / f"{target.name}.json"
    print(f"{report.measured} configurations measured in {(time.monotonic() - start) / 60:.1f} min"
          f"{', stopped by --minutes' if report.out_of_time else ''}; {path}")  # fmt: skip
    return 0
