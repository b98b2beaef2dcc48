"""The settings of the groups `corpus` and `tokenizer`, checked once and frozen."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from omegaconf.errors import MissingMandatoryValue

from .errors import CorpusError


def _read(cfg: Mapping[str, Any], cls: type, group: str) -> dict[str, Any]:
    """The settings of a mapping as keyword arguments; rejects unknown keys and unset (`???`) values."""
    known = [field.name for field in fields(cls)]
    values = {}
    for key in cfg:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}."
            raise CorpusError(f"Unknown setting {group}.{key}; {hint}")
        try:
            value = cfg[key]
        except MissingMandatoryValue:
            value = "???"
        if value == "???":
            raise CorpusError(f"{group}.{key} is not set; give it a value, for example {group}.{key}=...")
        values[key] = value
    return values


def _integer(value: Any, name: str, at_least: int) -> int:
    """An integer setting; a float such as 1e6 counts when it is whole."""
    try:
        whole = not isinstance(value, bool | str) and int(value) == value
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole or value < at_least:
        raise CorpusError(f"{name} must be an integer of at least {at_least}, not {value!r}.")
    return int(value)


def _coerce(settings: Any, group: str, integers: dict[str, int], strings: tuple[str, ...]) -> None:
    """Check and normalise in place the integer (name -> minimum) and string settings that are not None."""
    for key, at_least in integers.items():
        value = getattr(settings, key)
        if value is not None:
            object.__setattr__(settings, key, _integer(value, f"{group}.{key}", at_least))
    for key in strings:
        value = getattr(settings, key)
        if value is not None and (not isinstance(value, str) or not value):
            raise CorpusError(f"{group}.{key} must be a non-empty text, not {value!r}.")


@dataclass(frozen=True)
class CorpusSettings:
    """Where the text lies and how it is split; the keys of `conf/corpus/*.yaml`, explained there."""

    name: str
    package: str | None = None
    install: str | None = None
    path: str | None = None
    glob: str | None = None
    text_field: str = "text"
    text_suffix: str | None = None
    document_separator: str | None = None
    validation_fraction: float = 0.04
    max_validation_tokens: int | None = None
    split_seed: int = 0
    shard_tokens: int = 2**27
    expected_tokens: float | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", str(self.path))
        _coerce(
            self,
            "corpus",
            {"max_validation_tokens": 1, "split_seed": 0, "shard_tokens": 1, "expected_tokens": 1},
            ("name", "package", "install", "path", "glob", "text_field", "text_suffix", "document_separator"),
        )
        if (self.package is None) == (self.path is None):
            raise CorpusError("Give exactly one of corpus.package (an installed corpus) and corpus.path (your text).")
        if self.package is not None and self.glob is None:
            raise CorpusError("corpus.package needs corpus.glob, the text files inside the package.")
        try:
            fraction = float(self.validation_fraction)
        except (TypeError, ValueError):
            fraction = -1.0
        if not 0.0 < fraction < 1.0:
            raise CorpusError(f"corpus.validation_fraction must lie in (0, 1), not {self.validation_fraction!r}.")
        object.__setattr__(self, "validation_fraction", fraction)

    @classmethod
    def of(cls, cfg: "Mapping[str, Any] | CorpusSettings") -> Self:
        """The settings of a mapping (dict or DictConfig). Raises CorpusError on an unknown key or a bad value."""
        if isinstance(cfg, cls):
            return cfg
        return cls(**{"name": "corpus", **_read(cfg, cls, "corpus")})


@dataclass(frozen=True)
class TokenizerSettings:
    """A tokenizer to train (no `file`) or to load; the keys of `conf/tokenizer/*.yaml`, explained there."""

    name: str
    vocab_size: int | None = None
    file: str | None = None
    package: str | None = None
    install: str | None = None
    eod_token: str = "<|endoftext|>"
    pad_vocab_to_multiple_of: int | None = None
    min_frequency: int = 2
    max_train_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.file is not None:
            object.__setattr__(self, "file", str(self.file))
        _coerce(
            self,
            "tokenizer",
            {"vocab_size": 1, "pad_vocab_to_multiple_of": 1, "min_frequency": 1, "max_train_bytes": 1},
            ("name", "file", "package", "install", "eod_token"),
        )
        if self.package is not None and self.file is None:
            raise CorpusError("tokenizer.package needs tokenizer.file, the tokenizer.json inside the package.")
        if self.file is None and self.vocab_size is None:
            raise CorpusError("Give tokenizer.vocab_size to train a tokenizer, or tokenizer.file to load one.")
        if self.file is None and self.vocab_size < 257:
            raise CorpusError(
                f"tokenizer.vocab_size must be at least 257 (256 bytes and {self.eod_token}), not {self.vocab_size}."
            )

    @property
    def trained(self) -> bool:
        """Whether the tokenizer is trained on the corpus (and not loaded from a file)."""
        return self.file is None

    @classmethod
    def of(cls, cfg: "Mapping[str, Any] | TokenizerSettings") -> Self:
        """The settings of a mapping (dict or DictConfig). Raises CorpusError on an unknown key or a bad value."""
        if isinstance(cfg, cls):
            return cfg
        return cls(**{"name": "tokenizer", **_read(cfg, cls, "tokenizer")})
