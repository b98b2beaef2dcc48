"""Parts: the tokens of some input files each, made in any order, by any number of processes or jobs, and kept on disk.

A part holds every document of its files, whatever split it ends up in, so that parts need nothing of each other; the
merge (`corpus.build`) decides. Which files make a part depends on the text alone. One file of a part:

    tokens | digests | keys | num_bytes | lengths | header (JSON) | its length (8 B) | SHA-256 of all before (32 B)
"""

import errno
import hashlib
import json
import os
import shutil
import socket
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from .errors import CorpusError
from .pieces import Piece, check_sources, text_key
from .settings import CorpusSettings
from .shards import HASH_CHUNK_BYTES, token_dtype
from .sources import read_documents
from .tokenizer import TextTokenizer

FOLDER = "parts"


def content_hashes(content: bytes, split_seed: int) -> tuple[bytes, int]:
    """The identity of a document, 16 B, and its pseudo-random key, from SHA-256 of (split_seed, SHA-256 of content)."""
    digest = hashlib.sha256(content).digest()
    key = hashlib.sha256(f"{split_seed}:".encode() + digest).digest()[:8]
    return digest[:16], int.from_bytes(key, "little")


class PartMaker:
    """Makes the parts of one corpus with one tokenizer in one folder."""

    def __init__(self, corpus: CorpusSettings, tokenizer: TextTokenizer, folder: Path) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.folder = folder
        self.dtype = np.dtype(token_dtype(tokenizer.padded_vocab_size)).newbyteorder("<")

    def key(self, piece: Piece) -> str:
        """What the part depends on."""
        return text_key(
            [piece],
            text_field=self.corpus.text_field,
            document_separator=self.corpus.document_separator,
            split_seed=self.corpus.split_seed,
            tokenizer=self.tokenizer.digest,
            eod_id=self.tokenizer.eod_id,
            dtype=self.dtype.name,
        )

    def path(self, piece: Piece) -> Path:
        return self.folder / f"{piece.number:05d}-{self.key(piece)[:16]}.part"

    def find(self, piece: Piece) -> "Part | None":
        """The part as it lies on the disk, read and compared with its digest; None where it is missing or damaged."""
        return Part.open(self.path(piece), self.key(piece), verify=True)

    def make(self, piece: Piece) -> "Part":
        """Encode the documents of a piece. Raises CorpusError for bad or changing text, and for a full disk."""
        path = self.path(piece)
        temporary = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
        try:
            self._write(piece, temporary)
            temporary.replace(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CorpusError(
                f"The disk is full: there is no room for parts of the tokens in {self.folder}; make room, then rerun"
                " the tokens stage (parts that are done are kept), or choose another results folder."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return Part.open(path, self.key(piece), verify=False)

    def _write(self, piece: Piece, path: Path) -> None:
        digests, keys, num_bytes = bytearray(), array("Q"), array("Q")
        seen: set[bytes] = set()
        encoded: list[int] = []  # documents that have tokens here: no blanks, no repeats

        def texts() -> Iterator[str]:
            files = [piece.root / source.name for source in piece.sources]
            for document in read_documents(self.corpus, piece.root, files):
                content = document.text.encode()
                digest, key = content_hashes(content, self.corpus.split_seed)
                if content and digest not in seen:
                    encoded.append(len(keys))
                    seen.add(digest)
                    wanted = True
                else:
                    wanted = False
                digests.extend(digest)
                keys.append(key)
                num_bytes.append(len(content))
                if wanted:
                    yield document.text

        with path.open("wb") as raw:
            file = _HashedFile(raw)
            counts = []
            for tokens in self.tokenizer.encode(texts()):
                file.write(tokens.astype(self.dtype).tobytes())
                counts.append(tokens.size)
            check_sources([piece])
            lengths = np.zeros(len(keys), dtype="<u8")
            lengths[encoded] = counts
            file.write(digests)
            for values in (keys, num_bytes, lengths):
                file.write(np.asarray(values, dtype="<u8").tobytes())
            header = {
                "key": self.key(piece),
                "num_documents": len(keys),
                "num_tokens": sum(counts),
                "dtype": self.dtype.name,
            }
            content = json.dumps(header).encode()
            file.write(content + len(content).to_bytes(8, "little"))
            raw.write(file.digest())
            raw.flush()
            os.fsync(raw.fileno())


class Part:
    """One part on the disk: n documents in order, read when asked for.

    tokens: memory-mapped; halves: uint64 (n, 2) content hash; keys, num_bytes, lengths [tokens]: uint64 (n,).
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.num_documents: int = header["num_documents"]
        self.num_tokens: int = header["num_tokens"]
        self.dtype = np.dtype(header["dtype"]).newbyteorder("<")

    @classmethod
    def open(cls, path: Path, key: str, verify: bool) -> Self | None:
        """The part of this key; None where there is none, it is cut short, or (`verify`) its digest does not match."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(size - 40, 0))
                length, digest = int.from_bytes(file.read(8), "little"), file.read()
                if length + 40 > size:
                    return None
                file.seek(size - 40 - length)
                part = cls(path, header := json.loads(file.read(length)))
                content = part.num_tokens * part.dtype.itemsize + 40 * part.num_documents
                if header["key"] != key or size != content + length + 40:
                    return None
                if verify and _digest(file, size - 32) != digest:
                    return None
                return part
        except (OSError, ValueError, KeyError, TypeError):  # of damaged content too
            return None

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, (num_tokens,)."""
        return np.memmap(self.path, self.dtype, mode="r", shape=(self.num_tokens,))

    @property
    def halves(self) -> np.ndarray:
        return self._column(0, 2).reshape(-1, 2)

    @property
    def keys(self) -> np.ndarray:
        return self._column(2, 1)

    @property
    def num_bytes(self) -> np.ndarray:
        return self._column(3, 1)

    @property
    def lengths(self) -> np.ndarray:
        return self._column(4, 1)

    def _column(self, words_before: int, words: int) -> np.ndarray:
        n = self.num_documents
        offset = self.num_tokens * self.dtype.itemsize + 8 * n * words_before
        return np.fromfile(self.path, dtype="<u8", count=n * words, offset=offset).astype(np.uint64, copy=False)

    def select(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and lengths of runs of neighbouring documents; chosen: bool (num_documents,)."""
        ordinals = np.flatnonzero(chosen)
        if not ordinals.size:
            return
        lengths = self.lengths.astype(np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        tokens = self.tokens
        gaps = np.flatnonzero(starts[ordinals[1:]] != ends[ordinals[:-1]]) + 1
        for run in np.split(ordinals, gaps):
            yield tokens[starts[run[0]] : ends[run[-1]]], lengths[run]


def remove_parts(folder: Path) -> None:
    """Remove the parts, which hold nothing that the tokens do not."""
    shutil.rmtree(folder, ignore_errors=True)


class _HashedFile:
    """A file that hashes what it writes."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, content: bytes | bytearray) -> None:
        self._file.write(content)
        self._hash.update(content)

    def digest(self) -> bytes:
        return self._hash.digest()


def _digest(file: Any, size: int) -> bytes:
    """SHA-256 of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, HASH_CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()
