"""Files that are either complete or absent: written to a temporary name, fsynced, renamed."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd


class DiskFullError(OSError):
    """No space left; names the folder."""


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn the system's error for a full disk into a DiskFullError that says what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(
            errno.ENOSPC, f"disk full while writing {path}: free some space in {Path(path).parent} and run again"
        ) from error


@contextmanager
def atomic_write(path: Path, mode: str = "wb", before_rename: Callable[[], None] | None = None) -> Iterator[IO]:
    """Open a temporary file beside ``path``; on success it takes the name, on failure it is removed.

    ``before_rename``: called once all is on the disk; what it raises is a failure.

    Raises DiskFullError where the disk is full.
    """
    path = Path(path)
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, mode) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
            if before_rename is not None:
                before_rename()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@functools.cache
def _umask() -> int:
    """What this process takes from the permissions of new files, read once: a group may share a results folder."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text_atomic(path: Path, text: str) -> None:
    with atomic_write(path, "w") as stream:
        stream.write(text)


def json_text(value: Any) -> str:
    """JSON as all files of a study have it."""
    return json.dumps(value, indent=1, allow_nan=True) + "\n"


def finite(value: Any) -> Any:
    """The value as strict JSON holds it: None for NaN and infinity, numbers of numpy as Python's, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json_atomic(path: Path, value: Any) -> None:
    write_text_atomic(path, json_text(value))


def write_table(table: pd.DataFrame, stem: Path) -> None:
    """``stem``.parquet and ``stem``.csv; the Parquet last, as it is the file that others wait for."""
    with atomic_write(stem.with_suffix(".csv"), "w") as stream:
        table.to_csv(stream, index=False)
    with atomic_write(stem.with_suffix(".parquet")) as stream:
        table.to_parquet(stream, index=False)


def read_table(path: Path) -> pd.DataFrame:
    """The table of a .parquet or .csv file.

    Raises:
        FileNotFoundError: there is none. ValueError: another ending, or a file that cannot be read; both name it.
    """
    readers = {".parquet": pd.read_parquet, ".csv": functools.partial(pd.read_csv, low_memory=False)}
    path = Path(path)
    if path.suffix not in readers:
        raise ValueError(f"{path}: a table ends in .parquet or .csv")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return readers[path.suffix](path)
    except Exception as error:  # every reader has its own
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error


def read_json(path: Path) -> Any:
    """JSON of a file; FileNotFoundError or ValueError name the file."""
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from None


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``; numbers by their repr, keys sorted."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
