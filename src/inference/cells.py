"""The cells of one model: which are tried, warmed up, repeated, and when one is given up."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from xlstm_scaling.accounting import ModelShape, prefill_flops
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
PREDICTION_MARGIN = 2.0


@dataclass(frozen=True)
class BenchmarkModel:
    """A model to measure; ``build`` makes it when its turn comes, with fp32 parameters."""

    name: str
    arch: str
    shape: ModelShape
    trained: bool
    build: Callable[[], LanguageModel]


@dataclass
class Cell:
    """One batch size and prefill length of one model, and what was measured of it."""

    batch_size: int
    prefill_length: int
    key: str
    status: str = "ok"
    detail: str = ""
    peak_memory_bytes: float = float("nan")
    ttft_s: list[float] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)


class Load:
    """Share of all CPUs that other processes used since this was made."""

    def __init__(self) -> None:
        self.busy, self.own, self.wall = self._busy(), time.process_time(), time.perf_counter()

    @staticmethod
    def _busy() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0)

    def others(self) -> float:
        wall = (time.perf_counter() - self.wall) * (psutil.cpu_count() or 1)
        own = time.process_time() - self.own
        return max(0.0, self._busy() - self.busy - own) / wall if wall > 0 else 0.0


class ModelRun:
    """All cells of one model: a warm-up of each, then the repeats in rounds over the cells, so that a drift of the
    machine meets all of them alike."""

    def __init__(self, entry: BenchmarkModel, config: Mapping[str, Any], device: str, cells: list[Cell]) -> None:
        self.entry, self.config, self.device, self.cells = entry, config, device, cells
        self.steps = int(config["generate_steps"])
        self.passes = int(config["repeats"]) + int(config["warmup"])
        self.model: LanguageModel | None = None

    def _prompt(self, cell: Cell) -> torch.Tensor:
        generator = torch.Generator().manual_seed(cell.prefill_length)
        size = (cell.batch_size, cell.prefill_length)
        return torch.randint(self.entry.shape.vocab_size, size, generator=generator).to(self.device)

    def _expect(self, cell: Cell, before: Cell | None, pass_s: float, activations: float) -> bool:
        """Whether to try a cell, from the previous prefill of its batch."""
        if before is None:
            return True
        if before.status != "ok":
            cell.status = before.status
            cell.detail = f"not tried: prefill {before.prefill_length} was {before.status.replace('_', ' ')}"
            return False
        counts = [prefill_flops(self.entry.shape, c.prefill_length) for c in (cell, before)]
        predicted_s = pass_s * counts[0] / counts[1] * self.passes
        if predicted_s > PREDICTION_MARGIN * float(self.config["max_cell_s"]):
            cell.status = "skipped"
            cell.detail = f"predicted to take {predicted_s:.3g} s, more than max_cell_s = {self.config['max_cell_s']} s"
            return False
        predicted = activations * cell.prefill_length / before.prefill_length
        if predicted > available_bytes(self.device):
            cell.status = "out_of_memory"
            cell.detail = f"predicted to take {predicted:.3g} bytes, more than are free"
            return False
        return True

    def _guard(self, cell: Cell, work: Callable[[], None]) -> None:
        try:
            work()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            cell.status, cell.detail = "out_of_memory", str(error).strip().splitlines()[0][:200] if str(error) else ""

    def warm_up(self, cell: Cell, parameters: int) -> tuple[float, float]:
        """(time of one pass [s], memory on top of the parameters [bytes]); marks a cell that takes too long."""
        seen = [0.0, 0.0]

        def work() -> None:
            prompt, limit = self._prompt(cell), float(self.config["max_cell_s"])
            for _ in range(int(self.config["warmup"])):
                seen[0], cell.peak_memory_bytes = pass_memory(self.model, prompt, self.steps)
                if limit / self.passes < seen[0] < limit:  # a hiccup of the machine, or really slow?
                    seen[0] = min(seen[0], pass_memory(self.model, prompt, self.steps)[0])
                seen[1] = cell.peak_memory_bytes - parameters
                if seen[0] * self.passes > limit:
                    cell.status = "skipped"
                    cell.detail = f"one pass took {seen[0]:.3g} s, {self.passes} exceed max_cell_s = {limit:g} s"
                    return

        self._guard(cell, work)
        return seen[0], seen[1]

    def run(self, done: Callable[[Cell], None], name: Callable[[Cell], None]) -> None:
        """Measure all cells; ``done`` gets each when it is complete, ``name`` when it is worked on."""
        gc.collect()  # once: it takes longer than a pass
        try:
            self.model = prepare(self.entry.build(), getattr(torch, str(self.config["dtype"])), self.device)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            for cell in self.cells:
                cell.status, cell.detail = "out_of_memory", "the parameters do not fit"
                done(cell)
            return
        parameters, before, pass_s, activations = parameter_bytes(self.model), None, 0.0, 0.0
        for cell in self.cells:  # by batch size, then prefill length
            name(cell)
            previous = before if before is not None and before.batch_size == cell.batch_size else None
            if self._expect(cell, previous, pass_s, activations):
                pass_s, activations = self.warm_up(cell, parameters)
            before = cell
            if cell.status != "ok":
                done(cell)
        for repeat in range(int(self.config["repeats"])):
            for cell in [c for c in self.cells if c.status == "ok"]:
                name(cell)
                self._guard(cell, lambda cell=cell: self._repeat(cell))
                if cell.status != "ok" or repeat + 1 == int(self.config["repeats"]):
                    done(cell)
        self.model = None

    def _repeat(self, cell: Cell) -> None:
        prompt, load = self._prompt(cell), Load()
        ttft_s, step_times_s = timed_pass(self.model, prompt, self.steps)
        cell.others.append(load.others())
        cell.ttft_s.append(ttft_s)
        cell.step_times_s += step_times_s
