"""The shape of a model: every dimension that parameters, FLOPs and bytes depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def ceil_to_multiple(value: int, multiple: int) -> int:
    """Round ``value`` up to a multiple of ``multiple``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of one model; made by ``Architecture.shape``, which derives what follows from the rest.

    ``chunk_size`` is the mLSTM chunk length L [tokens] that its FLOPs are counted at, ``None`` where the
    architecture has no chunks. ``attention_every``: one attention block in so many, ``None`` where blocks are alike.
    """

    arch: str
    embedding_dim: int
    num_blocks: int
    num_heads: int
    head_dim_qk: int
    head_dim_v: int
    ffn_dim: int
    vocab_size: int
    chunk_size: int | None = None
    attention_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "arch" or (name in OPTIONAL_DIMENSIONS and value is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.arch}: {name} must be a positive integer, got {value!r}")

    def as_dict(self) -> dict:
        """The fields by name, in the order in which the tables carry them; without ``attention_every`` where there is
        none, as it is part of a run's identity and younger than most runs."""
        fields = dict(vars(self))
        if self.attention_every is None:
            del fields["attention_every"]
        return fields


DIMENSIONS = ("embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v", "ffn_dim", "vocab_size")
OPTIONAL_DIMENSIONS = ("chunk_size", "attention_every")


def shape_of_row(row: Mapping[str, Any]) -> ModelShape:
    """The shape that a row of a table carries; optional dimensions may be missing or NaN.

    Raises KeyError on a missing column, ValueError on a dimension that is not positive.
    """
    optional = {name: row[name] for name in OPTIONAL_DIMENSIONS if name in row}
    known = {name: int(value) for name, value in optional.items() if not _is_missing(value)}
    return ModelShape(arch=str(row["arch"]), **{name: int(row[name]) for name in DIMENSIONS}, **known)


def _is_missing(value: Any) -> bool:
    """None, NaN or a table's NA."""
    if value is None:
        return True
    try:
        return math.isnan(value)
    except TypeError:  # pandas' NA
        return True


def require_divisible(arch: str, what: str, value: int, by: int, by_name: str) -> int:
    """``value / by`` as an integer, or an error that names both."""
    if by < 1 or value % by:
        raise ValueError(f"{arch}: {what} = {value} is not divisible by {by_name} = {by}")
    return value // by
