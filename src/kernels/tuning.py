"""``xlstm-scaling tune``: measures configurations of the Triton kernels on the GPU at hand and writes its table.

Every problem is measured as a whole, forward and backward, by coordinate descent over the kernels that it launches:
the candidates that a kernel's module names (``CANDIDATES``: several settings at once, where one alone only costs), then
the neighbours of the best so far (a tile halved or doubled, a stage or twice the warps more or less), until none is
faster. A candidate that does not compile, spills, exceeds the shared memory or changes the result is dropped and named.
Problems that share their entries of the table (other batches, other lengths) are tuned together, on the geometric mean
of their times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from xlstm_scaling.kernels import problems as catalogue
from xlstm_scaling.kernels import triton_launch
from xlstm_scaling.kernels.arguments import add_tune_arguments
from xlstm_scaling.kernels.compilation import compile_launches, record, specialise
from xlstm_scaling.kernels.problems import Problem
from xlstm_scaling.kernels.registry import kernels
from xlstm_scaling.kernels.triton_launch import (
    PACKAGED_TABLES,
    TABLES_VARIABLE,
    Launch,
    Target,
    configured,
    current_target,
    observing,
    table_key,
)

#: relative root mean square difference from the default's result above which a configuration is wrong; another tiling
#: sums in another order, which is far below, a missing tile far above
TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 2e-3}
#: a candidate must be faster by this share to be taken
GAIN = 0.01
MAX_ROUNDS = 4
MEASURE_S = 0.03  # of each timing, at least
MAX_WARPS, MAX_STAGES, MAX_TILE = 16, 5, 16384

Configuration = dict[str, int]
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Request:
    """What an operation asked ``configuration`` for."""

    kernel: str
    key: str
    default: Configuration
    current: Configuration


@dataclass
class Subject:
    """Something to tune on.

    ``make`` gives a function that runs it and returns its results by name, and one that only does the work, to be
    timed. ``record``: its launches as they would be under the active configuration, None where nothing is compiled
    ahead.
    """

    name: str
    make: Callable[[], tuple[Callable[[], dict[str, Tensor]], Callable[[], object]]]
    record: Callable[[], list[Launch]] | None = None


@dataclass
class Report:
    """What a tuning found: entries of the table, (subject, speed-up), and (kernel, key, configuration, why dropped)."""

    entries: dict[str, dict[str, Configuration]] = field(default_factory=dict)
    gains: list[tuple[str, float]] = field(default_factory=list)
    dropped: list[tuple[str, str, Configuration, str]] = field(default_factory=list)
    measured: int = 0
    out_of_time: bool = False


@contextmanager
def observed() -> Iterator[dict[str, Request]]:
    """Note what operations ask ``configuration`` for, by kernel. ValueError where one kernel has two problems."""
    requests: dict[str, Request] = {}

    def note(
        kernel: str, default: Mapping[str, int], dtype: torch.dtype, shape: Mapping[str, int], found: Configuration
    ) -> None:
        request = Request(kernel, table_key(dtype, shape), dict(default), dict(found))
        if requests.setdefault(kernel, request).key != request.key:
            raise ValueError(f"{kernel} runs on {requests[kernel].key} and on {request.key}: tune them apart")

    with observing(note):
        yield requests


def stepped(config: Mapping[str, int], steps: Mapping[str, int]) -> Configuration | None:
    """``config`` with sizes and warps doubled so many times (halved where negative), stages added; None where a setting
    leaves its bounds or does not exist."""
    found = dict(config)
    for name, step in steps.items():
        if name not in config:
            return None
        value = config[name]
        if name == "num_stages":
            found[name], most = value + step, MAX_STAGES
        else:
            most = MAX_WARPS if name == "num_warps" else MAX_TILE
            found[name] = value << step if step > 0 else value >> -step
        if not 1 <= found[name] <= most:
            return None
    return found


def neighbours(config: Mapping[str, int]) -> list[Configuration]:
    """Configurations one step away: a size or the warps halved or doubled, a stage more or less."""
    found = (stepped(config, {name: step}) for name in config for step in (-1, 1))
    return [candidate for candidate in found if candidate is not None]


def relative_error(result: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative root mean square difference over results, and whose; infinite where one is not finite."""
    worst, where = 0.0, ""
    for name, expected in reference.items():
        a, b = result[name].double(), expected.double()
        difference = (a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-12)
        error = difference.item() if bool(torch.isfinite(a).all()) else math.inf
        if error >= worst:
            worst, where = error, name
    return worst, where


@dataclass
class _Group:
    """Subjects that share their entries of the table."""

    requests: dict[str, Request]
    subjects: list[Subject]


def _groups(subjects: Sequence[Subject]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for subject in subjects:
        with observed() as requests:
            if subject.record is not None:
                subject.record()
            else:
                subject.make()[0]()
        signature = json.dumps(sorted((request.kernel, request.key) for request in requests.values()))
        groups.setdefault(signature, _Group(requests, [])).subjects.append(subject)
    return list(groups.values())


def tune(
    subjects: Sequence[Subject],
    timer: Timer,
    candidates: Mapping[str, Sequence[Mapping[str, int]]] | None = None,
    check: CompileCheck | None = None,
    budget_s: float = math.inf,
    progress: bool = False,
    done: Callable[[Report], None] | None = None,
) -> Report:
    """Find the fastest right configuration of every kernel that ``subjects`` launch.

    ``timer`` [s] measures a function; ``candidates`` as steps from the default, by kernel; ``check`` says why launches
    are not to be used, or None; ``done`` is called after each group of subjects with what is known so far. Stops when
    ``budget_s`` is over, with what was found until then.
    """
    report, deadline = Report(), time.monotonic() + budget_s
    groups = [group for group in _groups(subjects) if group.requests]
    with tqdm(total=sum(len(g.requests) for g in groups), desc="tuning", unit="kernel", disable=not progress) as bar:
        for group in groups:
            # a group may take what time is left, shared evenly: a hard problem does not starve the others
            share = (deadline - time.monotonic()) / (len(groups) - groups.index(group))
            _tune_group(group, timer, candidates or {}, check, time.monotonic() + share, report, bar)
            if done is not None:
                done(report)
    return report


class _Search:
    """Coordinate descent on one group."""

    def __init__(self, group: _Group, timer: Timer, check: CompileCheck | None, report: Report) -> None:
        self.group, self.timer, self.check, self.report = group, timer, check, report
        made = [subject.make() for subject in group.subjects]
        self.results, self.works = [results for results, _ in made], [work for _, work in made]
        self.references = [results() for results in self.results]
        self.start = {kernel: dict(request.current) for kernel, request in group.requests.items()}
        self.best = dict(self.start)
        self.tried = {kernel: [config] for kernel, config in self.best.items()}
        self.best_times = self.times(self.best)

    def times(self, configuration: Mapping[str, Configuration]) -> list[float]:
        self.report.measured += 1
        with configured(configuration):
            return [self.timer(work) for work in self.works]

    def step(self, kernel: str, candidates: Sequence[Configuration], deadline: float) -> bool:
        """Try new candidates of a kernel; whether the best of them is faster than what was."""
        improved = False
        fresh = [c for i, c in enumerate(candidates) if c not in self.tried[kernel] and c not in candidates[:i]]
        if self.check is not None and time.monotonic() < deadline:
            self.check.prepare([launch for c in fresh for launch in self._record(kernel, c)])
        before = dict(self.best)
        for candidate in fresh:
            if time.monotonic() > deadline:
                self.report.out_of_time = True
                break
            self.tried[kernel].append(candidate)
            if (reason := self._wrong(before, kernel, candidate)) is not None:
                self.report.dropped.append((kernel, self.group.requests[kernel].key, candidate, reason))
                continue
            times = self.times({**before, kernel: candidate})
            if _ratio(times, self.best_times) < 1 - GAIN:
                self.best = {**before, kernel: candidate}
                self.best_times, improved = times, True
        return improved

    def _record(self, kernel: str, candidate: Configuration) -> list[Launch]:
        launches: list[Launch] = []
        with configured({**self.best, kernel: candidate}):
            for subject in self.group.subjects:
                try:
                    launches += subject.record() if subject.record is not None else []
                except Exception:  # told when the candidate's turn comes
                    continue
        return launches

    def _wrong(self, others: Mapping[str, Configuration], kernel: str, candidate: Configuration) -> str | None:
        """Why not to use a candidate, None where it may be."""
        if self.check is not None and (reason := self.check(self._record(kernel, candidate))) is not None:
            return reason
        try:
            with configured({**others, kernel: candidate}):
                for results, reference in zip(self.results, self.references):
                    error, name = relative_error(results(), reference)
                    dtype = next(iter(reference.values())).dtype
                    if not error <= TOLERANCES.get(dtype, TOLERANCES[torch.float32]):
                        return f"wrong: {name} differs from the default's by {error:.2g}"
        except Exception as error:
            if "illegal memory access" in str(error) or "device-side assert" in str(error):
                raise RuntimeError(f"{kernel} with {candidate} broke the device: {error}") from error
            lines = str(error).strip().splitlines() or [""]
            return f"fails: {type(error).__name__}: {lines[-1][:120]}"
        return None

    def finish(self) -> None:
        """Enter the best, compared with the start once more: a lucky timing must not get into the table."""
        start_times = best_times = self.best_times
        if self.best != self.start:
            start_times, best_times = self.times(self.start), self.times(self.best)
            if _ratio(best_times, start_times) >= 1 - GAIN:
                self.best, best_times = self.start, start_times
        for kernel, config in self.best.items():
            self.report.entries.setdefault(kernel, {})[self.group.requests[kernel].key] = config
        for subject, before, after in zip(self.group.subjects, start_times, best_times):
            self.report.gains.append((subject.name, before / after))


def _tune_group(
    group: _Group, timer: Timer, candidates: Mapping[str, Sequence[Mapping[str, int]]], check: CompileCheck | None,
    deadline: float, report: Report, bar: tqdm,
) -> None:  # fmt: skip
    search = _Search(group, timer, check, report)
    for round_number in range(MAX_ROUNDS):
        improved = False
        for kernel, request in group.requests.items():
            bar.set_postfix_str(kernel)
            if round_number == 0:
                named = (stepped(request.default, steps) for steps in candidates.get(kernel, []))
                improved |= search.step(kernel, [config for config in named if config is not None], deadline)
            while search.step(kernel, neighbours(search.best[kernel]), deadline):
                improved = True
            if round_number == 0:
                bar.update()
        if not improved:
            break
    search.finish()


def _ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Geometric mean of ratios."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(times, reference)))


# the GPU


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


# the table


def default_folder() -> Path:
    """Where tables are written: the user's folder if there is one, else the package's."""
    return Path(os.environ.get(TABLES_VARIABLE) or PACKAGED_TABLES)


def write_table(folder: Path, target: Target, entries: Mapping[str, Mapping[str, Configuration]]) -> Path:
    """Merge ``entries`` into ``<folder>/<device>.json`` and forget what was read of it; returns the path."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    path = folder / f"{target.name}.json"
    known = json.loads(path.read_text())["kernels"] if path.is_file() else {}
    merged = {kernel: {**known.get(kernel, {}), **entries.get(kernel, {})} for kernel in sorted({*known, *entries})}
    described = {"backend": target.backend, "arch": target.arch, "shared_memory_bytes": target.shared_memory_bytes,
                 "warp_size": target.warp_size}  # fmt: skip
    versions = {name: installed(name) for name in ("torch", "triton", "xlstm-scaling")}
    table = {
        "device": target.name, "target": described, "versions": versions,
        "kernels": {kernel: dict(sorted(by_key.items())) for kernel, by_key in merged.items()},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)
    triton_launch._table.cache_clear()
    return path


# the command


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


def tune_command(args: argparse.Namespace) -> int:
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m xlstm_scaling.kernels.tuning", description=__doc__.split("\n")[0])
    add_tune_arguments(parser)
    try:
        return tune_command(parser.parse_args(argv))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
