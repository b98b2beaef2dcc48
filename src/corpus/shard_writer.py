"""Writes a tokens folder (see `shards`), all of it or nothing."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from .errors import CorpusError
from .shards import DOCUMENT_DTYPE, FORMAT_VERSION, HASH_CHUNK_BYTES, SPLITS, content_digest, token_dtype


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise CorpusError if the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise CorpusError(
            f"The tokens need about {needed_bytes:,} bytes in {folder}, and only {free:,} are free;"
            " make room or choose another results folder."
        )


class TokensWriter:
    """Writes a tokens folder; a context manager that leaves the folder as it was unless `commit` is reached.

    folder: created if missing. vocab_size: padded; sets the dtype. shard_tokens: tokens a shard at most.
    A full disk raises CorpusError with the folder and the bytes needed (`estimated_bytes`, settable, or those written).
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        self.folder = folder
        self.dtype = token_dtype(vocab_size)
        self.vocab_size = vocab_size
        self.shard_tokens = shard_tokens
        self.estimated_bytes = 0
        self._written_bytes = 0
        self._splits: dict[str, _Split] = {}
        self._names: list[str] = []  # files under their temporary names, in the order of their creation
        self._open: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("*.tmp"):
                stale.unlink()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._open:
            with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
                file.close()
        for name in self._names:
            self._temporary(name).unlink(missing_ok=True)

    def append(self, split: str, tokens: np.ndarray, num_bytes: int) -> None:
        """Add a document: tokens (n,) with its end-of-document token; num_bytes of UTF-8 text."""
        self.append_documents(split, tokens, np.array([tokens.size]), num_bytes)

    def append_documents(self, split: str, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        """Add documents: their tokens (sum of lengths,), end-of-document tokens included, lengths int64 (documents,)
        and bytes of UTF-8 text in all. `tokens` may be memory-mapped: it is read a piece at a time."""
        with self._disk(tokens.size * np.dtype(self.dtype).itemsize):
            if split not in self._splits:
                self._splits[split] = _Split(split, self)
            self._splits[split].append(tokens, lengths, num_bytes)

    def commit(self, tokenizer_json: bytes, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Put all files in place, meta.json last, and return its content.

        meta: what the caller adds; needs `eod_id` and `tokenizer` with its `sha256`.
        """
        with self._disk():
            splits = {name: self._splits[name].close() for name in SPLITS if name in self._splits}
            self.write_file("tokenizer.json", tokenizer_json)
            meta = {
                "format_version": FORMAT_VERSION,
                "dtype": self.dtype,
                "vocab_size": self.vocab_size,
                **meta,
                "splits": splits,
            }
            meta = {"digest": content_digest(meta), **meta}
            self.write_file("meta.json", (json.dumps(meta, indent=2) + "\n").encode())

            # From here the old tokens are gone: without meta.json a folder is incomplete.
            (self.folder / "meta.json").unlink(missing_ok=True)
            for old in [path for split in SPLITS for path in self.folder.glob(f"{split}[-.]*.bin")]:
                old.unlink()
            for name in self._names:  # meta.json was created last
                self._temporary(name).replace(self.folder / name)
            _sync_folder(self.folder)
            self._names = []
        return meta

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file under its temporary name."""
        file = self.create_file(name)
        file.write(content)
        self.close_file(file)

    def create_file(self, name: str) -> IO[bytes]:
        """Open a file under its temporary name; `commit` renames it."""
        self._names.append(name)
        file = self._temporary(name).open("wb")
        self._open.append(file)
        return file

    def close_file(self, file: IO[bytes]) -> None:
        """Flush a file to the disk and close it."""
        file.flush()
        os.fsync(file.fileno())
        self._written_bytes += file.tell()
        file.close()
        self._open.remove(file)

    def _temporary(self, name: str) -> Path:
        return self.folder / f"{name}.tmp"

    @contextlib.contextmanager
    def _disk(self, next_bytes: int = 0) -> Iterator[None]:
        """Turn a full disk into a CorpusError."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            open_bytes = sum(split.shard_bytes for split in self._splits.values())
            needed = max(self.estimated_bytes, self._written_bytes + open_bytes + next_bytes)
            raise CorpusError(
                f"The disk is full: the tokens need at least {needed:,} bytes in {self.folder};"
                " make room or choose another results folder, then rerun the tokens stage."
            ) from error


class _Split:
    """The files of one split while they are written."""

    def __init__(self, name: str, writer: TokensWriter) -> None:
        self.name = name
        self.writer = writer
        self.num_tokens = self.num_bytes = self.num_documents = 0
        self.stream_hash = hashlib.sha256()
        self.shards: list[dict[str, Any]] = []
        self.file: IO[bytes] | None = None
        self.shard_left = 0
        self.shard_bytes = 0
        self.documents_hash = hashlib.sha256()
        self.documents_file = writer.create_file(f"{name}.documents.bin")

    def append(self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        starts = (self.num_tokens + np.cumsum(lengths) - lengths).astype(DOCUMENT_DTYPE).tobytes()
        self.documents_file.write(starts)
        self.documents_hash.update(starts)
        self.num_tokens += tokens.size
        self.num_bytes += num_bytes
        self.num_documents += lengths.size
        dtype = np.dtype(self.writer.dtype).newbyteorder("<")
        while tokens.size:
            if self.shard_left == 0:
                self._next_shard()
            size = min(self.shard_left, HASH_CHUNK_BYTES // dtype.itemsize)
            part, tokens = tokens[:size].astype(dtype, copy=False), tokens[size:]
            content = part.tobytes()
            self.file.write(content)
            self.stream_hash.update(content)
            self.shard_hash.update(content)
            self.shard_bytes += len(content)
            self.shard_left -= part.size
            self.shards[-1]["num_tokens"] += part.size

    def _next_shard(self) -> None:
        self._close_shard()
        self.shards.append({"name": f"{self.name}-{len(self.shards):05d}.bin", "num_tokens": 0})
        self.file = self.writer.create_file(self.shards[-1]["name"])
        self.shard_hash = hashlib.sha256()
        self.shard_left = self.writer.shard_tokens

    def _close_shard(self) -> None:
        if self.file is not None:
            self.shards[-1]["sha256"] = self.shard_hash.hexdigest()
            self.writer.close_file(self.file)
            self.file, self.shard_bytes = None, 0

    def close(self) -> dict[str, Any]:
        self._close_shard()
        self.writer.close_file(self.documents_file)
        return {
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_documents": self.num_documents,
            "digest": self.stream_hash.hexdigest(),
            "documents": {"name": f"{self.name}.documents.bin", "sha256": self.documents_hash.hexdigest()},
            "shards": self.shards,
        }


def _sync_folder(folder: Path) -> None:
    """Make renames durable, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
