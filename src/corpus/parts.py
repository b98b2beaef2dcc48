"""Parts: the tokens of some input files each, made in any order, by any number of processes or jobs, and kept on disk.

A part holds every document of its files, whatever split it ends up in, so that parts need nothing of each other; the
merge (`corpus.build`) decides. Which files make a part depends on the text alone. One file of a part:

    tokens | digests | keys | num_bytes | lengths | header (JSON) | its length (8 B) | SHA-256 of all before (32 B)
"""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
import tokenizers

from .errors import CorpusError
from .settings import CorpusSettings, TokenizerSettings
from .shards import HASH_CHUNK_BYTES, token_dtype
from .sources import locate, read_documents
from .tokenizer import TextTokenizer, parse_tokenizer

FOLDER = "parts"
PART_FORMAT = 1
PIECE_BYTES = 4 << 20  # of input files to a part, or one larger file
MAX_PIECES = 4096  # then parts are larger


@dataclass(frozen=True)
class Source:
    """An input file: name relative to the corpus, size [B], time of modification [ns]."""

    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, root: Path, path: Path) -> Self:
        status = path.stat()
        return cls(path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Piece:
    """Consecutive input files that make one part; number counts from 0."""

    number: int
    root: Path
    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(source.size for source in self.sources)


def list_pieces(settings: CorpusSettings) -> list[Piece]:
    """The input cut into pieces between files, of about the same size on disk. Errors as `source_files`."""
    root, files = locate(settings)
    sources = [Source.of(root, path) for path in files]
    limit = max(PIECE_BYTES, sum(source.size for source in sources) // MAX_PIECES)
    groups: list[list[Source]] = []
    size = limit
    for source in sources:
        if size + source.size > limit:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += source.size
    return [Piece(number, root, tuple(group)) for number, group in enumerate(groups)]


def check_sources(pieces: Iterable[Piece]) -> None:
    """Raise CorpusError, naming the file, if one is no longer as it was listed."""
    for piece in pieces:
        for source in piece.sources:
            path = piece.root / source.name
            try:
                unchanged = Source.of(piece.root, path) == source
            except FileNotFoundError:
                unchanged = False
            if not unchanged:
                raise CorpusError(f"{path} changed while it was read; rerun the tokens stage.")


def text_key(pieces: Sequence[Piece], **settings: Any) -> str:
    """SHA-256 of names, sizes and times of input files, of some settings and of the version of `tokenizers`."""
    sources = [[source.name, source.size, source.mtime_ns] for piece in pieces for source in piece.sources]
    content = {"format": PART_FORMAT, "tokenizers": tokenizers.__version__, "sources": sources, **settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def make_parts(
    maker: PartMaker,
    tokenizer_cfg: TokenizerSettings,
    pieces: Sequence[Piece],
    workers: int,
    done: Callable[[Piece, Part], None],
) -> list[Part]:
    """The parts of some pieces, in order: those on the disk as they are, the others made by `workers` processes.

    done: called with every part, in the order of completion. Raises CorpusError; parts that are done stay.
    """
    maker.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[int, Part] = {}
    missing = []
    for piece in pieces:
        if (part := maker.find(piece)) is None:
            missing.append(piece)
        else:
            parts[piece.number] = part
            done(piece, part)
    made = _made_here if min(workers, len(missing)) <= 1 else _made_by_processes
    for piece, part in made(maker, tokenizer_cfg, missing, workers):
        parts[piece.number] = part
        done(piece, part)
    return [parts[piece.number] for piece in pieces]


def _made_here(
    maker: PartMaker, tokenizer_cfg: TokenizerSettings, pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[Piece, Part]]:
    for piece in pieces:
        yield piece, maker.make(piece)


def _made_by_processes(
    maker: PartMaker, tokenizer_cfg: TokenizerSettings, pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[Piece, Part]]:
    count = min(workers, len(pieces))
    processes = [_Worker(maker, tokenizer_cfg) for _ in range(count)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in processes:
        idle.put(worker)

    def make(piece: Piece) -> Part:
        worker = idle.get()
        try:
            return worker.make(piece)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(count)  # each thread waits for a process
    try:
        # the largest first: no long piece is left for the end
        tasks = {pool.submit(make, piece): piece for piece in sorted(pieces, key=lambda piece: -piece.size)}
        for task in as_completed(tasks):
            yield tasks[task], task.result()
    finally:
        for worker in processes:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in processes:
            worker.close()


class _Worker:
    """A process of `corpus.worker`: unlike those of `multiprocessing` it inherits no threads and no main module."""

    def __init__(self, maker: PartMaker, tokenizer_cfg: TokenizerSettings) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._first: tuple | None = (maker.corpus, maker.tokenizer.content, tokenizer_cfg, maker.folder)

    def make(self, piece: Piece) -> Part:
        """The part of a piece. Raises what the process raised, and CorpusError if it is gone."""
        try:
            for message in filter(None, (self._first, piece)):
                pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            self._first = None
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CorpusError(
                "A process that made tokens was killed, for want of memory perhaps; rerun the tokens stage with fewer"
                " --workers (parts that are done are kept)."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Release a process that was killed and that no thread waits for."""
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(OSError):  # a message that it did not live to read
            self._process.stdin.close()


def save_tokenizer(path: Path, key: str, tokenizer: TextTokenizer) -> None:
    """Keep a trained tokenizer beside the parts, for other jobs and for a rerun."""
    record = {"key": key, "sha256": tokenizer.digest, "content": tokenizer.content.decode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(path)


def find_tokenizer(path: Path, key: str, settings: TokenizerSettings) -> TextTokenizer | None:
    """The tokenizer trained on this text (`key`), or None."""
    try:
        record = json.loads(path.read_bytes())
        content = record["content"].encode()
        if record["key"] != key or record["sha256"] != hashlib.sha256(content).hexdigest():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return parse_tokenizer(content, settings, str(path))


def remove_parts(folder: Path) -> None:
    """Remove the parts, which hold nothing that the tokens do not."""
    shutil.rmtree(folder, ignore_errors=True)


def settings_of_training(corpus: CorpusSettings, tokenizer: TokenizerSettings) -> dict[str, Any]:
    """What a trained tokenizer depends on, besides the text."""
    of_tokenizer = {
        key: asdict(tokenizer)[key] for key in ("vocab_size", "eod_token", "min_frequency", "max_train_bytes")
    }
    of_corpus = {
        key: asdict(corpus)[key] for key in ("text_field", "document_separator", "validation_fraction", "split_seed")
    }
    return of_tokenizer | of_corpus


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
