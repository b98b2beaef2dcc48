"""One training run, from its specification to its result; resumes where a killed one stopped."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from xlstm_scaling.corpus import BatchSchedule, TokenDataset, ValidationWindows, get_batch, get_windows
from xlstm_scaling.kernels.certification.usage import certify_run
from xlstm_scaling.models import LanguageModel, build_model
from xlstm_scaling.study.errors import Preempted
from xlstm_scaling.study.files import digest, read_json, write_json_atomic
from xlstm_scaling.study.machine import keep_freed_memory
from xlstm_scaling.study.plan import RunSpec
from xlstm_scaling.training.checkpoint import CheckpointError, CheckpointFolder, load_file, save_file
from xlstm_scaling.training.schedule import learning_rate

log = logging.getLogger(__name__)

#: tokens up to this size are read and compared with their digest before a run; larger ones by their size alone
DIGEST_CHECK_BYTES = 2**28
#: entries of the training curve, more where that would be more than MAX_LOG_INTERVAL steps apart
LOG_ENTRIES = 100
MAX_LOG_INTERVAL = 100


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite, or the loss ran away."""


@dataclass(frozen=True)
class Execution:
    """How a run is carried out; nothing here changes its result."""

    device: str = "cpu"
    threads: int = 1
    peak_flops: float | None = None
    micro_batch_sequences: int | None = None
    checkpoint_interval_s: float = 30.0
    progress: bool = True
    certificate: Path | None = None  # that must cover the kernels of the run
    compile_cache: Path | None = None  # where torch.compile keeps what it made, for other runs too; None: no compiling


def measure_peak_flops(dtype: torch.dtype, device: str = "cpu", size: int = 768, seconds: float = 0.03) -> float:
    """FLOP/s of square matrix products in ``dtype`` on this device with the threads torch has now."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    end = time.perf_counter() + seconds
    for attempt in range(1000):
        start = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        if attempt:
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
        if attempt >= 3 and time.perf_counter() > end:
            break
    return best


def build_run_model(spec: RunSpec, device: str = "cpu") -> LanguageModel:
    """The model of a run, initialised from its seed."""
    dtype = getattr(torch, spec.compute_dtype)
    return build_model(spec.model_shape, compute_dtype=dtype, seed=spec.seed, **spec.model_options).to(device)


def load_trained(run_folder: Path) -> LanguageModel:
    """The model of a finished run with its trained weights.

    Raises FileNotFoundError or CheckpointError with the file's name.
    """
    spec = RunSpec(**read_json(Path(run_folder) / "spec.json"))
    model = build_run_model(spec)
    try:
        content = load_file(Path(run_folder) / "final.ckpt")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {Path(run_folder) / 'result.json'} and train the run again") from None
    model.load_state_dict(content["model"])
    return model.eval()


class Run:
    """A training run in its folder: ``spec.json``, ``history.jsonl``, ``checkpoints/``, ``final.ckpt``,
    ``result.json``."""

    def __init__(self, spec: RunSpec, tokens_folder: Path, folder: Path, execution: Execution) -> None:
        self.spec, self.folder, self.execution = spec, Path(folder), execution
        size = sum(path.stat().st_size for path in Path(tokens_folder).glob("*.bin"))
        self.dataset = TokenDataset.open(tokens_folder, verify="digest" if size <= DIGEST_CHECK_BYTES else "size")
        self.identity = digest({"spec": spec.identity(), "tokens": self.dataset.digest})
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints")
        self.history_path = self.folder / "history.jsonl"
        self.stop = False

    # life of a run

    def execute(self) -> dict:
        """Train to the end, or return the result there is. Raises Preempted, CorpusError, DiskFullError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s is being trained by another process; waiting for it", self.spec.run_id)
            lock.acquire()
        try:
            finished = self.finished_result()
            if finished is not None:
                log.info("%s was trained before; nothing to do", self.spec.run_id)
                return finished
            write_json_atomic(self.folder / "spec.json", asdict(self.spec))
            return self._train()
        finally:
            lock.release()

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

    def _train(self) -> dict:
        spec, execution = self.spec, self.execution
        self.certified = certify_run(spec, execution.certificate, execution.device)
        torch.set_num_threads(execution.threads)
        keep_freed_memory()
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.model = build_run_model(spec, execution.device)
        if execution.compile_cache is not None:
            log.warning("blocks are compiled: their norms and gates are the compiler's, which no certificate covers")
            self.model.compile_blocks(execution.compile_cache)
        o = spec.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.decay_groups(o["weight_decay"]),
            lr=spec.learning_rate,
            betas=(o["beta1"], o["beta2"]),
            eps=o["eps"],
            fused=True,
        )
        self.train_split, self.validation_split = self.dataset.split("train"), self.dataset.split("validation")
        if spec.shape["vocab_size"] < self.dataset.vocab_size:
            raise ValueError(
                f"the tokens have a vocabulary of {self.dataset.vocab_size}, the model of {spec.shape['vocab_size']}"
            )
        self.schedule = BatchSchedule(self.train_split.num_tokens, spec.context_length, spec.batch_sequences, spec.seed)
        self.windows = ValidationWindows(
            self.validation_split.num_tokens, spec.context_length, spec.validation["max_tokens"]
        )
        self.peak_flops = execution.peak_flops or measure_peak_flops(self.model.compute_dtype, execution.device)
        self.step, self.first_loss, self.smooth_loss, self.seconds = 0, None, None, 0.0
        self.losses: list[float] = []  # since the last entry of the training curve
        self._restore()
        status, detail = "ok", ""
        with self._sigterm_saves():
            try:
                self._loop()
            except NonFiniteLoss as error:
                status, detail = "diverged", str(error)
                log.error("%s diverged: %s", spec.run_id, error)
        return self._finish(status, detail)

    def _restore(self) -> None:
        content, problems = self.checkpoints.load_latest(self.identity)
        for problem in problems:
            log.warning("%s; using an older one", problem)
        if content is None:
            self.history_path.unlink(missing_ok=True)
            return
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.first_loss, self.smooth_loss = content["step"], content["first_loss"], content["smooth_loss"]
        self.losses, self.seconds = content["losses"], content["seconds"]
        kept = [line for line in self.read_history() if line["step"] <= self.step]
        self.history_path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        log.info("%s resumes at step %d of %d", self.spec.run_id, self.step, self.spec.num_train_steps)

    def read_history(self) -> list[dict]:
        """The training curve so far; a torn last line is left out."""
        if not self.history_path.exists():
            return []
        lines = []
        for line in self.history_path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines

    def _save(self) -> None:
        self.checkpoints.save(
            self.step,
            {
                "identity": self.identity,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "first_loss": self.first_loss,
                "smooth_loss": self.smooth_loss,
                "losses": self.losses,
                "seconds": self.seconds,
            },
        )

    def _sigterm_saves(self) -> _SignalFlag:
        return _SignalFlag(self)

    # the loop

    def _loop(self) -> None:
        spec = self.spec
        log_interval = max(1, min(MAX_LOG_INTERVAL, spec.num_train_steps // LOG_ENTRIES))
        every = max(1, math.ceil(spec.num_train_steps / spec.validation["evaluations"]))
        tokens_per_step = spec.batch_sequences * spec.context_length
        last_save = time.monotonic()
        interval_start, interval_steps = time.perf_counter(), 0
        bar = tqdm(
            total=spec.num_train_steps,
            initial=self.step,
            desc=spec.run_id,
            unit="step",
            disable=not self.execution.progress,
            mininterval=1.0,
        )
        with bar, self.history_path.open("a") as history:
            while self.step < spec.num_train_steps:
                rate, loss, norm = self._update()
                self.losses.append(loss)
                self.step += 1
                interval_steps += 1
                bar.update(1)
                last = self.step == spec.num_train_steps
                if self.step % log_interval == 0 or last:
                    elapsed = max(time.perf_counter() - interval_start, 1e-9)
                    self.seconds += elapsed
                    per_s = interval_steps / elapsed
                    validate = self.step % every < log_interval and not last
                    entry = {
                        "step": self.step,
                        "tokens": self.step * tokens_per_step,
                        "flops": self.step * spec.flops_per_step,
                        "train_loss": sum(self.losses) / len(self.losses),
                        "val_loss": self.validate() if validate else None,
                        "learning_rate": rate,
                        "grad_norm": norm,
                        "tokens_per_s": per_s * tokens_per_step,
                        "mfu": per_s * spec.flops_per_step / self.peak_flops,
                        "time_s": self.seconds,
                    }
                    history.write(json.dumps(entry) + "\n")
                    history.flush()
                    bar.set_postfix(loss=f"{entry['train_loss']:.3f}", mfu=f"{entry['mfu']:.0%}", refresh=False)
                    self.losses = []
                    interval_start, interval_steps = time.perf_counter(), 0
                due = time.monotonic() - last_save > self.execution.checkpoint_interval_s
                if (due or self.stop) and not last:
                    self.seconds += time.perf_counter() - interval_start
                    self._save()
                    last_save = time.monotonic()
                    interval_start, interval_steps = time.perf_counter(), 0
                if self.stop and not last:
                    raise Preempted(f"{spec.run_id} saved at step {self.step}; run it again to go on")

    def _update(self) -> tuple[float, float, float]:
        """One optimiser step -> learning rate, loss, gradient norm. Raises NonFiniteLoss."""
        spec = self.spec
        rate = learning_rate(
            self.step, spec.num_train_steps, spec.learning_rate, spec.warmup_steps, spec.cooldown_steps,
            spec.final_fraction,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = get_batch(self.train_split, self.schedule, self.step)
        inputs, targets, starts = (self._tensor(x) for x in batch)
        micro = self.execution.micro_batch_sequences or spec.batch_sequences
        total = 0.0
        for rows in range(0, spec.batch_sequences, micro):
            part = slice(rows, rows + micro)
            share = inputs[part].shape[0] / spec.batch_sequences
            loss = self.model.loss(inputs[part], targets[part], starts[part]) * share
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), spec.optimizer["grad_clip"], foreach=True)
        norm = float(norm)
        self._check(total, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rate, total, norm

    def _check(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(f"loss {loss}, gradient norm {norm} at step {self.step}")
        if self.first_loss is None:
            self.first_loss = loss
        self.smooth_loss = loss if self.smooth_loss is None else 0.9 * self.smooth_loss + 0.1 * loss
        if self.smooth_loss > self.spec.divergence_loss_factor * self.first_loss:
            raise NonFiniteLoss(
                f"smoothed loss {self.smooth_loss:.3g} at step {self.step} is above "
                f"{self.spec.divergence_loss_factor:g} times its start {self.first_loss:.3g}"
            )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.execution.device)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation windows [nat/token]."""
        total, count = 0.0, 0
        for starts in self.windows.batches(max(1, 8192 // self.spec.context_length)):
            windows = get_windows(self.validation_split, starts, self.spec.context_length)
            inputs, targets, document_starts = (self._tensor(x) for x in windows)
            total += self.model.loss(inputs, targets, document_starts).item() * targets.numel()
            count += targets.numel()
        return total / count

    def _finish(self, status: str, detail: str) -> dict:
        spec = self.spec
        history = self.read_history()
        val_loss = self.validate() if status == "ok" else math.nan
        if status == "ok" and not math.isfinite(val_loss):
            status, detail = "diverged", f"validation loss {val_loss}"
        tail = history[-max(1, len(history) // 20) :]
        train_loss = sum(line["train_loss"] for line in tail) / len(tail) if tail and status == "ok" else math.nan
        tokens = spec.num_tokens if status == "ok" else self.step * spec.batch_sequences * spec.context_length
        result = {
            "run_id": spec.run_id,
            "identity": self.identity,
            "status": status,
            "detail": detail,
            "val_loss": val_loss,
            "val_bits_per_byte": val_loss / math.log(2) * self.validation_split.tokens_per_byte,
            "train_loss": train_loss,
            "steps_done": self.step,
            "epochs": tokens / self.train_split.num_tokens,
            "tokens_digest": self.dataset.digest,
            "train_time_s": self.seconds,
            "tokens_per_s": tokens / self.seconds if self.seconds else math.nan,
            "mfu": self.step * spec.flops_per_step / self.seconds / self.peak_flops if self.seconds else math.nan,
            "peak_flops": self.peak_flops,
            "threads": self.execution.threads,
            "device": self.execution.device,
            **self.certified,
            "host_pid": os.getpid(),
            "torch_version": str(torch.__version__),
        }
        save_file(
            self.folder / "final.ckpt",
            {"identity": self.identity, "model": self.model.state_dict(), "result": result},
        )
        self.checkpoints.clear()
        return result


class _SignalFlag:
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
    run = Run(spec, tokens_folder, folder, execution or Execution())
    result = run.execute()
    write_json_atomic(Path(folder) / "result.json", result)
    return result
