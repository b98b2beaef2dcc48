"""Models that do not survive being measured; in a module of its own, as another process imports it."""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from xlstm_scaling.models import build_model


@dataclass(frozen=True)
class Build:
    """Builds a small model; ``ledger``: a file that gets a line for every one that is built."""

    shape: object
    ledger: str | None = None

    def __call__(self):
        if self.ledger is not None:
            with open(self.ledger, "a") as stream:  # noqa: PTH123
                stream.write("built\n")
        return build_model(self.shape, seed=0)


def never(*_):
    raise RuntimeError("a bug")


@dataclass(frozen=True)
class Dying:
    """A model that does something to its process when it reads its ``time``-th prompt of ``length`` tokens."""

    shape: object
    length: int
    how: str
    time: int = 1

    def __call__(self):
        model, times = build_model(self.shape, seed=0), 0
        hidden = model.hidden

        def deadly(tokens, document_starts=None, state=None):
            nonlocal times
            fatal = tokens.shape[1] == self.length
            times += fatal
            if fatal and times == self.time:
                die(self.how)
            return hidden(tokens, document_starts, state)

        model.hidden = deadly
        return model


def die(how):
    if how == "hang":
        threading.Event().wait()
    elif how == "error":
        raise RuntimeError("a bug")
    elif how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes")
    elif how.startswith("parent"):  # the stage itself is killed, when it has written so many lines
        _, path, lines = how.split(":")
        if Path(path).read_text().count("\n") < int(lines) - 1:  # a round before the last one
            return
        while Path(path).read_text().count("\n") < int(lines):
            threading.Event().wait(0.01)
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        threading.Event().wait()
    os.kill(os.getpid(), getattr(signal, how))
