"""One training run in its folder, from its specification to its result; resumes where a killed one stopped."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xlstm_scaling.corpus import TokenDataset
from xlstm_scaling.kernels.certification.certificate import describe_device, device_name
from xlstm_scaling.kernels.certification.usage import certify_run
from xlstm_scaling.study.code import code_version
from xlstm_scaling.study.errors import Preempted
from xlstm_scaling.study.files import DiskFullError, digest, json_text, write_json_atomic, write_text_atomic
from xlstm_scaling.study.locks import POLL_S, FolderLock, LockLost, Owner
from xlstm_scaling.study.machine import keep_freed_memory
from xlstm_scaling.study.run_spec import BEHAVIOUR_VERSION, RunSpec
from xlstm_scaling.training.branch import load_branch
from xlstm_scaling.training.checkpoint import load_file, save_file
from xlstm_scaling.training.execution import Execution, measure_peak_flops
from xlstm_scaling.training.guard import Diverged
from xlstm_scaling.training.metrics import MetricsLog, check_trackers, log_interval, read_history, write_history
from xlstm_scaling.training.parallel import Parallel, ParallelError
from xlstm_scaling.training.prefetch import prefetched
from xlstm_scaling.training.sharded import Checkpoints, whole_state
from xlstm_scaling.training.trainer import Trainer

log = logging.getLogger(__name__)

#: tokens up to this size are read and compared with their digest before a run; larger ones by their size alone
DIGEST_CHECK_BYTES = 2**28


class Run:
    """A training run in its folder: ``spec.json``, ``history.jsonl``, ``checkpoints/``, ``final.ckpt``,
    ``result.json``. Under torchrun all processes execute it together, and process 0 writes."""

    #: the file that the workflow waits for
    outcome = "result.json"

    def __init__(self, spec: RunSpec, tokens_folder: Path, folder: Path, execution: Execution) -> None:
        self.spec, self.folder, self.execution = spec, Path(folder), execution
        check_trackers(execution.trackers)
        self.parallel = Parallel.start(execution.device, execution.shard)
        if self.parallel.world > 1 and execution.compile_cache is not None:
            raise ParallelError("hardware.compile is for one device; set hardware.compile=false")
        size = sum(path.stat().st_size for path in Path(tokens_folder).glob("*.bin"))
        self.dataset = TokenDataset.open(tokens_folder, verify="digest" if size <= DIGEST_CHECK_BYTES else "size")
        self.identity = digest({"spec": spec.identity(), "tokens": self.dataset.digest})
        self.parallel.require_same("what determines the run (its plan and its tokens)", self.identity)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.parallel)
        self.lock = FolderLock(self.folder)
        self.checkpoints.before_rename = self.lock.require
        self.stop = False
        self.keep_steps: frozenset[int] = frozenset()

    def execute(self) -> dict:
        """Train to the end, or return the result there is. Raises Preempted, CorpusError, DiskFullError."""
        with self._locked():
            result = self.parallel.share(self.finished_result() if self.parallel.leader else None)
            if result is not None:
                log.info("%s was trained before; nothing to do", self.spec.run_id)
            else:
                if self.parallel.leader:
                    for leftover in self.folder.rglob(".*.tmp"):  # a killed process was writing
                        leftover.unlink(missing_ok=True)
                    write_json_atomic(self.folder / "spec.json", asdict(self.spec))
                result = self.train()
            if self.parallel.leader:
                self.conclude(result)
            return result

    def conclude(self, result: dict) -> None:
        """Write what the workflow waits for; what another study has written of this run stays as it is."""
        path = self.folder / self.outcome
        self.lock.require()
        text = json_text(result)
        if not path.is_file() or path.read_text() != text:
            write_text_atomic(path, text)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process at work in this folder (`study.locks`); the others wait with process 0, and hear of it."""
        told = None
        while True:
            held = self.lock.try_acquire() if self.parallel.leader else None
            if held is not None and held.owner is not None and held.owner != told:
                told = held.owner
                log.info("%s is being trained by %s (since %s); waiting for it", self.spec.run_id, told, told.since)
            if self.parallel.share(held is None):
                break
            time.sleep(POLL_S)
        try:
            yield
        finally:
            self.lock.release()

    def require_lock(self) -> None:
        """Before anything is written. Raises LockLost on all processes."""
        problem = self.parallel.share(self.lock.problem() if self.parallel.leader else None)
        if problem is not None:
            raise LockLost(problem)

    def finished_result(self) -> dict | None:
        """The result of a finished run of the same identity, else None."""
        path = self.folder / "final.ckpt"
        if not path.exists():
            return None
        try:
            content = load_file(path)
        except ValueError as error:
            log.warning("%s; training again", error)
            return None
        return content["result"] if content["identity"] == self.identity else None

    def train(self) -> dict:
        """Train from the last checkpoint, or from the start, and write ``final.ckpt``; returns the result."""
        spec, execution = self.spec, self.execution
        certified = certify_run(spec, execution.certificate, execution.device)
        torch.set_num_threads(execution.threads)
        keep_freed_memory()
        with _deterministic():
            self.trainer = Trainer(spec, self.dataset, execution, self.parallel)
            if execution.compile_cache is not None:
                log.warning(
                    "blocks are compiled: their norms and gates are the compiler's, which no certificate covers"
                )
                self.trainer.model.compile_blocks(execution.compile_cache)
            peak = execution.peak_flops or measure_peak_flops(self.trainer.model.compute_dtype, execution.device)
            self.peak_flops = self.parallel.share(peak) * self.parallel.world
            self.losses: list[float] = []  # since the last entry of the training curve
            self.seconds = 0.0
            content = self.latest()
            if content is not None:
                self.resume(content)
            status, detail = "ok", ""
            with _SigtermStops(self):
                try:
                    self._loop()
                except Diverged as error:
                    status, detail = "diverged", str(error)
                    log.error("%s diverged: %s", spec.run_id, error)
            return self.finish(status, detail, certified)

    def latest(self) -> dict[str, Any] | None:
        """The state to go on from: the last good checkpoint, else the trunk's, else None."""
        content, problems = self.checkpoints.load_latest(self.identity)
        for problem in problems:
            log.warning("%s; using an older one", problem)
        trunk = self.execution.trunk
        if content is None and trunk is not None:
            content = load_branch(trunk, self.spec, self.dataset)
            if content is None:
                log.warning("%s has no trunk in %s: from the start", self.spec.run_id, trunk)
            elif self.parallel.leader:
                write_history(self.folder / "history.jsonl", read_history(trunk / "history.jsonl"))
        return content

    def resume(self, content: dict[str, Any]) -> None:
        self.trainer.restore(content)
        self.losses, self.seconds = content["losses"], content["seconds"]
        log.info("%s resumes at step %d of %d", self.spec.run_id, self.trainer.step, self.spec.num_train_steps)

    def content(self) -> dict[str, Any]:
        """What a checkpoint of one process holds."""
        return self.trainer.state() | self._plain()

    def _plain(self) -> dict[str, Any]:
        return {"identity": self.identity, "losses": self.losses, "seconds": self.seconds}

    def save(self) -> None:
        self.require_lock()
        self.dataset.check_unchanged()
        trainer = self.trainer
        if self.parallel.world == 1:
            self.checkpoints.save(trainer.step, self.content())
            return
        plain = self._plain() | {"step": trainer.step, "guard": trainer.guard.state()}
        self.checkpoints.save_sharded(trainer.step, trainer.model, trainer.optimizer, plain)

    def _loop(self) -> None:
        spec, trainer = self.spec, self.trainer
        interval = log_interval(spec.num_train_steps)
        every = max(1, math.ceil(spec.num_train_steps / spec.validation["evaluations"]))
        self.last_save = time.monotonic()
        trainer.votes = self._votes
        clock = _Clock()
        bar = tqdm(
            total=spec.num_train_steps,
            initial=trainer.step,
            desc=spec.run_id,
            unit="step",
            disable=not (self.execution.progress and self.parallel.leader),
            mininterval=1.0,
        )
        metrics: MetricsLog | nullcontext = nullcontext()
        if self.parallel.leader:
            metrics = MetricsLog(self.folder, spec.run_id, asdict(spec), trainer.step, self.execution.trackers)
        batches = prefetched(trainer.batch, trainer.step, spec.num_train_steps, self.execution.prefetch_batches)
        with bar, metrics:
            for batch in batches:
                rate, loss, norm, accepted = trainer.update(batch)
                if accepted:
                    self.losses.append(loss)
                else:
                    log.warning("%s: step skipped: %s", spec.run_id, trainer.guard.last_reason)
                clock.steps += 1
                bar.update(1)
                last = trainer.step == spec.num_train_steps
                if trainer.step % interval == 0 or last:
                    validate = trainer.step % every < interval and not last
                    entry = self._entry(rate, norm, clock, trainer.validate() if validate else None)
                    self.require_lock()
                    if self.parallel.leader:
                        metrics.log(entry)
                    bar.set_postfix(loss=f"{loss:.3f}", mfu=f"{entry['mfu']:.0%}", refresh=False)
                    clock.start()
                if trainer.step in self.keep_steps:
                    self.keep()
                stop, due = self._votes() if self.parallel.world == 1 else trainer.agreed
                if (due or stop) and not last:
                    self.seconds += clock.elapsed()
                    self._save_if_possible(stop)
                    self.last_save = time.monotonic()
                    clock.start()
                if stop and not last:
                    raise Preempted(f"{spec.run_id} saved at step {trainer.step}; run it again to go on")

    def _votes(self) -> tuple[bool, bool]:
        """Whether this process is to stop, and whether a checkpoint is due (by the clock of process 0)."""
        due = time.monotonic() - self.last_save > self.execution.checkpoint_interval_s
        return self.stop or self.lock.lost, due and self.parallel.leader

    def _save_if_possible(self, stop: bool) -> None:
        """A full disk now need not be full at the end; a run that is asked to stop has to save."""
        try:
            self.save()
        except DiskFullError as error:
            if stop:
                raise
            log.warning("%s; training goes on from memory, the last checkpoint is older", error)

    def _entry(self, rate: float, norm: float, clock: _Clock, val_loss: float | None) -> dict[str, Any]:
        """One entry of the training curve: means since the last one, and where the run stands."""
        spec, step = self.spec, self.trainer.step
        elapsed = max(clock.elapsed(), 1e-9)
        self.seconds += elapsed
        tokens_per_step = spec.batch_sequences * spec.context_length
        per_s = clock.steps / elapsed
        loss = sum(self.losses) / len(self.losses) if self.losses else None  # all steps were skipped
        self.losses = []
        return {
            "step": step,
            "tokens": step * tokens_per_step,
            "flops": step * spec.flops_per_step,
            "train_loss": loss,
            "val_loss": val_loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "skipped_steps": self.trainer.guard.skipped_steps,
            "tokens_per_s": per_s * tokens_per_step,
            "mfu": per_s * spec.flops_per_step / self.peak_flops,
            "time_s": self.seconds,
        }

    def _provenance(self) -> dict[str, Any]:
        """Where and by which code the result was made; no part of the run's identity."""
        owner = self.lock.owner or Owner.here()
        return {
            "behaviour_version": BEHAVIOUR_VERSION,
            "code": code_version(),
            "device_name": device_name(describe_device(self.execution.device)),
            "host": owner.host_name,
            "host_pid": owner.pid,
            "user": owner.user,
            "job": owner.job,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "torch_version": str(torch.__version__),
        }

    def finish(self, status: str, detail: str, certified: dict) -> dict:
        spec, trainer = self.spec, self.trainer
        self.dataset.check_unchanged()
        history = read_history(self.folder / "history.jsonl")
        val_loss = trainer.validate() if status == "ok" else math.nan
        if status == "ok" and not math.isfinite(val_loss):
            status, detail = "diverged", f"validation loss {val_loss}"
        tail = [line["train_loss"] for line in history[-max(1, len(history) // 20) :] if line["train_loss"] is not None]
        train_loss = sum(tail) / len(tail) if tail and status == "ok" else math.nan
        tokens = trainer.step * spec.batch_sequences * spec.context_length
        per_s = tokens / self.seconds if self.seconds else math.nan
        flops_per_s = trainer.step * spec.flops_per_step / self.seconds if self.seconds else math.nan
        result = {
            "run_id": spec.run_id,
            "identity": self.identity,
            "status": status,
            "detail": detail,
            "val_loss": val_loss,
            "val_bits_per_byte": val_loss / math.log(2) * trainer.validation_split.tokens_per_byte,
            "train_loss": train_loss,
            "steps_done": trainer.step,
            "skipped_steps": trainer.guard.skipped_steps,
            "epochs": tokens / trainer.train_split.num_tokens,
            "tokens_digest": self.dataset.digest,
            "train_time_s": self.seconds,
            "tokens_per_s": per_s,
            "mfu": flops_per_s / self.peak_flops,
            "peak_flops": self.peak_flops,
            "threads": self.execution.threads,
            "devices": self.parallel.world,
            "device": self.execution.device,
            **certified,
            **self._provenance(),
        }
        result = self.parallel.share(result)
        model = whole_state(trainer.model.state_dict(), self.parallel)
        self.require_lock()
        if self.parallel.leader:
            content = {"identity": self.identity, "model": model, "result": result}
            save_file(self.folder / "final.ckpt", content, self.lock.require)
        self.checkpoints.clear()
        return result


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms; memory is not filled for them, as every element is written."""
    enabled, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class _Clock:
    """Time and steps since the last entry of the training curve."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.began, self.steps = time.perf_counter(), 0

    def elapsed(self) -> float:
        return time.perf_counter() - self.began


class _SigtermStops:
    """While entered, SIGTERM asks the run to save and stop after the step it is at."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> None:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.run.stop = True

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.previous)


def train(spec: RunSpec, tokens_folder: Path, folder: Path, execution: Execution | None = None) -> dict:
    """Train one run in ``folder`` (or find it trained) and write ``result.json``; returns the result."""
    with failure_recorded(Path(folder)):
        return Run(spec, tokens_folder, folder, execution or Execution()).execute()


@contextmanager
def failure_recorded(folder: Path) -> Iterator[None]:
    """Leave the error that ends a run in ``failure.json``, for ``xlstm-scaling status``; an older one is removed."""
    path = folder / "failure.json"
    path.unlink(missing_ok=True)
    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        with suppress(OSError):  # the disk may be full
            when = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "process": str(Owner.here())}
            write_json_atomic(path, {"error": str(error) or repr(error)} | when)
        raise
