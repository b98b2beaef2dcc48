"""The tokens stage: text -> documents split into train and validation -> tokenizer -> token shards."""

import hashlib
import heapq
import importlib.metadata
import json
import logging
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .errors import CorpusError
from .settings import CorpusSettings, TokenizerSettings
from .shards import FORMAT_VERSION, TokensWriter, check_space, token_dtype
from .sources import iter_documents, package_folder
from .tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

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
    seed = f"{settings.split_seed}:".encode()
    for document in _bar(iter_documents(settings), "reading", "document", progress):
        content = document.text.encode()
        digest = hashlib.sha256(content).digest()
        digests += digest[:16]
        keys.append(int.from_bytes(hashlib.sha256(seed + digest).digest()[:8], "little"))
        sizes.append(len(content))
    num_bytes = np.frombuffer(sizes, dtype=np.uint64)
    keys = np.frombuffer(keys, dtype=np.uint64)
    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)  # (n, 2)

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
) -> dict[str, Any]:
    """Run the whole stage and return the content of `out_dir/meta.json`.

    The text is read three or four times (hashes, tokenizer training, validation, training), never held at once. The
    tokenizer is trained on documents that are no validation candidates. Where `max_validation_tokens` binds, the
    candidates with the smallest keys are kept, at least one, and the others go back to the training split.
    The same text and settings give the same bytes. Raises CorpusError; the folder then is as it was.
    """
    corpus, settings, folder = CorpusSettings.of(corpus_cfg), TokenizerSettings.of(tokenizer_cfg), Path(out_dir)
    spec = tokens_spec(corpus, settings)
    tokenizer = None if settings.trained else load_tokenizer(settings)
    index = index_documents(corpus, progress)
    if tokenizer is None:
        tokenizer = _train(corpus, settings, index, progress)
    total_bytes = int(index.num_bytes[index.kept].sum())
    log.info("%s documents, %s bytes of text", f"{int(index.kept.sum()):,}", f"{total_bytes:,}")

    with TokensWriter(folder, tokenizer.padded_vocab_size, corpus.shard_tokens) as writer:
        validation = np.zeros_like(index.kept)
        chosen = _encode_validation(corpus, tokenizer, index, progress)
        for ordinal, tokens in chosen:
            validation[ordinal] = True
            writer.append("validation", tokens, int(index.num_bytes[ordinal]))

        tokens_per_byte = sum(tokens.size for _, tokens in chosen) / int(index.num_bytes[validation].sum())
        itemsize = np.dtype(token_dtype(tokenizer.padded_vocab_size)).itemsize
        writer.estimated_bytes = int(total_bytes * tokens_per_byte * itemsize) + 8 * int(index.kept.sum())
        check_space(folder, writer.estimated_bytes)
        del chosen

        train = np.flatnonzero(index.kept & ~validation)
        texts = _select(corpus, index, train)
        for ordinal, tokens in zip(train.tolist(), tokenizer.encode(_bytes_bar(texts, index, train, progress))):
            writer.append("train", tokens, int(index.num_bytes[ordinal]))
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
        return writer.commit(tokenizer.content, meta)


def tokens_spec(
    corpus_cfg: Mapping[str, Any] | CorpusSettings, tokenizer_cfg: Mapping[str, Any] | TokenizerSettings
) -> dict[str, Any]:
    """The settings that determine the tokens, without reading any text; for a short id of a tokens folder.

    A package counts with its installed version, a user's path as it is written. Names, `install`, `shard_tokens` and
    `expected_tokens` do not count. What the text really was is in the digest of meta.json.
    Raises CorpusError if a package is not installed.
    """
    corpus, tokenizer = CorpusSettings.of(corpus_cfg), TokenizerSettings.of(tokenizer_cfg)
    text = {
        key: getattr(corpus, key)
        for key in (
            *("path", "glob", "text_field", "document_separator"),
            *("validation_fraction", "max_validation_tokens", "split_seed"),
        )
    }
    vocabulary: dict[str, Any] = {
        "eod_token": tokenizer.eod_token,
        "pad_vocab_to_multiple_of": tokenizer.pad_vocab_to_multiple_of,
    }
    if corpus.package is not None:
        text["package"] = _package_version(corpus.package, corpus.install, f"the corpus '{corpus.name}'")
    if tokenizer.trained:
        vocabulary |= {key: getattr(tokenizer, key) for key in ("vocab_size", "min_frequency", "max_train_bytes")}
    else:
        vocabulary["file"] = tokenizer.file
    if tokenizer.package is not None:
        wanted_by = f"the tokenizer '{tokenizer.name}'"
        vocabulary["package"] = _package_version(tokenizer.package, tokenizer.install, wanted_by)
    given = {"corpus": text, "tokenizer": vocabulary}
    return {
        "format_version": FORMAT_VERSION,
        **{
            group: {key: value for key, value in sorted(values.items()) if value is not None}
            for group, values in given.items()
        },
    }


def tokens_id(
    corpus_cfg: Mapping[str, Any] | CorpusSettings, tokenizer_cfg: Mapping[str, Any] | TokenizerSettings
) -> str:
    """A readable name and ten hexadecimal digits of `tokens_spec`: `sotu-bpe-1f0c9a7e21`, good as a folder name."""
    corpus, tokenizer = CorpusSettings.of(corpus_cfg), TokenizerSettings.of(tokenizer_cfg)
    spec = json.dumps(tokens_spec(corpus, tokenizer), sort_keys=True)
    return f"{corpus.name}-{tokenizer.name}-{hashlib.sha256(spec.encode()).hexdigest()[:10]}"


def _package_version(package: str, install: str | None, wanted_by: str) -> str:
    """``package==version`` as installed; where it is not, as ``install`` pins it, so that a plan can be made."""
    try:
        return f"{package}=={importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        pinned = re.search(rf"(?<![\w-]){re.escape(package)}==[\w.+!-]+", install or "")
        if pinned is not None:
            return pinned[0]
        package_folder(package, install, wanted_by)  # raises where the package is missing
        return package


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


def _encode_validation(
    corpus: CorpusSettings, tokenizer: TextTokenizer, index: DocumentIndex, progress: bool
) -> list[tuple[int, np.ndarray]]:
    """(ordinal, tokens) of the validation documents, in the order of the corpus.

    Under `max_validation_tokens` the longest prefix of the candidates in the order of their keys that fits, at least
    one document; no more than that is held in memory.
    """
    limit = corpus.max_validation_tokens
    ordinals = np.flatnonzero(index.candidate)
    texts = _bytes_bar(_select(corpus, index, ordinals), index, ordinals, progress, "encoding validation")
    held: list[tuple[int, int, np.ndarray]] = []  # heap by falling key
    total, barrier = 0, 2**64  # a document with a key from the barrier on lies past the limit
    for ordinal, tokens in zip(ordinals.tolist(), tokenizer.encode(texts)):
        key = int(index.keys[ordinal])
        if key >= barrier:
            continue
        heapq.heappush(held, (-key, ordinal, tokens.astype(np.uint32)))
        total += tokens.size
        while limit is not None and total > limit and len(held) > 1:
            negative, _, evicted = heapq.heappop(held)
            total -= evicted.size
            barrier = -negative
    return sorted(((ordinal, tokens) for _, ordinal, tokens in held), key=lambda pair: pair[0])


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
