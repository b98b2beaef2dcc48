"""Search for the fastest configuration of every kernel, whatever measures it (the command is in `tune_command`).

Every problem is measured as a whole, forward and backward, by coordinate descent over the kernels that it launches:
the candidates that a kernel's module names (``CANDIDATES``: several settings at once, where one alone only costs), then
the neighbours of the best so far (a tile halved or doubled, a stage or twice the warps more or less), until none is
faster. A candidate that does not compile, spills, exceeds the shared memory or changes the result is dropped and named.
Problems that share their entries of the table (other batches, other lengths) are tuned together, on the geometric mean
of their times.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from xlstm_scaling.kernels.triton_launch import Launch, configured, observing, table_key

#: relative root mean square difference from the default's result above which a configuration is wrong; another tiling
#: sums in another order, which is far below, a missing tile far above
TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 2e-3}
#: a candidate must be faster by this share to be taken
GAIN = 0.01
MAX_ROUNDS = 4
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


class LaunchCheck(Protocol):
    """Which launches can be used."""

    def prepare(self, launches: Sequence[Launch]) -> None:
        """Get ready for launches that are asked for next, all at once."""

    def __call__(self, launches: Sequence[Launch]) -> str | None:
        """Why launches cannot be used, None where they can."""


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
    check: LaunchCheck | None = None,
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

    def __init__(self, group: _Group, timer: Timer, check: LaunchCheck | None, report: Report) -> None:
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
    group: _Group, timer: Timer, candidates: Mapping[str, Sequence[Mapping[str, int]]], check: LaunchCheck | None,
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
