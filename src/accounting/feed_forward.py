"""What the blocks of all architectures share: the gated feed-forward and the projections around sequence mixing."""

from __future__ import annotations

import math

from xlstm_scaling.accounting.dtypes import FP32_BYTES
from xlstm_scaling.accounting.shapes import ModelShape


def qkv_width(shape: ModelShape) -> int:
    """Columns of queries, keys and values of all heads."""
    return shape.num_heads * (2 * shape.head_dim_qk + shape.head_dim_v)


def feed_forward_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of the feed-forward's parameters, its norm included."""
    d, F = shape.embedding_dim, shape.ffn_dim
    return {"ffn_norm.weight": (d,), "ffn.gate_up.weight": (2 * F, d), "ffn.down.weight": (d, F)}


def feed_forward_kept(shape: ModelShape, tokens: int, act: int) -> dict[str, float]:
    """Bytes by item that every block keeps for its backward pass: its input, its norms', its feed-forward's."""
    d = shape.embedding_dim
    return {
        "block input": act * tokens * d,
        "norms": act * tokens * 3 * d,  # both outputs, and the input of the second
        "feed-forward": act * tokens * 3 * shape.ffn_dim,
    }


def weights_in_compute_dtype(parameters: dict[str, tuple[int, ...]], act: int) -> int:
    """Bytes of the rounded copies of a block's matrices; its gates are computed in fp32."""
    matrices = sum(math.prod(dims) for name, dims in parameters.items() if len(dims) == 2 and "gates" not in name)
    return act * matrices if act < FP32_BYTES else 0
