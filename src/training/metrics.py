"""The training curve of a run: ``history.jsonl`` always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from xlstm_scaling.study.files import full_disk_named, write_text_atomic

#: entries of the curve, more where that would be more than MAX_LOG_INTERVAL steps apart
LOG_ENTRIES = 100
MAX_LOG_INTERVAL = 100


class TrackerError(ValueError):
    """A tracker that cannot be used; the message says what to install or to change."""


class Tracker(Protocol):
    """Where else metrics go."""

    def log(self, entry: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder: tensorboard --logdir results/runs"""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, Any], first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackerError(f"hardware.trackers has tensorboard: pip install tensorboard ({error})") from None
        # what a killed run wrote after its last checkpoint is hidden
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, entry: Mapping[str, Any]) -> None:
        for name, value in entry.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases, offline unless WANDB_MODE says otherwise; one run there is one run here, resumed or not."""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, Any], first_step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise TrackerError("hardware.trackers has wandb: pip install wandb") from None
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "xlstm-scaling"),
            id=run_id,
            name=run_id,
            config=dict(config),
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
        )

    def log(self, entry: Mapping[str, Any]) -> None:
        step = entry["step"]
        self.run.log({name: value for name, value in entry.items() if name != "step" and value is not None}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_trackers(names: Sequence[str]) -> None:
    """Raise TrackerError for a name that is not known."""
    unknown = sorted(set(names) - TRACKERS.keys())
    if unknown:
        raise TrackerError(f"hardware.trackers: {', '.join(unknown)} is not one of {', '.join(TRACKERS)}")


def log_interval(num_steps: int) -> int:
    """Steps between entries of a run's curve."""
    return max(1, min(MAX_LOG_INTERVAL, num_steps // LOG_ENTRIES))


def read_history(path: Path) -> list[dict]:
    """The training curve so far; a torn last line is left out."""
    if not Path(path).exists():
        return []
    lines = []
    for line in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def write_history(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """The training curve as it is to be."""
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


class MetricsLog:
    """The curve of a run from step ``first_step`` on: a context manager.

    Entries after ``first_step`` that an earlier, killed process wrote are dropped: they will come again.
    """

    def __init__(
        self, folder: Path, run_id: str, config: Mapping[str, Any], first_step: int, trackers: Sequence[str] = ()
    ) -> None:
        check_trackers(trackers)
        self.path = Path(folder) / "history.jsonl"
        kept = [line for line in read_history(self.path) if line["step"] <= first_step] if first_step else []
        write_history(self.path, kept)
        self.trackers: list[Tracker] = [TRACKERS[name](Path(folder), run_id, config, first_step) for name in trackers]

    def __enter__(self) -> Self:
        self.stream = self.path.open("a")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # closing flushes, and the disk may be full: that was said already
            self.stream.close()
        for tracker in self.trackers:
            tracker.close()

    def log(self, entry: Mapping[str, Any]) -> None:
        """One entry; its ``step`` orders them."""
        with full_disk_named(self.path):
            self.stream.write(json.dumps(entry) + "\n")
            self.stream.flush()
        for tracker in self.trackers:
            tracker.log(entry)
