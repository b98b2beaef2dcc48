"""The tokens stage: text -> documents split into train and validation -> tokenizer -> token shards."""

import contextlib
import logging
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .errors import CorpusError
from .identity import tokens_spec
from .part_processes import make_parts
from .parts import FOLDER as PARTS
from .parts import Part, PartMaker, content_hashes, remove_parts
from .pieces import Piece, check_sources, list_pieces, text_key
from .settings import CorpusSettings, TokenizerSettings
from .shard_writer import TokensWriter, check_space
from .shards import token_dtype
from .sources import iter_documents
from .tokenizer import (
    TextTokenizer,
    find_tokenizer,
    load_tokenizer,
    save_tokenizer,
    settings_of_training,
    train_tokenizer,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DocumentIndex:
    """What a first pass over the text learns, one entry a document in the order of `iter_documents`.

    keys: uint64 (n,) pseudo-random, from SHA-256 of (split_seed, SHA-256 of the text); num_bytes: uint64 (n,) of UTF-8;
    kept: bool (n,) False for blank documents and exact duplicates; candidate: bool (n,) drawn for validation.
    """

    keys: np.ndarray
    num_bytes: np.ndarray
    kept: np.ndarray
    candidate: np.ndarray
    num_blank: int
    num_duplicates: int


def index_documents(settings: CorpusSettings, progress: bool = False) -> DocumentIndex:
    """Hash every document (about 32 B of memory each), drop blanks and exact duplicates, draw validation candidates.

    The candidates are the `validation_fraction` of documents with the smallest keys, at least one: a choice by content,
    whatever the file names, the format or the order. Raises CorpusError for fewer than two distinct documents, or where
    one large document makes most of the text validation text.
    """
    digests, keys, sizes = bytearray(), array("Q"), array("Q")
    for document in _bar(iter_documents(settings), "reading", "document", progress):
        content = document.text.encode()
        digest, key = content_hashes(content, settings.split_seed)
        digests += digest
        keys.append(key)
        sizes.append(len(content))
    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    return _index(settings, halves, np.frombuffer(keys, dtype=np.uint64), np.frombuffer(sizes, dtype=np.uint64))


def _index(settings: CorpusSettings, halves: np.ndarray, keys: np.ndarray, num_bytes: np.ndarray) -> DocumentIndex:
    """The index of documents from their content hashes, uint64 (n, 2), keys and sizes; errors as `index_documents`."""
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the first of equal documents comes first
    repeats = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    duplicate = np.zeros(len(order), dtype=bool)
    duplicate[order[1:][repeats]] = True
    blank = num_bytes == 0
    kept = ~blank & ~duplicate
    distinct = np.flatnonzero(kept)
    if distinct.size < 2:
        raise CorpusError(
            f"The corpus '{settings.name}' has {distinct.size} distinct document(s) with text; a validation split by"
            " document needs at least two. For one large .txt file set corpus.document_separator."
        )
    count = min(max(1, round(settings.validation_fraction * distinct.size)), distinct.size - 1)
    candidate = np.zeros(len(order), dtype=bool)
    candidate[distinct[np.argsort(keys[distinct], kind="stable")[:count]]] = True
    share = num_bytes[candidate].sum() / num_bytes[kept].sum()
    if share > max(0.5, settings.validation_fraction):
        raise CorpusError(
            f"The {count} document(s) drawn for validation are {share:.0%} of the text of the corpus '{settings.name}'."
            " Set another corpus.split_seed, or corpus.document_separator to split large .txt files into documents."
        )
    return DocumentIndex(keys, num_bytes, kept, candidate, int(blank.sum()), int((duplicate & ~blank).sum()))


def build_tokens(
    corpus_cfg: Mapping[str, Any] | CorpusSettings,
    tokenizer_cfg: Mapping[str, Any] | TokenizerSettings,
    out_dir: str | Path,
    progress: bool = True,
    workers: int | None = None,
    before_commit: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run the whole stage and return the content of `out_dir/meta.json`.

    workers: processes that encode side by side; default the CPUs of this process (`available_workers`). before_commit:
    called when all is written and nothing is in its place; what it raises leaves the folder as it was.

    The text is read once by a tokenizer that is loaded; to train one, it is read twice before (hashes, training). It is
    encoded part by part into `out_dir/parts`, which a killed job leaves and the next one takes up; the merge decides
    which documents are kept and which validate, and removes the parts. The tokenizer is trained on documents that are
    no validation candidates. Where `max_validation_tokens` binds, the candidates with the smallest keys are kept, at
    least one, and the others go back to the training split. The merge takes about 80 B of memory a document.
    The same text and settings give the same bytes, whatever the workers. Raises CorpusError; but for the parts, the
    folder then is as it was.
    """
    corpus, settings, folder = CorpusSettings.of(corpus_cfg), TokenizerSettings.of(tokenizer_cfg), Path(out_dir)
    spec = tokens_spec(corpus, settings)
    tokenizer, index, parts = _encode(corpus, settings, folder, (1, 1), progress, workers)
    keys = np.concatenate([part.keys for part in parts])
    if index is not None and not np.array_equal(index.keys, keys):
        raise CorpusError(f"The text of the corpus '{corpus.name}' changed while it was read; rerun the tokens stage.")
    halves = np.concatenate([part.halves for part in parts])
    index = _index(corpus, halves, keys, np.concatenate([part.num_bytes for part in parts]))
    del halves, keys
    lengths = np.concatenate([part.lengths for part in parts]).astype(np.int64)
    validation = _validation(corpus, index, lengths)
    log.info("%s documents, %s bytes of text", f"{index.kept.sum():,}", f"{index.num_bytes[index.kept].sum():,}")

    with TokensWriter(folder, tokenizer.padded_vocab_size, corpus.shard_tokens) as writer:
        itemsize = np.dtype(token_dtype(tokenizer.padded_vocab_size)).itemsize
        writer.estimated_bytes = itemsize * int(lengths[index.kept].sum()) + 8 * int(index.kept.sum())
        check_space(folder, writer.estimated_bytes)
        with _bar(None, "merging", "token", progress, total=int(lengths[index.kept].sum()), unit_scale=True) as bar:
            for split, chosen in (("validation", validation), ("train", index.kept & ~validation)):
                _merge(writer, split, parts, chosen, index.num_bytes, bar.update)
        meta = {
            "eod_token": tokenizer.eod_token,
            "eod_id": tokenizer.eod_id,
            "tokenizer": {
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "sha256": tokenizer.digest,
            },
            "corpus": {
                "name": corpus.name,
                "num_documents_read": len(index.kept),
                "num_blank_documents": index.num_blank,
                "num_duplicate_documents": index.num_duplicates,
            },
            "spec": spec,
        }
        if before_commit is not None:
            before_commit()
        meta = writer.commit(tokenizer.content, meta)
    remove_parts(folder / PARTS)
    return meta


def _merge(
    writer: TokensWriter,
    split: str,
    parts: Sequence[Part],
    chosen: np.ndarray,
    num_bytes: np.ndarray,
    done: Callable[[int], object],
) -> None:
    """Append the chosen documents of all parts, in order, to a split; ``done`` is told of each run of tokens.

    chosen: bool (n,), num_bytes: uint64 (n,) of UTF-8, over the documents of all parts.
    """
    first = 0
    for part in parts:
        here = slice(first, first + part.num_documents)
        first += part.num_documents
        part_bytes = int(num_bytes[here][chosen[here]].sum())
        for tokens, counts in part.select(chosen[here]):
            writer.append_documents(split, tokens, counts, part_bytes)
            part_bytes = 0  # of the whole part, counted with its first run
            done(tokens.size)


def build_part(
    corpus_cfg: Mapping[str, Any] | CorpusSettings,
    tokenizer_cfg: Mapping[str, Any] | TokenizerSettings,
    out_dir: str | Path,
    part: str,
    progress: bool = True,
    workers: int | None = None,
) -> int:
    """Make every N-th part of the tokens, from the I-th on, for `part` = "I/N", I = 1 ... N: one job of an array.

    Returns how many parts that were. `build_tokens` then takes up what is there, makes what is not, and merges.
    A tokenizer that has to be trained is trained by every job that finds none, each time the same.
    Raises CorpusError; parts that are done stay.
    """
    corpus, settings, folder = CorpusSettings.of(corpus_cfg), TokenizerSettings.of(tokenizer_cfg), Path(out_dir)
    return len(_encode(corpus, settings, folder, _share(part), progress, workers)[2])


def available_workers() -> int:
    """CPUs that this process may use: of its affinity mask, and of its Slurm task ($SLURM_CPUS_PER_TASK)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allotted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cpus, int(allotted)) if allotted.isdecimal() and int(allotted) else cpus


def _train(corpus: CorpusSettings, settings: TokenizerSettings, index: DocumentIndex, progress: bool) -> TextTokenizer:
    """Train on the training documents, or on a fixed pseudo-random sample of about `max_train_bytes` of them."""
    usable = index.kept & ~index.candidate
    available = int(index.num_bytes[usable].sum())
    if settings.max_train_bytes is not None and settings.max_train_bytes < available:
        # the largest keys; candidates have the smallest
        ordinals = np.flatnonzero(usable)
        ordinals = ordinals[np.argsort(index.keys[ordinals], kind="stable")[::-1]]
        within = int(np.searchsorted(np.cumsum(index.num_bytes[ordinals]), settings.max_train_bytes, side="right"))
        ordinals = np.sort(ordinals[: max(within, 1)])
    else:
        ordinals = np.flatnonzero(usable)
    texts = _bytes_bar(_select(corpus, index, ordinals), index, ordinals, progress, "training the tokenizer")
    return train_tokenizer(texts, settings)


def _encode(
    corpus: CorpusSettings,
    settings: TokenizerSettings,
    folder: Path,
    share: tuple[int, int],
    progress: bool,
    workers: int | None,
) -> tuple[TextTokenizer, DocumentIndex | None, list[Part]]:
    """The tokenizer, the index if one was needed to train it, and the parts of a share (I, N) of the pieces."""
    if workers is None:
        workers = available_workers()
    if not isinstance(workers, int) or workers < 1:
        raise CorpusError(f"The number of workers must be a positive integer, not {workers!r}.")
    pieces = list_pieces(corpus)
    with _rust_threads(workers):
        tokenizer, index = _tokenizer(corpus, settings, pieces, folder / PARTS, progress)
        mine = pieces[share[0] - 1 :: share[1]]
        maker = PartMaker(corpus, tokenizer, folder / PARTS)
        total = sum(piece.size for piece in mine)
        itemsize = maker.dtype.itemsize
        read = made = 0
        with _bar(None, "encoding", "B", progress, total=total, unit_scale=True) as bar:

            def done(piece: Piece, part: Part) -> None:
                nonlocal read, made
                read += piece.size
                made += itemsize * part.num_tokens + 40 * part.num_documents
                bar.update(piece.size)
                if read < total:  # the rest of the parts, and the tokens beside them
                    check_space(folder, round(made * (total - read) / read + (made * total / read)))

            parts = make_parts(maker, settings, mine, workers, done)
    return tokenizer, index, parts


def _tokenizer(
    corpus: CorpusSettings, settings: TokenizerSettings, pieces: list[Piece], folder: Path, progress: bool
) -> tuple[TextTokenizer, DocumentIndex | None]:
    """The tokenizer as it is loaded, was trained before (kept beside the parts), or is trained now (with an index)."""
    if not settings.trained:
        return load_tokenizer(settings), None
    key = text_key(pieces, **settings_of_training(corpus, settings))
    kept = folder / f"tokenizer-{key[:16]}.json"
    tokenizer = find_tokenizer(kept, key, settings)
    if tokenizer is not None:
        return tokenizer, None
    index = index_documents(corpus, progress)
    tokenizer = _train(corpus, settings, index, progress)
    check_sources(pieces)  # what is kept is of the text that its key names
    save_tokenizer(kept, key, tokenizer)
    return tokenizer, index


def _validation(corpus: CorpusSettings, index: DocumentIndex, lengths: np.ndarray) -> np.ndarray:
    """The validation documents, bool (n,): the candidates, or under `max_validation_tokens` as many of them, in the
    order of their keys, as fit, at least one. lengths: int64 (n,) tokens of each document."""
    if corpus.max_validation_tokens is None:
        return index.candidate
    ordinals = np.flatnonzero(index.candidate)
    ordinals = ordinals[np.argsort(index.keys[ordinals], kind="stable")]
    count = int(np.searchsorted(np.cumsum(lengths[ordinals]), corpus.max_validation_tokens, side="right"))
    chosen = np.zeros_like(index.candidate)
    chosen[ordinals[: max(count, 1)]] = True
    return chosen


def _share(part: str) -> tuple[int, int]:
    """ "I/N" as numbers."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise CorpusError(f"A part is I/N with I from 1 to N, such as 3/8, not {part!r}.")
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def _rust_threads(workers: int) -> Iterator[None]:
    """Let the tokenizers library use no more threads than there are workers (the number is fixed at first use)."""
    wanted = {"TOKENIZERS_PARALLELISM": str(workers > 1).lower(), "RAYON_NUM_THREADS": str(workers)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _select(corpus: CorpusSettings, index: DocumentIndex, ordinals: np.ndarray) -> Iterator[str]:
    """The texts of some documents, by rising ordinal. Raises CorpusError if the text changed since it was indexed."""
    wanted = iter(ordinals.tolist())
    target = next(wanted, None)
    for ordinal, document in enumerate(iter_documents(corpus)):
        if target is None:
            return
        if ordinal == target:
            if len(document.text.encode()) != index.num_bytes[ordinal]:
                break
            yield document.text
            target = next(wanted, None)
    if target is not None:
        raise CorpusError(f"The text of the corpus '{corpus.name}' changed while it was read; rerun the tokens stage.")


def _bytes_bar(
    texts: Iterator[str], index: DocumentIndex, ordinals: np.ndarray, progress: bool, title: str = "encoding"
) -> Iterator[str]:
    """Pass texts through a progress bar that counts bytes."""
    with _bar(None, title, "B", progress, total=int(index.num_bytes[ordinals].sum()), unit_scale=True) as bar:
        for ordinal, text in zip(ordinals.tolist(), texts, strict=True):
            yield text
            bar.update(int(index.num_bytes[ordinal]))


def _bar(items: Iterator[Any] | None, title: str, unit: str, progress: bool, **options: Any) -> tqdm:
    """A progress bar on stderr; silent without `progress` or where stderr is no terminal."""
    return tqdm(items, desc=title, unit=unit, disable=None if progress else True, leave=False, **options)
