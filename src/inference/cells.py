"""The cells of one model: which are tried, warmed up, repeated, and when one is given up."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from xlstm_scaling.accounting import ModelShape, prefill_flops
from xlstm_scaling.accounting.dtypes import FP32_BYTES
from xlstm_scaling.accounting.inference_memory import inference_memory
from xlstm_scaling.accounting.memory import HEADROOM
from xlstm_scaling.inference.counts import DTYPE_BYTES
from xlstm_scaling.inference.energy import EnergyMeter, find_meter
from xlstm_scaling.inference.timing import (
    available_bytes,
    out_of_memory,
    parameter_bytes,
    pass_memory,
    prepare,
    timed_pass,
)
from xlstm_scaling.models import LanguageModel

#: a cell is skipped unseen when its predicted time exceeds the limit by this factor
PREDICTION_MARGIN = 1.5
#: a first pass that is too slow by no more than this factor may have met a hiccup of the machine, and is tried again
HICCUP = 1.5
#: tokens of the pass that loads libraries and starts threads before anything is measured
FIRST_TOKENS = 8
#: passes of a cell in one round, at most: what is kept of them must stay small
MOST_ROUND_PASSES = 8


@dataclass(frozen=True)
class BenchmarkModel:
    """A model to measure; ``build`` makes it in the process that measures it, with fp32 parameters: a function that
    can be pickled (of a module, or a ``functools.partial`` of one)."""

    name: str
    arch: str
    shape: ModelShape
    trained: bool
    build: Callable[[], LanguageModel]


@dataclass
class Cell:
    """One batch size and prefill length of one model, and what was measured of it so far.

    ``status``: ``ok``, ``out_of_memory``, ``skipped`` or ``failed``. ``pass_s``: a warm-up pass. ``round_passes``: one
    after another in each round of repeats. ``others``: share of all CPUs that other processes used, a pass.
    """

    batch_size: int
    prefill_length: int
    key: str
    status: str = "ok"
    detail: str = ""
    pass_s: float | None = None
    round_passes: int = 1
    peak_memory_bytes: float | None = None
    extra_memory_bytes: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    prefill_energy_j: list[float] = field(default_factory=list)
    decode_energy_j: list[float] = field(default_factory=list)
    energy_source: str = ""
    energy_detail: str = ""

    def complete(self, rounds: int) -> bool:
        """Whether nothing of it is left to do in so many rounds."""
        return self.status != "ok" or len(self.ttft_s) >= rounds * self.round_passes

    def give_up(self, status: str, detail: str) -> None:
        self.status, self.detail = status, detail


class Load:
    """Share of all CPUs that other processes used since this was made."""

    def __init__(self) -> None:
        self.busy, self.own, self.wall = self._busy(), time.process_time(), time.perf_counter()

    @staticmethod
    def _busy() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0)

    def others(self) -> float:
        """Between 0 and 1; of a few milliseconds a rough number, as the system counts in hundredths of a second."""
        wall = (time.perf_counter() - self.wall) * (psutil.cpu_count() or 1)
        own = time.process_time() - self.own
        return min(1.0, max(0.0, self._busy() - self.busy - own) / wall) if wall > 0 else 0.0


def predicted_memory(
    shape: ModelShape, batch_size: int, prefill_length: int, config: Mapping[str, Any]
) -> Mapping[str, int]:
    """`inference_memory` of a cell by the settings of the stage."""
    size = DTYPE_BYTES[str(config["dtype"])]
    steps, chunk = int(config["generate_steps"]), config.get("prefill_chunk")
    return inference_memory(shape, batch_size, prefill_length, steps, size, size, chunk)


def expect(cell: Cell, tried: Sequence[Cell], shape: ModelShape, config: Mapping[str, Any], free_bytes: float) -> bool:
    """Whether to try a cell, by those of this model that were; else it is given up with a status and a reason.

    What the previous prefill of its batch, or the previous batch at its prefill, was given up for, it is too. Its time
    is that of such a pass, times the ratio of their FLOPs; its memory that of ``accounting``, or of the previous
    prefill as measured, times the ratio that ``accounting`` gives, whichever is more.

    Args:
        cell: to be tried.
        tried: cells of the same model, in order of batch, then prefill.
        shape: of the model.
        config: group ``inference``, its dtype resolved.
        free_bytes: what is free now, the parameters being there already.
    """
    shorter = [c for c in tried if c.batch_size == cell.batch_size and c.prefill_length < cell.prefill_length][-1:]
    smaller = [c for c in tried if c.prefill_length == cell.prefill_length and c.batch_size < cell.batch_size][-1:]
    for other in (*shorter, *smaller):
        if other.status in ("skipped", "out_of_memory"):
            where = f"prefill {other.prefill_length} of batch {other.batch_size}"
            cell.give_up(other.status, f"not tried: {where} was {other.status.replace('_', ' ')}")
            return False
    passes, limit = int(config["repeats"]) + int(config["warmup"]), float(config["max_cell_s"])
    flops = prefill_flops(shape, cell.prefill_length, cell.batch_size)
    for other in (*shorter, *smaller):
        if other.pass_s is None:
            continue
        predicted_s = other.pass_s * flops / prefill_flops(shape, other.prefill_length, other.batch_size) * passes
        if predicted_s > PREDICTION_MARGIN * limit:
            cell.give_up("skipped", f"predicted to take {predicted_s:.3g} s, more than max_cell_s = {limit:g} s")
            return False
    needed = _needed(shape, cell, config)
    for other in shorter:
        needed = max(needed, other.extra_memory_bytes * needed / _needed(shape, other, config))
    if needed > HEADROOM * free_bytes:
        text = (
            f"predicted to need {needed:.3g} bytes beside the parameters, {HEADROOM:.0%} of {free_bytes:.3g} are free"
        )
        cell.give_up("out_of_memory", text)
        return False
    return True


def _needed(shape: ModelShape, cell: Cell, config: Mapping[str, Any]) -> float:
    items = predicted_memory(shape, cell.batch_size, cell.prefill_length, config)
    return sum(items.values()) - items["parameters"]


class ModelRun:
    """Cells of one model: a warm-up of each that was not measured yet, then rounds over all of them; of a cell whose
    passes are short, many in a row. Cells may have been measured in part."""

    def __init__(
        self,
        entry: BenchmarkModel,
        config: Mapping[str, Any],
        device: str,
        cells: list[Cell],
        rounds: int,
        begin: Callable[[Cell], None],
        changed: Callable[[Cell], None],
    ) -> None:
        """``rounds``: how many every cell is to have in the end. ``begin`` gets each cell before it is worked on,
        ``changed`` whenever something of it was measured."""
        self.entry, self.config, self.device, self.cells = entry, config, device, cells
        self.begin, self.changed = begin, changed
        self.steps, self.rounds = int(config["generate_steps"]), rounds
        self.passes = int(config["repeats"]) + int(config["warmup"])
        self.chunk = config.get("prefill_chunk")
        self.model: LanguageModel | None = None
        self.meter: EnergyMeter | None = None
        self.no_meter = ""

    def _prompt(self, batch_size: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(length)
        size = (batch_size, length)
        return torch.randint(self.entry.shape.vocab_size, size, generator=generator).to(self.device)

    def _build(self) -> str:
        """Build the model and run it once; why it does not fit, or nothing."""
        parameters = predicted_memory(self.entry.shape, 1, 1, self.config)["parameters"]
        weight = DTYPE_BYTES[str(self.config["dtype"])]
        # built in fp32 on the host, then cast and moved
        for where, needed in (("cpu", parameters * FP32_BYTES / weight), (self.device, parameters)):
            free = available_bytes(where)
            if needed > HEADROOM * free:
                return f"the parameters need {needed:.3g} bytes on {where}, {HEADROOM:.0%} of {free:.3g} are free"
        try:
            self.model = prepare(self.entry.build(), getattr(torch, str(self.config["dtype"])), self.device)
            timed_pass(self.model, self._prompt(1, FIRST_TOKENS), 1)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return "the parameters do not fit"
        return ""

    def run(self) -> None:
        """Measure all that is not complete."""
        gc.collect()  # once: it takes longer than a pass
        if problem := self._build():
            for cell in self._left():
                cell.give_up("out_of_memory", problem)
                self.changed(cell)
            return
        self.meter, self.no_meter = find_meter(self.device)
        tried: list[Cell] = []
        for cell in self.cells:  # by batch size, then prefill length
            if cell.status == "ok" and not cell.ttft_s:
                self.begin(cell)
                if expect(cell, tried, self.entry.shape, self.config, available_bytes(self.device)):
                    self.warm_up(cell)
                self.changed(cell)
            tried.append(cell)
        for rounds in range(1, self.rounds + 1):
            for cell in self._left():
                if not cell.complete(rounds):
                    self.begin(cell)
                    self._guard(cell, lambda cell=cell, rounds=rounds: self._round(cell, rounds))
                    self.changed(cell)

    def _left(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.complete(self.rounds)]

    def _guard(self, cell: Cell, work: Callable[[], None]) -> None:
        try:
            work()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            cell.give_up("out_of_memory", str(error).strip().splitlines()[0][:200] if str(error) else "")

    def warm_up(self, cell: Cell) -> None:
        """Discarded passes: how long one takes, and its memory; marks a cell that takes too long."""
        parameters, limit = parameter_bytes(self.model), float(self.config["max_cell_s"])

        def work() -> None:
            prompt = self._prompt(cell.batch_size, cell.prefill_length)
            for _ in range(int(self.config["warmup"])):
                cell.pass_s, peak = pass_memory(self.model, prompt, self.steps, self.chunk)
                if 1 < cell.pass_s * self.passes / limit < HICCUP:
                    cell.pass_s = min(cell.pass_s, pass_memory(self.model, prompt, self.steps, self.chunk)[0])
                cell.peak_memory_bytes, cell.extra_memory_bytes = peak, peak - parameters
                if cell.pass_s * self.passes > limit:
                    text = f"one pass took {cell.pass_s:.3g} s, {self.passes} exceed max_cell_s = {limit:g} s"
                    cell.give_up("skipped", text)
                    return
            fitting = int(float(self.config.get("round_s") or 0.0) / cell.pass_s)
            cell.round_passes = min(max(1, fitting), MOST_ROUND_PASSES)

        self._guard(cell, work)

    def _round(self, cell: Cell, rounds: int) -> None:
        while not cell.complete(rounds):
            self._repeat(cell)

    def _repeat(self, cell: Cell) -> None:
        prompt, load, readings = self._prompt(cell.batch_size, cell.prefill_length), Load(), []
        meter = self.meter

        def mark() -> None:
            if meter is not None:
                readings.append(meter.read())

        ttft_s, step_times_s = timed_pass(self.model, prompt, self.steps, self.chunk, mark)
        cell.others.append(load.others())
        cell.ttft_s.append(ttft_s)
        cell.step_times_s += step_times_s
        if meter is None:
            cell.energy_detail = self.no_meter
        else:
            cell.energy_source = meter.name
            cell.prefill_energy_j.append(meter.used_j(readings[0], readings[1]))
            cell.decode_energy_j.append(meter.used_j(readings[1], readings[2]))
