"""Checkpoints: one file, written atomically, with a digest; the last two are kept.

Layout: 8 bytes magic, 4 bytes format version (little endian), 32 bytes sha256 of the payload, payload (torch.save).
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xlstm_scaling.study.files import atomic_write

MAGIC = b"XLSTMSC\0"
FORMAT_VERSION = 1
_HEADER = struct.Struct("<8sI32s")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def save_file(path: Path, content: dict[str, Any], before_rename: Callable[[], None] | None = None) -> None:
    """Write ``content`` (tensors and plain values) with its digest, atomically; ``before_rename`` may still refuse."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    with atomic_write(path, before_rename=before_rename) as stream:
        stream.write(_HEADER.pack(MAGIC, FORMAT_VERSION, hashlib.sha256(payload).digest()))
        stream.write(payload)


def load_file(path: Path) -> dict[str, Any]:
    """Read and verify. Raises CheckpointError for a foreign, newer, truncated or altered file."""
    raw = Path(path).read_bytes()
    if len(raw) < _HEADER.size or not raw.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of this program (truncated or foreign file)")
    _, version, expected = _HEADER.unpack_from(raw)
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, newer than {FORMAT_VERSION}: update the program")
    payload = memoryview(raw)[_HEADER.size :]
    if hashlib.sha256(payload).digest() != expected:
        raise CheckpointError(f"{path} is truncated or altered: its digest does not match")
    try:
        return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds something else than tensors and plain values: {error}") from None


class CheckpointFolder:
    """The checkpoints of one run: ``step-<n>.ckpt``, the last ``keep`` of them."""

    #: names of checkpoints, the step first
    pattern = re.compile(r"^step-(\d+)\.ckpt$")

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self.before_rename: Callable[[], None] | None = None  # may refuse what was written

    def paths(self) -> list[Path]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if self.pattern.match(p.name)), key=self._step)

    def _step(self, path: Path) -> int:
        return int(self.pattern.match(path.name)[1])

    def save(self, step: int, content: dict[str, Any]) -> Path:
        path = self.folder / f"step-{step}.ckpt"
        save_file(path, content, self.before_rename)
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load_latest(self, identity: str) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest usable checkpoint of this run (None if there is none), and what was wrong with newer ones."""
        problems = []
        for path in reversed(self.paths()):
            try:
                content = load_file(path)
            except (CheckpointError, OSError, RuntimeError) as error:
                problems.append(str(error))
                continue
            if content.get("identity") != identity:
                problems.append(f"{path} belongs to another run or other tokens; it is ignored")
                continue
            return content, problems
        return None, problems

    def clear(self) -> None:
        for path in self.paths():
            path.unlink()
