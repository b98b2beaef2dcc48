"""Parameters, FLOPs and bytes of a whole model, from its shape."""

from __future__ import annotations

from xlstm_scaling.accounting.architecture import CONVENTIONS, Architecture, Flops
from xlstm_scaling.accounting.shapes import ModelShape
from xlstm_scaling.accounting.transformer import Transformer
from xlstm_scaling.accounting.xlstm import XLSTM

#: every architecture that can be counted, by the name that configs and tables use
ARCHITECTURES: dict[str, Architecture] = {entry.name: entry for entry in (XLSTM(), Transformer())}

BF16_BYTES = 2
FP32_BYTES = 4


def architecture(name: str) -> Architecture:
    """The accounting entry of an architecture; ValueError names the known ones."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown architecture {name!r}; known: {known}") from None


def make_shape(
    arch: str, embedding_dim: int, num_blocks: int, num_heads: int, vocab_size: int, chunk_size: int = 64
) -> ModelShape:
    """The full shape of a model from its free dimensions (architecture.md: models, "Shapes")."""
    return architecture(arch).shape(embedding_dim, num_blocks, num_heads, vocab_size, chunk_size)


def count_params(shape: ModelShape, embedding: bool = True) -> int:
    """Number of parameters; embedding and head untied, norms counted. ``embedding=False`` leaves both tables out."""
    entry = architecture(shape.arch)
    block = entry.block_linear_params(shape) + entry.block_other_params(shape)
    tables = 2 * shape.vocab_size * shape.embedding_dim if embedding else 0
    return shape.num_blocks * block + tables + shape.embedding_dim


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
    entry = architecture(shape.arch)
    return Flops(
        linear=2 * T * (shape.num_blocks * entry.block_linear_params(shape) + shape.vocab_size * shape.embedding_dim),
        sequence_mixing=shape.num_blocks * entry.block_mixing_flops(shape, T, convention),
        other=shape.num_blocks * entry.block_other_flops(shape, T),
    )


def training_flops(
    shape: ModelShape, context_length: int, batch_size: int, num_steps: int, convention: str = "paper"
) -> float:
    """FLOPs of a training run: 3 x forward x sequences x steps."""
    return count_flops(shape, context_length, convention).forward_backward * batch_size * num_steps


# inference


def prefill_flops(shape: ModelShape, prefill_length: int, batch_size: int = 1) -> float:
    """FLOPs until the first token: the prompt through all blocks, logits of its last token only."""
    entry = architecture(shape.arch)
    backbone = prefill_length * entry.block_backbone_flops_per_token(shape)
    mixing = entry.block_prefill_mixing_flops(shape, prefill_length)
    return batch_size * (shape.num_blocks * (backbone + mixing) + 2 * shape.embedding_dim * shape.vocab_size)


def step_flops(shape: ModelShape, position: int, batch_size: int = 1) -> float:
    """FLOPs of one generated token after ``position`` tokens."""
    entry = architecture(shape.arch)
    block = entry.block_backbone_flops_per_token(shape) + entry.block_step_mixing_flops(shape, position)
    return batch_size * (shape.num_blocks * block + 2 * shape.embedding_dim * shape.vocab_size)


def weight_bytes(shape: ModelShape, weight: int = BF16_BYTES) -> float:
    """Bytes of the weights that one forward call reads: every block once, the head once."""
    entry = architecture(shape.arch)
    block = entry.block_linear_params(shape) + entry.block_other_params(shape)
    return weight * (shape.num_blocks * block + shape.vocab_size * shape.embedding_dim)


def prefill_bytes(
    shape: ModelShape, prefill_length: int, batch_size: int = 1, weight: int = BF16_BYTES, act: int = BF16_BYTES,
    state: int = FP32_BYTES,
) -> float:  # fmt: skip
    """Bytes moved until the first token."""
    entry = architecture(shape.arch)
    block = prefill_length * entry.block_activation_bytes_per_token(shape, act)
    block += entry.block_prefill_mixing_bytes(shape, prefill_length, act, state)
    head = act * (shape.embedding_dim + shape.vocab_size)
    return weight_bytes(shape, weight) + batch_size * (shape.num_blocks * block + head)


def step_bytes(
    shape: ModelShape, position: int, batch_size: int = 1, weight: int = BF16_BYTES, act: int = BF16_BYTES,
    state: int = FP32_BYTES,
) -> float:  # fmt: skip
    """Bytes moved for one generated token after ``position`` tokens."""
    entry = architecture(shape.arch)
    block = entry.block_activation_bytes_per_token(shape, act)
    block += entry.block_step_mixing_bytes(shape, position, act, state)
    head = act * (shape.embedding_dim + shape.vocab_size)
    return weight_bytes(shape, weight) + batch_size * (shape.num_blocks * block + head)
