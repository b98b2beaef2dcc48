"""The input files of a corpus cut into pieces, each of which is tokenized on its own; they depend on the text alone."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tokenizers

from .errors import CorpusError
from .settings import CorpusSettings
from .sources import locate

PART_FORMAT = 1  # of what is made of a piece: see `parts`
PIECE_BYTES = 4 << 20  # of input files to a piece, or one larger file
MAX_PIECES = 4096  # then pieces are larger


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
