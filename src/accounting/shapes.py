"""The shape of a model: every dimension that parameters, FLOPs and bytes depend on."""

from __future__ import annotations

from dataclasses import dataclass


def ceil_to_multiple(value: int, multiple: int) -> int:
    """Round ``value`` up to a multiple of ``multiple``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of one model; made by ``Architecture.shape``, which derives what follows from the rest.

    ``chunk_size`` is the mLSTM chunk length L [tokens] that its FLOPs are counted at, ``None`` where the
    architecture has no chunks.
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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "arch" or (name == "chunk_size" and value is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.arch}: {name} must be a positive integer, got {value!r}")

    def as_dict(self) -> dict:
        """The fields by name, in the order in which the tables carry them."""
        return dict(vars(self))


def require_divisible(arch: str, what: str, value: int, by: int, by_name: str) -> int:
    """``value / by`` as an integer, or an error that names both."""
    if by < 1 or value % by:
        raise ValueError(f"{arch}: {what} = {value} is not divisible by {by_name} = {by}")
    return value // by
