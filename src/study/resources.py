"""What a scheduler is asked for: run time, memory, devices and packs of runs, computed from the plan.

Times are FLOPs over FLOP/s: of finished runs of the study where there are some, else the assumed
``hardware.flops_per_s``. Nothing here is part of a run's identity.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from xlstm_scaling.accounting.layout import Layout
from xlstm_scaling.accounting.memory import training_memory
from xlstm_scaling.study.files import read_json
from xlstm_scaling.study.run_spec import RunSpec, TrunkSpec
from xlstm_scaling.study.schemas import HardwareConfig

#: resident memory of a training process without its model: Python, torch, the device's context [bytes]
PROCESS_BYTES = {"cpu": 0.6e9, "cuda": 6e9}
#: of what a job runs around it: two Snakemakes, one in the other [bytes]
JOB_BYTES = 0.5e9
#: host memory per parameter while a checkpoint of one process is read (the file, its copy, its tensors; 12 bytes each)
CHECKPOINT_BYTES = 36
#: of a shard while it is written
SHARD_BYTES = 12
#: how many finished runs a speed is the median of
NEAREST_RUNS = 5
#: Slurm's clock for a signal before the end of a job is this coarse (sbatch --signal) [s]
SIGNAL_EARLY_S = 60.0
#: what another attempt gets more, as a share of the first one's
MORE_PER_ATTEMPT = 0.5

#: kinds of runs that may be packed into one job: name -> estimated training time up to which a run is of it [s]
PACKS = {"runs_15s": 15.0, "runs_1min": 60.0, "runs_4min": 240.0, "runs_15min": 900.0}


@dataclass(frozen=True)
class Speed:
    """The speed that a finished run had, on all its devices together."""

    arch: str
    num_params: int
    flops_per_s: float

    @classmethod
    def of(cls, spec: RunSpec, result: Mapping) -> Speed | None:
        """By the ``result.json`` of a run; None where it holds no speed, as where it diverged at once."""
        tokens_per_s = result.get("tokens_per_s") or math.nan
        if not (math.isfinite(tokens_per_s) and tokens_per_s > 0):
            return None
        return cls(spec.arch, spec.num_params, tokens_per_s * spec.flops_per_token)


def measured_speeds(specs: Iterable[RunSpec], runs_folder: Path, hardware: HardwareConfig) -> list[Speed]:
    """Speeds of the runs that have finished on devices of this kind, as many as this hardware gives to a run."""
    devices = hardware.devices_per_run * hardware.nodes_per_run
    speeds = []
    for spec in specs:
        path = Path(runs_folder) / spec.run_id / "result.json"
        if not path.is_file():
            continue
        result = read_json(path)
        if (result.get("device"), result.get("devices", 1)) == (hardware.device, devices):
            speeds.append(Speed.of(spec, result))
    return [speed for speed in speeds if speed is not None]


def expected_speed(spec: RunSpec, speeds: Iterable[Speed], assumed_flops_per_s: float) -> float:
    """FLOP/s of a run: the median of the finished runs of its architecture that are nearest in size, else assumed."""
    own = [speed for speed in speeds if speed.arch == spec.arch]
    nearest = sorted(own, key=lambda speed: abs(math.log(speed.num_params / spec.num_params)))[:NEAREST_RUNS]
    return median(speed.flops_per_s for speed in nearest) if nearest else assumed_flops_per_s


def job_flops(spec: RunSpec, steps: int) -> float:
    """FLOPs of ``steps`` updates, and of reading the validation tokens at each evaluation."""
    return steps * spec.flops_per_step + spec.validation_flops


def run_memory_bytes(spec: RunSpec, hardware: HardwareConfig) -> float:
    """Host memory of a run on each of its nodes: its processes and the workflow's, a checkpoint read or written.

    On a CPU the model lies there too, by the accounting of `training_memory`; on a GPU it has the device's memory
    (``xlstm-scaling memory``), and process 0 gathers the trained weights on its host.
    """
    world = hardware.devices_per_run * hardware.nodes_per_run
    degree = {"none": 1, "full": world}.get(hardware.shard, hardware.shard)
    rows = max(1, -(-spec.batch_sequences // world))
    at_once = min(rows, hardware.micro_batch_sequences or rows)
    layout = Layout(
        devices=world,
        shard=degree,
        micro_batch_sequences=at_once,
        micro_batches=-(-rows // at_once),
        activation_checkpointing=hardware.activation_checkpointing,
        activation_bytes=4 if spec.compute_dtype == "float32" else 2,
    )
    each = PROCESS_BYTES[hardware.device]
    if hardware.device == "cpu":
        each += training_memory(spec.model_shape, spec.context_length, layout).total
    if world == 1:
        return JOB_BYTES + each + CHECKPOINT_BYTES * spec.num_params
    each += SHARD_BYTES * spec.num_params / degree
    return JOB_BYTES + hardware.devices_per_run * each + SHARD_BYTES * spec.num_params


class JobResources:
    """Resources of the training jobs of a study; ``attempt`` counts from 1, and each asks for more.

    ``specs``: run id -> run; ``trunks``: trunk id -> trunk; finished runs are looked for in ``runs_folder`` when the
    first time is asked for.
    """

    def __init__(
        self,
        specs: Mapping[str, RunSpec],
        trunks: Mapping[str, TrunkSpec],
        hardware: HardwareConfig,
        runs_folder: Path,
    ) -> None:
        self.specs, self.trunks, self.hardware, self.runs_folder = specs, trunks, hardware, Path(runs_folder)
        self._speeds: list[Speed] | None = None
        # by what they depend on: many runs share a size
        self._speed_of: dict[tuple[str, int], float] = {}
        self._memory_of: dict[tuple, float] = {}

    @property
    def speeds(self) -> list[Speed]:
        """Measured until now; read once, and only where something is to be run."""
        if self._speeds is None:
            self._speeds = measured_speeds(self.specs.values(), self.runs_folder, self.hardware)
        return self._speeds

    def _job(self, name: str) -> tuple[RunSpec, int]:
        """The model of a run or a trunk, and the updates that its job makes."""
        if name in self.trunks:
            spec = self.trunks[name].spec
            return spec, spec.num_train_steps
        spec = self.specs[name]
        return spec, spec.cooldown_steps if spec.trunk_id in self.trunks else spec.num_train_steps

    def time_s(self, name: str) -> float:
        """Expected time of a run or a trunk from its first step to its last."""
        spec, steps = self._job(name)
        size = (spec.arch, spec.num_params)
        if size not in self._speed_of:
            self._speed_of[size] = expected_speed(spec, self.speeds, self.hardware.flops_per_s)
        return job_flops(spec, steps) / self._speed_of[size]

    def minutes(self, name: str, attempt: int = 1) -> int:
        """Wall time of the job, at most ``hardware.max_job_time_s``: a longer run goes on in the next job."""
        more = 1 + MORE_PER_ATTEMPT * (attempt - 1)
        seconds = (self.hardware.start_time_s + self.hardware.time_factor * self.time_s(name)) * more
        seconds += self.hardware.save_time_s + SIGNAL_EARLY_S
        limit = self.hardware.max_job_time_s
        return math.ceil(seconds / 60) if limit is None else min(math.ceil(seconds / 60), math.floor(limit / 60))

    def memory_mb(self, name: str, attempt: int = 1) -> int:
        """Host memory of the job on each of its nodes, ``hardware.memory_factor`` times what is accounted for."""
        spec, _ = self._job(name)
        more = 1 + MORE_PER_ATTEMPT * (attempt - 1)
        model = (spec.model_shape, spec.context_length, spec.batch_sequences, spec.compute_dtype)
        if model not in self._memory_of:
            self._memory_of[model] = run_memory_bytes(spec, self.hardware)
        return math.ceil(self.hardware.memory_factor * more * self._memory_of[model] / 1e6)

    @property
    def one_device(self) -> dict[str, str]:
        """Resources of jobs that use one device of the kind that runs train on."""
        return self._gpus(1)

    @property
    def devices(self) -> dict[str, str | int]:
        """Devices and nodes of a training job, by the names of Snakemake's Slurm executor: a task on each of several
        nodes, which the job's own srun starts."""
        nodes = self.hardware.nodes_per_run
        several = {"mpi": "srun", "nodes": nodes, "tasks": nodes, "tasks_per_gpu": 0} if nodes > 1 else {}
        return self._gpus(self.hardware.devices_per_run) | several

    def _gpus(self, count: int) -> dict[str, str]:
        """GPUs of each node of a job; nothing on CPUs."""
        if self.hardware.device == "cpu":
            return {}
        return {"gres": ":".join(["gpu", *filter(None, [self.hardware.gpu_type]), str(count)])}

    def launch_options(self, nodes: int) -> str:
        """Options of ``python -m xlstm_scaling.study.launch``."""
        devices = self.hardware.devices_per_run
        words = ["--nodes", nodes, "--devices", devices, "--cpus", devices * self.hardware.threads_per_run]
        return " ".join(map(str, [*words, "--save-time", round(self.hardware.save_time_s), "--"]))

    @property
    def slurm_options(self) -> str:
        """Tell a job to save before its time is up, and keep the log of the part before."""
        return f"--signal=TERM@{round(self.hardware.save_time_s)} --open-mode=append"

    def pack(self, name: str, packed: Container[str] = tuple(PACKS)) -> str | None:
        """The kind of short runs that this one is of, None where it has a job of its own: it is long, a trunk that
        others wait for, on several devices, has failed before and would take the others along, or its kind is not
        among those that are ``packed``."""
        if name in self.trunks or (self.runs_folder / name / "failure.json").exists():
            return None
        if self.hardware.devices_per_run * self.hardware.nodes_per_run > 1:
            return None
        seconds = self.time_s(name)
        kind = next((kind for kind, limit in PACKS.items() if seconds <= limit), None)
        return kind if kind in packed else None
