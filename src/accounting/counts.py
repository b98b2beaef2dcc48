"""Parameters, FLOPs and bytes of a whole model, from its shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from xlstm_scaling.accounting.architecture import CONVENTIONS, Architecture, BlockCounts, Flops, Part
from xlstm_scaling.accounting.dtypes import BF16_BYTES, FP32_BYTES
from xlstm_scaling.accounting.hybrid import Hybrid
from xlstm_scaling.accounting.shapes import ModelShape
from xlstm_scaling.accounting.transformer import Transformer
from xlstm_scaling.accounting.xlstm import XLSTM

#: every architecture that can be counted, by the name that configs and tables use
ARCHITECTURES: dict[str, Architecture] = {entry.name: entry for entry in (XLSTM(), Transformer(), Hybrid())}


def architecture(name: str) -> Architecture:
    """The accounting entry of an architecture; ValueError names the known ones."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown architecture {name!r}; known: {known}") from None


def label(name: str) -> str:
    """What figures and reports call an architecture; the name itself where it is unknown."""
    return ARCHITECTURES[name].label if name in ARCHITECTURES else name


def ordered(names: Iterable[str]) -> list[str]:
    """Architectures in the order of `ARCHITECTURES`, those it does not know behind them by name; each once."""
    known, given = list(ARCHITECTURES), {str(name) for name in names}
    return [name for name in known if name in given] + sorted(given - set(known))


@lru_cache(maxsize=4096)
def parts(shape: ModelShape) -> tuple[Part, ...]:
    """The blocks of a model by kind."""
    return architecture(shape.arch).parts(shape)


def sum_blocks(shape: ModelShape, count: Callable[[BlockCounts, ModelShape], Any]) -> Any:
    """``count(kind, shape)`` of a block, summed over the blocks of a model."""
    return sum(part.blocks * count(part.kind, part.shape) for part in parts(shape))


def block_params(kind: BlockCounts, shape: ModelShape) -> int:
    """All parameters of one block."""
    return kind.block_linear_params(shape) + kind.block_other_params(shape)


def make_shape(
    arch: str,
    embedding_dim: int,
    num_blocks: int,
    num_heads: int,
    vocab_size: int,
    chunk_size: int = 64,
    **options: Any,
) -> ModelShape:
    """The full shape of a model from its free dimensions (architecture.md: models, "Shapes").

    ``options``: of the architecture, such as the hybrid's ``attention_every``; ValueError on one that it has not.
    """
    entry = architecture(arch)
    try:
        return entry.shape(embedding_dim, num_blocks, num_heads, vocab_size, chunk_size, **options)
    except TypeError:
        if not options:
            raise
        raise ValueError(f"architecture {arch!r} has not all of the shape options {sorted(options)}") from None


def count_params(shape: ModelShape, embedding: bool = True) -> int:
    """Number of parameters; embedding and head untied, norms counted. ``embedding=False`` leaves both tables out."""
    blocks = sum_blocks(shape, block_params)
    tables = 2 * shape.vocab_size * shape.embedding_dim if embedding else 0
    return blocks + tables + shape.embedding_dim


def count_flops(shape: ModelShape, context_length: int, convention: str = "paper") -> Flops:
    """Forward FLOPs of one sequence of ``context_length`` tokens.

    ``convention``: ``paper`` (the default), ``chinchilla`` (attention without causality), ``tfla`` (mLSTM as a tiled
    kernel computes it) or ``6nd`` (2 N per token forward, Kaplan et al. 2020).
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown FLOP convention {convention!r}; known: {', '.join(CONVENTIONS)}")
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}")
    T = context_length
    if convention == "6nd":
        return Flops(linear=2 * count_params(shape) * T, sequence_mixing=0, other=0)
    weights = sum_blocks(shape, lambda kind, one: kind.block_linear_params(one))
    return Flops(
        linear=2 * T * (weights + shape.vocab_size * shape.embedding_dim),
        sequence_mixing=sum_blocks(shape, lambda kind, one: kind.block_mixing_flops(one, T, convention)),
        other=sum_blocks(shape, lambda kind, one: kind.block_other_flops(one, T)),
    )


def training_flops(
    shape: ModelShape, context_length: int, batch_size: int, num_steps: int, convention: str = "paper"
) -> float:
    """FLOPs of a training run: 3 x forward x sequences x steps."""
    return count_flops(shape, context_length, convention).forward_backward * batch_size * num_steps


# inference


def prefill_flops(shape: ModelShape, prefill_length: int, batch_size: int = 1) -> float:
    """FLOPs until the first token: the prompt through all blocks, logits of its last token only."""

    def block(kind: BlockCounts, one: ModelShape) -> float:
        backbone = prefill_length * kind.block_backbone_flops_per_token(one)
        return backbone + kind.block_prefill_mixing_flops(one, prefill_length)

    blocks = sum_blocks(shape, block)
    return batch_size * (blocks + 2 * shape.embedding_dim * shape.vocab_size)


def step_flops(shape: ModelShape, position: int, batch_size: int = 1) -> float:
    """FLOPs of one generated token after ``position`` tokens."""

    def block(kind: BlockCounts, one: ModelShape) -> float:
        return kind.block_backbone_flops_per_token(one) + kind.block_step_mixing_flops(one, position)

    blocks = sum_blocks(shape, block)
    return batch_size * (blocks + 2 * shape.embedding_dim * shape.vocab_size)


def weight_bytes(shape: ModelShape, weight: int = BF16_BYTES) -> float:
    """Bytes of the weights that one forward call reads: every block once, the head once."""
    blocks = sum_blocks(shape, block_params)
    return weight * (blocks + shape.vocab_size * shape.embedding_dim)


def prefill_bytes(
    shape: ModelShape, prefill_length: int, batch_size: int = 1, weight: int = BF16_BYTES, act: int = BF16_BYTES,
    state: int = FP32_BYTES,
) -> float:  # fmt: skip
    """Bytes moved until the first token."""

    def block(kind: BlockCounts, one: ModelShape) -> float:
        linear = prefill_length * kind.block_activation_bytes_per_token(one, act)
        return linear + kind.block_prefill_mixing_bytes(one, prefill_length, act, state)

    blocks = sum_blocks(shape, block)
    head = act * (shape.embedding_dim + shape.vocab_size)
    return weight_bytes(shape, weight) + batch_size * (blocks + head)


def step_bytes(
    shape: ModelShape, position: int, batch_size: int = 1, weight: int = BF16_BYTES, act: int = BF16_BYTES,
    state: int = FP32_BYTES,
) -> float:  # fmt: skip
    """Bytes moved for one generated token after ``position`` tokens."""

    def block(kind: BlockCounts, one: ModelShape) -> float:
        linear = kind.block_activation_bytes_per_token(one, act)
        return linear + kind.block_step_mixing_bytes(one, position, act, state)

    blocks = sum_blocks(shape, block)
    head = act * (shape.embedding_dim + shape.vocab_size)
    return weight_bytes(shape, weight) + batch_size * (blocks + head)
