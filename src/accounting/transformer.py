"""Accounting of the Llama-style Transformer (no grouped queries)."""

from __future__ import annotations

import math

from xlstm_scaling.accounting.architecture import UniformArchitecture
from xlstm_scaling.accounting.dtypes import FP32_BYTES
from xlstm_scaling.accounting.feed_forward import (
    feed_forward_kept,
    feed_forward_parameters,
    qkv_width,
    weights_in_compute_dtype,
)
from xlstm_scaling.accounting.layout import Layout
from xlstm_scaling.accounting.shapes import ModelShape, ceil_to_multiple, require_divisible

SOFTMAX_FACTOR = 2.5  # 5 FLOPs an entry of the score matrix, half of which is causal
#: share of the score matrix that a causal prefill kernel computes (runtime model)
CAUSAL_PREFILL_FACTOR = 0.65


class Transformer(UniformArchitecture):
    """Blocks of causal attention with rotary positions, and a gated feed-forward."""

    name, label = "transformer", "Transformer"
    attends = True

    def shape(
        self, embedding_dim: int, num_blocks: int, num_heads: int, vocab_size: int, chunk_size: int = 64
    ) -> ModelShape:
        head_dim = require_divisible(self.name, "embedding_dim", embedding_dim, num_heads, "num_heads")
        return ModelShape(
            arch=self.name,
            embedding_dim=embedding_dim,
            num_blocks=num_blocks,
            num_heads=num_heads,
            head_dim_qk=head_dim,
            head_dim_v=head_dim,
            ffn_dim=ceil_to_multiple(math.floor(8 * embedding_dim / 3), 64),
            vocab_size=vocab_size,
        )

    def block_linear_params(self, shape: ModelShape) -> int:
        d, heads = shape.embedding_dim, shape.num_heads
        return d * qkv_width(shape) + heads * shape.head_dim_v * d + 3 * d * shape.ffn_dim

    def block_other_params(self, shape: ModelShape) -> int:
        return 2 * shape.embedding_dim  # the two norms

    def block_parameters(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        d = shape.embedding_dim
        return {
            "attention_norm.weight": (d,),
            "attention.qkv.weight": (qkv_width(shape), d),
            "attention.out.weight": (d, shape.num_heads * shape.head_dim_v),
            **feed_forward_parameters(shape),
        }

    def kept_activations(self, shape: ModelShape, context_length: int, layout: Layout) -> dict[str, float]:
        a, B, T, H = layout.activation_bytes, layout.micro_batch_sequences, context_length, shape.num_heads
        M = B * T
        rotary = (4 if a < FP32_BYTES else 2) * a * T * shape.head_dim_v  # cos and sin; rounded for q and for k
        # q, k and v as projected, which v keeps; q and k rotated; the output
        attention = qkv_width(shape) + 2 * H * shape.head_dim_qk + H * shape.head_dim_v
        return feed_forward_kept(shape, M, a) | {
            "weights in bf16": weights_in_compute_dtype(self.block_parameters(shape), a),
            "attention": a * M * attention + rotary,
            "log-sum-exp": FP32_BYTES * M * H,
            "attention mask": a * B * T**2 if layout.documents else 0,
        }

    def backward_bytes(self, shape: ModelShape, context_length: int, layout: Layout) -> float:
        a, M, d = layout.activation_bytes, layout.micro_batch_sequences * context_length, shape.embedding_dim
        mixing = a * M * (qkv_width(shape) + 2 * shape.num_heads * shape.head_dim_v + 2 * d)
        return max(a * M * (3 * shape.ffn_dim + 2 * d), mixing)

    def block_mixing_flops(self, shape: ModelShape, context_length: int, convention: str) -> float:
        pairs = context_length**2 * shape.num_heads
        if convention == "chinchilla":  # every pair of positions, causal or not
            return pairs * (2 * shape.head_dim_qk + 3 + 2 * shape.head_dim_v)
        return pairs * shape.head_dim_qk + 5 * pairs / 2 + pairs * shape.head_dim_v

    def block_other_flops(self, shape: ModelShape, context_length: int) -> float:
        return 2 * context_length * shape.ffn_dim

    def block_backbone_flops_per_token(self, shape: ModelShape) -> float:
        d, heads = shape.embedding_dim, shape.num_heads
        attention = 2 * d * qkv_width(shape) + 2 * d * heads * shape.head_dim_v
        return 4 * d + attention + 4 * d + 6 * d * shape.ffn_dim + 2 * shape.ffn_dim

    def _pair_flops(self, shape: ModelShape) -> float:
        return 2 * shape.num_heads * (shape.head_dim_qk + shape.head_dim_v + SOFTMAX_FACTOR)

    def block_prefill_mixing_flops(self, shape: ModelShape, prefill_length: int) -> float:
        return CAUSAL_PREFILL_FACTOR * prefill_length**2 * self._pair_flops(shape)

    def block_step_mixing_flops(self, shape: ModelShape, position: int) -> float:
        return (position + 1) * self._pair_flops(shape)  # step by step: causal factor 1

    def block_prefill_mixing_bytes(self, shape: ModelShape, prefill_length: int, act: int, state: int) -> float:
        per_token = shape.num_heads * (2 * shape.head_dim_qk + 2 * shape.head_dim_v)  # q, k, v in, h out
        cache = shape.num_heads * (shape.head_dim_qk + shape.head_dim_v)
        return act * prefill_length * (per_token + cache)

    def block_step_mixing_bytes(self, shape: ModelShape, position: int, act: int, state: int) -> float:
        cache = shape.num_heads * (shape.head_dim_qk + shape.head_dim_v)
        return act * cache * (1 + position + 1)  # write this token, read all so far

    def block_activation_bytes_per_token(self, shape: ModelShape, act: int) -> float:
        d, v = shape.embedding_dim, shape.num_heads * shape.head_dim_v
        linear = (d + qkv_width(shape)) + (v + d) + (d + 2 * shape.ffn_dim) + (shape.ffn_dim + d)
        return act * (linear + 2 * d)  # + each norm reads its input once

    def block_prefill_scores(self, shape: ModelShape, prefill_length: int) -> float:
        return CAUSAL_PREFILL_FACTOR * prefill_length**2 * shape.num_heads

    def block_step_scores(self, shape: ModelShape, position: int) -> float:
        return (position + 1) * shape.num_heads

    def prefill_streams(self, shape: ModelShape, prefill_length: int) -> float:
        return shape.num_heads * prefill_length  # every query on its own

    def block_state_bytes(self, shape: ModelShape, tokens: int, act: int) -> float:
        return act * shape.num_heads * (shape.head_dim_qk + shape.head_dim_v) * tokens

    def block_inference_bytes_per_token(self, shape: ModelShape, act: int) -> int:
        # q, k, v; q and k rotated, two halves in between; the output, as heads and in one row
        heads = shape.num_heads * (4 * shape.head_dim_qk + 2 * shape.head_dim_v)
        return act * (qkv_width(shape) + heads) + 2 * FP32_BYTES * shape.head_dim_qk
