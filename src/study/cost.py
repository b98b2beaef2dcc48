"""What a study will cost before anyone submits it: FLOPs, device hours, wall time, storage and energy by stage and set.

FLOPs are counted as everywhere (``accounting``, convention ``paper``); how fast they are done is measured where runs of
this architecture have finished on such a device, else assumed, and the assumptions are part of the answer. Wall times
are of runs that start longest first, as many side by side as ``count`` devices allow, after the trunks that they share.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig

from xlstm_scaling.accounting import count_flops, make_shape, prefill_flops, step_flops
from xlstm_scaling.accounting.hardware import ASSUMED_UTILISATION, Device, find_device
from xlstm_scaling.accounting.memory import plan_memory
from xlstm_scaling.evaluation.selection import evaluated_runs
from xlstm_scaling.study.amounts import duration_text
from xlstm_scaling.study.config import ConfigError, to_dict
from xlstm_scaling.study.files import finite, read_json
from xlstm_scaling.study.plan import benchmarked_runs, model_vocab_size, num_heads, plan_runs
from xlstm_scaling.study.resources import Speed, expected_speed
from xlstm_scaling.study.run_spec import RunSpec, TrunkSpec, find_trunks, spec_of

#: text that one core tokenizes, reading and merging included (benchmarks/tokens.py, docs/data.md) [bytes/s]
TOKENIZE_BYTES_PER_S = 4e6
#: of web text with a vocabulary of 50,000, where no tokens are there to count [bytes]
BYTES_PER_TOKEN = 4.5
#: of a core that works [W]
CORE_POWER_W = 5.0
#: fp32 weights that a run keeps, and what each of its two checkpoints holds beside them: AdamW's two moments
WEIGHT_BYTES, CHECKPOINT_BYTES, CHECKPOINTS = 4, 12, 2
#: result, curve, plan and log of a run
RECORD_BYTES = 1e5


@dataclass(frozen=True)
class Rates:
    """How fast, and at what price: ``device`` None = the runs' own hardware (``hardware.flops_per_s`` a run).

    ``utilisation``: of the device's peak, assumed; ``power_w``: of a device; ``cores``: that tokenize.
    """

    device: Device | None = None
    count: int = 1
    utilisation: float = ASSUMED_UTILISATION
    power_w: float = math.nan
    price_per_hour: float = math.nan
    cores: int = 64


@dataclass(frozen=True)
class Job:
    """One training job: so many updates of a run or trunk, on ``devices``, after the job ``after``."""

    name: str
    experiment_set: str
    spec: RunSpec
    steps: int
    after: str | None = None

    @property
    def flops(self) -> float:
        return self.steps * self.spec.flops_per_step


@dataclass
class Row:
    """A stage, or an experiment set of the stage train. Device hours of ``count`` devices' kind; core hours of CPUs.

    ``wall_time_s``: on its own, with all devices; ``storage_bytes``: what stays.
    """

    stage: str
    experiment_set: str = ""
    runs: int = 0
    flops: float = 0.0
    device_hours: float = 0.0
    core_hours: float = 0.0
    wall_time_s: float = 0.0
    storage_bytes: float = 0.0
    energy_j: float = 0.0
    price: float = 0.0


@dataclass
class Cost:
    """``rows``: by stage and set; ``total``: of all; ``assumptions``: what it rests on; ``warnings``: what will not
    work as configured."""

    rows: list[Row]
    total: Row
    peak_checkpoint_bytes: float
    longest_run: dict
    finished_runs: int
    assumptions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        """For JSON; unknown numbers are null."""
        return finite(asdict(self))


def training_jobs(runs: Sequence[RunSpec], trunks: Sequence[TrunkSpec]) -> list[Job]:
    """The jobs that train these runs: trunks once, runs that share one from where they leave it."""
    shared = {trunk.trunk_id for trunk in trunks}
    jobs = [Job(t.trunk_id, t.runs[0].experiment_set, t.spec, t.spec.num_train_steps) for t in trunks]
    for run in runs:
        branches = run.trunk_id in shared
        steps = run.cooldown_steps if branches else run.num_train_steps
        jobs.append(Job(run.run_id, run.experiment_set, run, steps, run.trunk_id if branches else None))
    return jobs


def makespan_s(times: Mapping[str, float], after: Mapping[str, str | None], slots: int) -> float:
    """Time until all jobs are done with ``slots`` side by side, each after the job it waits for, those with the longest
    way to the end first. ValueError without a slot."""
    if slots < 1:
        raise ValueError("no job can run on no device")
    waiting: dict[str | None, list[str]] = {}
    for name in times:
        waiting.setdefault(after.get(name), []).append(name)

    def tail(name: str) -> float:
        return times[name] + max(map(tail, waiting.get(name, [])), default=0.0)

    ready = [(-tail(name), name) for name in waiting.get(None, [])]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < slots:
            _, name = heapq.heappop(ready)
            heapq.heappush(running, (now + times[name], name))
        now, name = heapq.heappop(running)
        for freed in waiting.get(name, []):
            heapq.heappush(ready, (-tail(freed), freed))
    return now


def device_speeds(runs_folder: Path, device: Device | None, kind: str) -> list[Speed]:
    """FLOP/s per device of the runs of any study that have finished on this model of device (of this kind, where
    ``device`` is None)."""
    speeds = []
    for path in sorted(Path(runs_folder).glob("*/result.json")):
        result, plan = read_json(path), path.with_name("spec.json")
        name = find_device(result.get("device_name") or "")
        same = result.get("device") == kind if device is None else name == device
        if not (same and plan.is_file()):
            continue
        spec = spec_of(read_json(plan))
        speed = Speed.of(spec, result) if spec is not None else None  # else its speed is another code's
        if speed is not None:
            speeds.append(replace(speed, flops_per_s=speed.flops_per_s / result.get("devices", 1)))
    return speeds


class _Estimate:
    """The parts of a study's cost, with the speeds and assumptions they share."""

    def __init__(self, config: DictConfig, results: Path, rates: Rates) -> None:
        self.config, self.results, self.rates = config, Path(results), rates
        hardware = config.hardware
        self.per_run = hardware.devices_per_run * hardware.nodes_per_run
        self.slots = rates.count // self.per_run
        if self.slots < 1:
            raise ConfigError(
                f"a run takes {self.per_run} devices (hardware.devices_per_run x nodes_per_run) and there are "
                f"{rates.count}: raise --count, or lower hardware.devices_per_run"
            )
        self.runs = plan_runs(config)
        self.trunks = find_trunks(self.runs)
        self.speeds = device_speeds(self.results / "runs", rates.device, hardware.device)
        self.assumptions: list[str] = []
        self.warnings: list[str] = []
        self._assumed_for: set[str] = set()

    def device_flops_per_s(self, spec: RunSpec) -> float:
        """Of one device that trains this run: measured, else assumed."""
        if self.rates.device is None:
            assumed = self.config.hardware.flops_per_s / self.per_run
        else:
            assumed = self.rates.utilisation * self.rates.device.flops_per_s(spec.compute_dtype)
        if not any(speed.arch == spec.arch for speed in self.speeds):
            self._assumed_for.add(spec.arch)
        return expected_speed(spec, self.speeds, assumed)

    def row(self, stage: str, device_s: float = 0.0, core_s: float = 0.0, **values: object) -> Row:
        rates = self.rates
        energy = device_s * rates.power_w if device_s else 0.0
        price = device_s / 3600 * rates.price_per_hour if device_s else 0.0
        energy += core_s * CORE_POWER_W
        return Row(
            stage, device_hours=device_s / 3600, core_hours=core_s / 3600, energy_j=energy, price=price, **values
        )

    # stages

    def tokens(self) -> Row:
        """Text -> tokens, once for all studies that share them."""
        from xlstm_scaling.study.paths import StudyPaths

        folder = StudyPaths.of(self.config, self.results).tokens
        vocab = self.runs[0].shape["vocab_size"]
        if (folder / "meta.json").is_file():
            train = read_json(folder / "meta.json")["splits"]["train"]
            num_tokens, text_bytes = train["num_tokens"], train["num_bytes"]
        else:
            expected = self.config.corpus.get("expected_tokens")
            if expected is None:
                self.assumptions.append("tokens: not counted, as corpus.expected_tokens is not set and there are none")
                return Row("tokens")
            num_tokens, text_bytes = float(expected), expected * BYTES_PER_TOKEN
            self.assumptions.append(f"tokens: corpus.expected_tokens, {BYTES_PER_TOKEN} bytes of text each")
        core_s = text_bytes / TOKENIZE_BYTES_PER_S
        self.assumptions.append(
            f"tokens: {TOKENIZE_BYTES_PER_S / 1e6:g} MB/s and {CORE_POWER_W:g} W a core, {self.rates.cores} cores"
        )
        size = num_tokens * (2 if vocab <= 65536 else 4)
        return self.row("tokens", core_s=core_s, wall_time_s=core_s / self.rates.cores, storage_bytes=size)

    def train(self) -> tuple[list[Row], dict, float]:
        """A row a set and one of all validation; the longest run; what checkpoints take at the most."""
        jobs = training_jobs(self.runs, self.trunks)
        device_s = {job.name: job.flops / self.device_flops_per_s(job.spec) for job in jobs}
        checks_s = {job.name: job.spec.validation_flops / self.device_flops_per_s(job.spec) for job in jobs}
        after = {job.name: job.after for job in jobs}
        rows = []
        for name in dict.fromkeys(job.experiment_set for job in jobs):
            own = [job for job in jobs if job.experiment_set == name]
            inside = {job.name for job in own}
            times = {job.name: device_s[job.name] / self.per_run for job in own}
            rows.append(
                self.row(
                    "train",
                    sum(device_s[job.name] for job in own),
                    experiment_set=name,
                    runs=sum(run.experiment_set == name for run in self.runs),
                    flops=sum(job.flops for job in own),
                    wall_time_s=makespan_s(
                        times, {k: v if v in inside else None for k, v in after.items()}, self.slots
                    ),
                    storage_bytes=self._kept_bytes(name),
                )
            )
        flops = sum(job.spec.validation_flops for job in jobs)
        validation = self.row("train", sum(checks_s.values()), experiment_set="validation", flops=flops)
        both = {name: (device_s[name] + checks_s[name]) / self.per_run for name in device_s}
        self.train_wall_s = makespan_s(both, after, self.slots)
        validation.wall_time_s = self.train_wall_s - makespan_s(
            {name: device_s[name] / self.per_run for name in device_s}, after, self.slots
        )
        longest = max(both, key=lambda name: both[name])
        self._hint(device_s, after, both[longest])
        self._check_memory()
        sizes = sorted((job.spec.num_params for job in jobs), reverse=True)[: self.slots]
        peak = (CHECKPOINTS + 1) * CHECKPOINT_BYTES * sum(sizes)  # the oldest goes when the next one is there
        about = {"run": longest, "time_s": both[longest], "devices": self.per_run}
        return [*rows, validation], about, peak

    def _kept_bytes(self, experiment_set: str) -> float:
        """What a set of runs leaves: weights and records, and the branches of trunks."""
        runs = [run for run in self.runs if run.experiment_set == experiment_set]
        branches = [t for t in self.trunks if t.runs[0].experiment_set == experiment_set]
        kept = sum(WEIGHT_BYTES * run.num_params + RECORD_BYTES for run in runs)
        return kept + sum(CHECKPOINT_BYTES * t.spec.num_params * len(t.steps) for t in branches)

    def _hint(self, device_s: Mapping[str, float], after: Mapping[str, str | None], longest_s: float) -> None:
        """How many devices a run should have, where the longest run decides when all is done."""
        even = sum(device_s.values()) / self.rates.count
        if longest_s <= even or self.per_run == self.rates.count:
            return
        options = [d for d in (2**k for k in range(20)) if self.per_run < d <= self.rates.count]
        walls = {d: self._wall_with(d, device_s, after) for d in options}
        if not walls:
            return
        best = min(walls.values())
        chosen = next(d for d, wall in walls.items() if wall <= 1.05 * best)
        self.warnings.append(
            f"the longest run decides when all is done: {duration_text(longest_s)} on {self.per_run} device(s), and "
            f"all runs together {duration_text(even)} on {self.rates.count}. With {chosen} devices a run "
            "(hardware.devices_per_run x nodes_per_run), training would take "
            f"{duration_text(walls[chosen])}, if they scale"
        )

    def _wall_with(self, devices: int, device_s: Mapping[str, float], after: Mapping[str, str | None]) -> float:
        times = {name: seconds / devices for name, seconds in device_s.items()}
        return makespan_s(times, after, self.rates.count // devices)

    def _check_memory(self) -> None:
        """Runs that do not fit ``per_run`` devices, were their parameters sharded over all of them."""
        memory = self.rates.device.memory_bytes if self.rates.device else math.nan
        if not math.isfinite(memory):
            return
        too_large, fits = [], {}
        for run in self.runs:
            key = (run.model_shape, run.context_length, run.batch_sequences)
            if key not in fits:
                try:
                    size = 4 if run.compute_dtype == "float32" else 2
                    plan_memory(*key, self.per_run, memory, None, size)
                    fits[key] = True
                except ValueError:
                    fits[key] = False
            too_large += [] if fits[key] else [run]
        if too_large:
            smallest = min(run.num_params for run in too_large)
            self.warnings.append(
                f"{len(too_large)} runs, of {smallest / 1e9:.2g}B parameters and more, do not fit the memory of "
                f"{self.per_run} device(s): raise hardware.devices_per_run (xlstm-scaling memory says what fits)"
            )

    def evaluate(self) -> Row:
        """Loss beyond the training context: at most so many forward passes over long windows of the largest models."""
        settings = to_dict(self.config.evaluation)
        windows = settings["max_documents"] * settings["windows_per_document"]
        flops = device_s = 0.0
        candidates = evaluated_runs(self.config, self.runs)
        for key in dict.fromkeys((run.context_length, run.arch) for run in candidates):
            here = [run for run in candidates if (run.context_length, run.arch) == key]
            for run in sorted(here, key=lambda run: -run.num_params)[: settings["num_runs"]]:
                long = count_flops(run.model_shape, round(settings["multiple"] * run.context_length)).forward
                within = settings["multiple"] * count_flops(run.model_shape, run.context_length).forward
                flops += windows * (long + within)
                device_s += windows * (long + within) / self.device_flops_per_s(run)
        return self.row("evaluate", device_s, flops=flops, wall_time_s=device_s)  # one after the other

    def inference(self) -> Row:
        """The latency measurements, one cell after the other on one device; none takes longer than its limit."""
        settings, study = to_dict(self.config.inference), self.config.study
        passes = settings["repeats"] + settings["warmup"]
        shapes = [(run.model_shape, run) for run in benchmarked_runs(self.config, self.runs)]
        vocab = model_vocab_size(self.config)
        by_arch = {run.arch: run for run in self.runs}
        sizes = [size for size in (settings["untrained"] or {}).values() if size is not None]  # None: left out
        for size in sizes:
            for arch in study.architectures:
                heads = num_heads(study, arch, size["embedding_dim"], size["num_heads"])
                options = study.shape_options.get(arch, {})
                shape = make_shape(arch, size["embedding_dim"], size["num_blocks"], heads, vocab, **options)
                shapes.append((shape, by_arch[arch]))
        flops = seconds = 0.0
        for shape, like in shapes:
            for length in settings["prefill_lengths"]:
                for batch in settings["batch_sizes"]:
                    steps = settings["generate_steps"] * step_flops(shape, length, batch)
                    cell = passes * (prefill_flops(shape, length, batch) + steps)
                    took = cell / self.device_flops_per_s(like)
                    share = min(1.0, settings["max_cell_s"] / took)
                    flops, seconds = flops + share * cell, seconds + share * took
        return self.row("inference", seconds, flops=flops, wall_time_s=seconds)

    def all(self) -> Cost:
        train, longest, peak = self.train()
        rows = [self.tokens(), *train, self.evaluate(), self.inference()]
        names = ("flops", "device_hours", "core_hours", "storage_bytes", "energy_j", "price")
        total = Row("total", runs=len(self.runs), **{name: sum(getattr(row, name) for row in rows) for name in names})
        total.wall_time_s = sum(row.wall_time_s for row in rows if row.stage != "train") + self.train_wall_s
        finished = sum((self.results / "runs" / run.run_id / "result.json").is_file() for run in self.runs)
        return Cost(
            rows, total, peak, longest, finished, [*self._speed_assumptions(), *self.assumptions], self.warnings
        )

    def _speed_assumptions(self) -> list[str]:
        device, rates, said = self.rates.device, self.rates, []
        for arch in dict.fromkeys(run.arch for run in self.runs):
            measured = sum(speed.arch == arch for speed in self.speeds)
            if arch not in self._assumed_for:
                said.append(
                    f"{arch}: as fast as the {measured} runs that have finished on such devices, nearest in size"
                )
            elif device is None:
                said.append(f"{arch}: hardware.flops_per_s = {self.config.hardware.flops_per_s:.3g} FLOP/s a run")
            else:
                dtype = next(run.compute_dtype for run in self.runs if run.arch == arch)
                peak = device.flops_per_s(dtype)
                said.append(f"{arch}: {rates.utilisation:.0%} of a {device.name}'s {dtype} peak, {peak:.4g} FLOP/s")
        if self.per_run > 1:
            said.append(f"{self.per_run} devices train a run {self.per_run} times as fast as one")
        if math.isfinite(rates.power_w):
            said.append(f"power: {rates.power_w:g} W a device, hosts and cooling not counted")
        said.append("not counted: certificates, fits, figures, report (minutes on a CPU), failures, waiting in a queue")
        return said


def study_cost(config: DictConfig, results: Path, rates: Rates) -> Cost:
    """The cost of a whole study, what has finished included. ConfigError where a run takes more devices than that."""
    return _Estimate(config, results, rates).all()
