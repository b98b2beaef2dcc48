"""Byte-level BPE: train one on the corpus, or load a tokenizer.json; encode documents in bounded batches."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .errors import CorpusError
from .settings import CorpusSettings, TokenizerSettings
from .sources import package_folder
from .words import SAFE_CUT, WordEncoder, is_cuttable, is_word_wise

BATCH_BYTES = 1 << 20  # characters of text a call to encode_batch; an encoding takes about 130 B a token
PIECE_CHARACTERS = 1 << 18  # longer documents are encoded piece by piece


class TextTokenizer:
    """A tokenizer with an end-of-document token.

    vocab_size: token ids of the tokenizer (largest id + 1); padded_vocab_size: the size of a model's embedding.
    eod_id: appended to every document. Text that spells a special token is encoded as ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, content: bytes, settings: TokenizerSettings) -> None:
        self.content = content  # of tokenizer.json
        self.digest = hashlib.sha256(content).hexdigest()
        self.name = settings.name
        self.eod_token = settings.eod_token
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        eod_id = tokenizer.token_to_id(settings.eod_token)
        if eod_id is None:
            known = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
            raise CorpusError(
                f"The tokenizer '{settings.name}' has no token {settings.eod_token}; set tokenizer.eod_token to the one"
                f" that ends a document. Its special tokens: {', '.join(known) or '(none)'}."
            )
        self.eod_id = eod_id
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        multiple = settings.pad_vocab_to_multiple_of or 1
        self.padded_vocab_size = -(-self.vocab_size // multiple) * multiple
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        self._cuttable = is_cuttable(state)
        self._words = WordEncoder(tokenizer, state, eod_id) if is_word_wise(state) else None

    def encode(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of each text, int64 (n,), in order, each ending with `eod_id`; memory is bounded by a batch.

        Documents of any length are encoded in pieces, with the tokens of the whole, if the pre-tokenizer is GPT-2's.
        """
        for batch in _batches(texts):
            pieces = list(_cut(batch[0])) if self._cuttable and len(batch) == 1 else []
            if len(pieces) > 1:  # one by one: the encodings of a long document do not fit side by side
                parts = [tokens[:-1] for piece in pieces for tokens in self._encode_batch([piece])]
                yield np.append(np.concatenate(parts), self.eod_id)
            else:
                yield from self._encode_batch(batch)

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Each text with its end of document."""
        if self._words is not None:
            return self._words.encode(texts)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eod_id], dtype=np.int64) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some tokens, special tokens left out."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts up to about BATCH_BYTES characters; a text longer than a piece stands alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (size + len(text) > BATCH_BYTES or len(text) > PIECE_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
        if len(text) > PIECE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut(text: str) -> Iterator[str]:
    """Cut a long text before white space into pieces of about PIECE_CHARACTERS."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS and (cut := SAFE_CUT.search(text, start + PIECE_CHARACTERS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def train_tokenizer(texts: Iterable[str], tokenizer_cfg: Mapping[str, Any] | TokenizerSettings) -> TextTokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer) of exactly `vocab_size` tokens; the same texts give the same one.

    The end-of-document token has id 0, the 256 bytes follow, then the merges in order of frequency.
    Raises CorpusError if the texts support fewer tokens.
    """
    settings = TokenizerSettings.of(tokenizer_cfg)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=[settings.eod_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _cut(text)), trainer)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size < settings.vocab_size:
        raise CorpusError(
            f"The text supports only {size:,} tokens of the {settings.vocab_size:,} asked for;"
            f" lower tokenizer.vocab_size to {size} or bring more text."
        )
    return TextTokenizer(tokenizer, tokenizer.to_str(pretty=True).encode(), settings)


def tokenizer_files(tokenizer_cfg: Mapping[str, Any] | TokenizerSettings) -> list[Path]:
    """The tokenizer.json a setting names, as a list of one; empty for a tokenizer that is trained. Opens nothing.

    Raises CorpusError for a package that is not installed or a file that is not there.
    """
    settings = TokenizerSettings.of(tokenizer_cfg)
    if settings.file is None:
        return []
    if settings.package is None:
        path = Path(settings.file).expanduser()
    else:
        path = package_folder(settings.package, settings.install, f"the tokenizer '{settings.name}'") / settings.file
    if not path.is_file():
        raise CorpusError(f"There is no tokenizer file {path}; check tokenizer.file (and tokenizer.package).")
    return [path]


def load_tokenizer(tokenizer_cfg: Mapping[str, Any] | TokenizerSettings) -> TextTokenizer:
    """Load the tokenizer.json of the settings (Hugging Face `tokenizers` format).

    Raises CorpusError if it is missing or unreadable, lacks `eod_token`, or is not of the `vocab_size` stated.
    """
    settings = TokenizerSettings.of(tokenizer_cfg)
    if settings.file is None:
        raise CorpusError("tokenizer.file is not set: there is no tokenizer to load.")
    (path,) = tokenizer_files(settings)
    loaded = parse_tokenizer(path.read_bytes(), settings, str(path))
    if settings.vocab_size is not None and loaded.vocab_size != settings.vocab_size:
        raise CorpusError(f"{path} has {loaded.vocab_size:,} tokens, but tokenizer.vocab_size={settings.vocab_size}.")
    return loaded


def parse_tokenizer(content: bytes, settings: TokenizerSettings, where: str) -> TextTokenizer:
    """The tokenizer of a tokenizer.json's content. Raises CorpusError if it is unreadable or lacks `eod_token`."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise CorpusError(f"{where} is not a Hugging Face tokenizer.json ({error}).") from error
    return TextTokenizer(tokenizer, content, settings)


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


def settings_of_training(corpus: CorpusSettings, tokenizer: TokenizerSettings) -> dict[str, Any]:
    """What a trained tokenizer depends on, besides the text."""
    of_tokenizer = {
        key: asdict(tokenizer)[key] for key in ("vocab_size", "eod_token", "min_frequency", "max_train_bytes")
    }
    of_corpus = {
        key: asdict(corpus)[key] for key in ("text_field", "document_separator", "validation_fraction", "split_seed")
    }
    return of_tokenizer | of_corpus
