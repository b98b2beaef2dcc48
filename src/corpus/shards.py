"""Memory-mapped token shards: written once, atomically; read as one flat array a split.

A tokens folder holds

    meta.json                    what follows, written last: a folder with it is complete
    tokenizer.json               Hugging Face `tokenizers` format
    train-00000.bin, ...         token ids, little-endian uint16 (vocab_size <= 65,536) or uint32
    train.documents.bin          position of each document's first token in the split, little-endian uint64
    validation-00000.bin, ...

The digest of a split is the SHA-256 of its token stream, so it does not depend on the shard size; `meta["digest"]`
covers the splits, the document starts, the tokenizer and the vocabulary, and no path, host or time.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from .errors import CorpusError

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
DOCUMENT_DTYPE = "<u8"
HASH_CHUNK_BYTES = 1 << 22


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds the ids of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def content_digest(meta: Mapping[str, Any]) -> str:
    """The digest of the tokens described by a meta.json: what a training run's loss can depend on."""
    identity = {
        "format_version": meta["format_version"],
        "vocab_size": meta["vocab_size"],
        "eod_id": meta["eod_id"],
        "tokenizer": meta["tokenizer"]["sha256"],
        **{
            name: [split["num_tokens"], split["digest"], split["documents"]["sha256"]]
            for name, split in meta["splits"].items()
        },
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class TokenSplit:
    """One split as a flat array of `num_tokens` tokens over memory-mapped shards.

    num_bytes: UTF-8 bytes of its text; num_documents; tokens_per_byte counts the end-of-document tokens, so that
    bits per byte = loss [nat/token] / ln 2 * tokens_per_byte.
    """

    def __init__(self, folder: Path, name: str, dtype: str, meta: Mapping[str, Any]) -> None:
        self.name = name
        self.num_tokens: int = meta["num_tokens"]
        self.num_bytes: int = meta["num_bytes"]
        self.num_documents: int = meta["num_documents"]
        self.digest: str = meta["digest"]
        little = np.dtype(dtype).newbyteorder("<")
        self._shards = [np.memmap(folder / shard["name"], little, mode="r") for shard in meta["shards"]]
        self._ends = np.cumsum([shard["num_tokens"] for shard in meta["shards"]])
        self._documents = np.memmap(folder / meta["documents"]["name"], DOCUMENT_DTYPE, mode="r")

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of text."""
        return self.num_tokens / self.num_bytes

    @property
    def document_offsets(self) -> np.ndarray:
        """First token of every document and the end of the last: int64 (num_documents + 1,)."""
        return np.append(self._documents.astype(np.int64), self.num_tokens)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of tokens: int64 (B, length), row b being tokens starts[b] ... starts[b] + length - 1.

        starts: int64 (B,). Raises IndexError for a window outside the split.
        """
        positions = self._check(starts, length)[:, None] + np.arange(length)  # (B, length)
        if len(self._shards) == 1:
            return self._shards[0][positions].astype(np.int64)
        tokens = np.empty(positions.shape, dtype=np.int64)
        shard_of = np.searchsorted(self._ends, positions, side="right")
        for shard in np.unique(shard_of):
            inside = shard_of == shard
            first = self._ends[shard] - self._shards[shard].size
            tokens[inside] = self._shards[shard][positions[inside] - first]
        return tokens

    def document_starts(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Where documents begin in the windows of `gather`: bool (B, length), True at a document's first token."""
        starts = self._check(starts, length)
        first = np.searchsorted(self._documents, starts.astype(np.uint64))  # (B,) document index
        last = np.searchsorted(self._documents, (starts + length).astype(np.uint64))
        counts = last - first
        rows = np.repeat(np.arange(starts.size), counts)
        within = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = self._documents[first[rows] + within].astype(np.int64) - starts[rows]
        marks = np.zeros((starts.size, length), dtype=bool)
        marks[rows, columns] = True
        return marks

    def _check(self, starts: np.ndarray, length: int) -> np.ndarray:
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(
                f"A window of {length} tokens from {starts.min()} or {starts.max()} leaves the split '{self.name}'"
                f" of {self.num_tokens} tokens."
            )
        return starts


class TokenDataset:
    """The tokens that a run trains on; `open` it, then take a `split`.

    meta: the content of meta.json; digest: identity of the tokens; vocab_size: padded; eod_id.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], states: "Mapping[str, _State]") -> None:
        self.folder = folder
        self.meta = meta
        self._states = dict(states)  # of every file, when it was opened
        self.digest: str = meta["digest"]
        self.vocab_size: int = meta["vocab_size"]
        self.eod_id: int = meta["eod_id"]

    @classmethod
    def open(cls, folder: str | Path, verify: Literal["size", "digest"] = "size") -> Self:
        """Open a tokens folder.

        verify: "size" compares the size of every file, and the SHA-256 of those that are newer than meta.json, which
        was written last (`cp -a` keeps times, plain `cp` does not); "digest" reads all and compares every SHA-256.
        Raises CorpusError, naming the file, for tokens that are incomplete, truncated or altered.
        """
        if verify not in ("size", "digest"):
            raise ValueError(f"verify must be 'size' or 'digest', not {verify!r}")
        folder = Path(folder)
        again = "Rerun the tokens stage."
        if not (folder / "meta.json").is_file():
            raise CorpusError(f"There are no complete tokens in {folder} (no meta.json). {again}")
        states = {"meta.json": _state(folder / "meta.json")}
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            version = meta["format_version"]
            if version != FORMAT_VERSION:
                raise CorpusError(f"{folder} has tokens of format {version}, this code reads {FORMAT_VERSION}. {again}")
            intact = content_digest(meta) == meta["digest"]
            itemsize = np.dtype(meta["dtype"]).itemsize
            files: list[tuple[str, int | None, str]] = [("tokenizer.json", None, meta["tokenizer"]["sha256"])]
            for split in meta["splits"].values():
                files += [(shard["name"], shard["num_tokens"] * itemsize, shard["sha256"]) for shard in split["shards"]]
                files += [(split["documents"]["name"], split["num_documents"] * 8, split["documents"]["sha256"])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f"{folder / 'meta.json'} is damaged ({error!r}). {again}") from error
        if not intact:
            raise CorpusError(f"{folder / 'meta.json'} was altered: its digest does not match its content. {again}")
        for name, size, sha256 in files:
            state = _state(folder / name) if (folder / name).is_file() else None
            if state is None:
                raise CorpusError(f"{folder / name} is missing. {again}")
            if size is not None and state.size != size:
                raise CorpusError(
                    f"{folder / name} has {state.size:,} bytes, not {size:,}: truncated or altered. {again}"
                )
            touched = state.mtime_ns > states["meta.json"].mtime_ns
            if (verify == "digest" or touched) and _sha256(folder / name) != sha256:
                raise CorpusError(f"{folder / name} was altered: its SHA-256 does not match meta.json. {again}")
            states[name] = state
        return cls(folder, meta, states)

    def check_unchanged(self) -> None:
        """Compare size, time of modification and inode of every file with those at `open`: a stat a file, nothing read.

        Raises CorpusError, naming the file, if one was changed, replaced or removed since.
        """
        for name, before in self._states.items():
            try:
                now = _state(self.folder / name)
            except FileNotFoundError:
                now = None
            if now != before:
                raise CorpusError(
                    f"{self.folder / name} was {'removed' if now is None else 'changed'} while it was in use, so what"
                    " was read since cannot be trusted. Rerun the tokens stage, then resume from the last checkpoint."
                )

    def split(self, name: str) -> TokenSplit:
        """The split `train` or `validation`. Raises KeyError for another name."""
        if name not in self.meta["splits"]:
            raise KeyError(f"no split '{name}'; there are: {', '.join(self.meta['splits'])}")
        return TokenSplit(self.folder, name, self.meta["dtype"], self.meta["splits"][name])


class _State(NamedTuple):
    """What changes with a file: size [B], time of modification [ns], inode."""

    size: int
    mtime_ns: int
    inode: int


def _state(path: Path) -> _State:
    status = path.stat()
    return _State(status.st_size, status.st_mtime_ns, status.st_ino)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
