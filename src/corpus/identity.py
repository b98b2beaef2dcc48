"""Which tokens a corpus and a tokenizer give, known before any text is read."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from typing import Any

from .settings import CorpusSettings, TokenizerSettings
from .shards import FORMAT_VERSION
from .sources import package_folder


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
            *("path", "glob", "text_field", "text_suffix", "document_separator"),
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
