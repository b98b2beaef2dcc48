"""Accounting of the xLSTM (mLSTM blocks only)."""

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
from xlstm_scaling.accounting.layout import GATE_NUMBERS, Layout
from xlstm_scaling.accounting.shapes import ModelShape, ceil_to_multiple, require_divisible

#: share of the intra-chunk work that a two-level tiled kernel does where the chunk is longer than one tile
TFLA_CAUSAL_FACTOR = 0.75
TFLA_TILE = 64


def _ratio(numerator: int, denominator: int) -> float:
    """Exact integer where it divides."""
    return numerator // denominator if numerator % denominator == 0 else numerator / denominator


def cell_flops_chunkwise(chunk: int, d_qk: int, d_v: int) -> int:
    """Forward FLOPs of one head over one chunk of L tokens, the paper's convention.

    Inter-chunk recurrence plus intra-chunk parallel part; each scalar function counts 1.
    """
    L = chunk
    recurrent = (
        L * (L + 1) // 2 + 2 * L + 5 + 5 * L + 2 * d_qk * d_v + 4 * L * d_qk * d_v + 3 * L * d_qk + 2 * d_qk
        + 4 * L * d_qk
    )  # fmt: skip
    parallel = (
        L * (L + 1) // 2 + 6 * L**2 + 2 * L + 2 * L**2 * d_qk + 2 * L**2 + 2 * L**2 * d_v + 2 * L**2 + 7 * L
        + 2 * L * d_v
    )  # fmt: skip
    return recurrent + parallel


def cell_flops_tfla(chunk: int, d_qk: int, d_v: int) -> float:
    """Forward FLOPs of one head over one chunk as a two-level tiled kernel (TFLA) computes it."""
    L = chunk
    recurrent = (
        2 * L + L * (L + 1) // 2 + 4 * L + 5 + 2 * d_qk * d_v + 2 * L * d_qk * d_v + L * d_qk + 2 * d_qk
        + 2 * L * d_qk
    )  # fmt: skip
    causal = TFLA_CAUSAL_FACTOR if L > TFLA_TILE else 1
    intra = causal * (5 * L**2 + 2 * L + 2 * L**2 * (d_qk + d_v) + 3 * L**2) + L * (L + 1) // 2 + 2 * L
    inter = 2 * L * d_qk * d_v + 3 * L * d_qk
    combination = 2 * L * d_v + 4 * L
    return recurrent + intra + inter + combination


class XLSTM(UniformArchitecture):
    """Blocks of an mLSTM with q and k of half the width of v, and a gated feed-forward."""

    name, label = "xlstm", "xLSTM"
    attends = False

    def shape(
        self, embedding_dim: int, num_blocks: int, num_heads: int, vocab_size: int, chunk_size: int = 64
    ) -> ModelShape:
        head_dim_v = require_divisible(self.name, "embedding_dim", embedding_dim, num_heads, "num_heads")
        return ModelShape(
            arch=self.name,
            embedding_dim=embedding_dim,
            num_blocks=num_blocks,
            num_heads=num_heads,
            head_dim_qk=require_divisible(self.name, "head_dim_v", head_dim_v, 2, "1 / qk_dim_factor"),
            head_dim_v=head_dim_v,
            ffn_dim=ceil_to_multiple(math.ceil(2.667 * embedding_dim), 64),
            vocab_size=vocab_size,
            chunk_size=chunk_size,
        )

    def block_linear_params(self, shape: ModelShape) -> int:
        d, heads = shape.embedding_dim, shape.num_heads
        qkv = d * qkv_width(shape)
        gates = 2 * d * heads  # input and forget gate, one scalar a head
        output_gate_and_projection = 2 * d * heads * shape.head_dim_v
        return qkv + gates + output_gate_and_projection + 3 * d * shape.ffn_dim

    def block_other_params(self, shape: ModelShape) -> int:
        # gate biases; pre-norm and multi-head norm; norm of the feed-forward
        return 2 * shape.num_heads + 2 * shape.embedding_dim + shape.embedding_dim

    def block_parameters(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        d, H, v = shape.embedding_dim, shape.num_heads, shape.num_heads * shape.head_dim_v
        return {
            "mlstm_norm.weight": (d,),
            "mlstm.qkv.weight": (qkv_width(shape), d),
            "mlstm.output_gate.weight": (v, d),
            "mlstm.gates.weight": (2 * H, d),
            "mlstm.gates.bias": (2 * H,),
            "mlstm.norm.weight": (v,),
            "mlstm.out.weight": (d, v),
            **feed_forward_parameters(shape),
        }

    def kept_activations(self, shape: ModelShape, context_length: int, layout: Layout) -> dict[str, float]:
        a, B, H = layout.activation_bytes, layout.micro_batch_sequences, shape.num_heads
        M, v = B * context_length, H * shape.head_dim_v
        L = layout.chunk_tokens or gpu_chunk_tokens(shape)
        state = (layout.state_bytes or a) * shape.head_dim_qk * shape.head_dim_v + FP32_BYTES * shape.head_dim_qk
        gates_input = FP32_BYTES * M * shape.embedding_dim if a < FP32_BYTES else 0
        return feed_forward_kept(shape, M, a) | {
            "weights in bf16": weights_in_compute_dtype(self.block_parameters(shape), a),
            "mLSTM": a * M * (qkv_width(shape) + 3 * v),  # q, k, v; h, output gate, gated output
            "gates": gates_input + FP32_BYTES * M * H * GATE_NUMBERS,
            "mLSTM states": B * H * (-(-context_length // L) + 1) * state,
        }

    def backward_bytes(self, shape: ModelShape, context_length: int, layout: Layout) -> float:
        a, M, d = layout.activation_bytes, layout.micro_batch_sequences * context_length, shape.embedding_dim
        mixing = a * M * (qkv_width(shape) + 2 * shape.num_heads * shape.head_dim_v + 2 * d)
        # gradients of the states, and of the gates' input
        mixing += self.kept_activations(shape, context_length, layout)["mLSTM states"]
        mixing += FP32_BYTES * M * d if a < FP32_BYTES else 0
        return max(a * M * (3 * shape.ffn_dim + 2 * d), mixing)

    def block_mixing_flops(self, shape: ModelShape, context_length: int, convention: str) -> float:
        cell = cell_flops_tfla if convention == "tfla" else cell_flops_chunkwise
        per_chunk = cell(shape.chunk_size, shape.head_dim_qk, shape.head_dim_v)
        total = shape.num_heads * context_length * per_chunk
        return _ratio(total, shape.chunk_size) if isinstance(total, int) else total / shape.chunk_size

    def block_other_flops(self, shape: ModelShape, context_length: int) -> float:
        return context_length * shape.num_heads * shape.head_dim_v + 2 * context_length * shape.ffn_dim

    def block_backbone_flops_per_token(self, shape: ModelShape) -> float:
        d, heads, d_v = shape.embedding_dim, shape.num_heads, shape.head_dim_v
        return (
            4 * d  # norm and skip
            + 2 * d * qkv_width(shape)
            + 2 * d * heads
            + 2 * heads
            + 2 * d * heads * d_v
            + heads * d_v
            + 3 * heads * d_v
            + 2 * d * heads * d_v
            + 4 * d  # norm and skip
            + 6 * d * shape.ffn_dim
            + 2 * shape.ffn_dim
        )

    def block_prefill_mixing_flops(self, shape: ModelShape, prefill_length: int) -> float:
        chunks = -(-prefill_length // shape.chunk_size)
        return shape.num_heads * chunks * cell_flops_tfla(shape.chunk_size, shape.head_dim_qk, shape.head_dim_v)

    def block_step_mixing_flops(self, shape: ModelShape, position: int) -> float:
        d_qk, d_v = shape.head_dim_qk, shape.head_dim_v
        return shape.num_heads * (9 + 4 * d_qk * d_v + 6 * d_qk + d_v + 3 + 2 * d_qk * d_v + d_qk)

    def _state_scalars(self, shape: ModelShape) -> int:
        return shape.head_dim_qk * shape.head_dim_v + shape.head_dim_qk + 1  # C, n, m of a head

    def block_prefill_mixing_bytes(self, shape: ModelShape, prefill_length: int, act: int, state: int) -> float:
        L, d_qk, d_v = shape.chunk_size, shape.head_dim_qk, shape.head_dim_v
        states = self._state_scalars(shape)
        recurrent = act * (L * (d_qk + d_v) + 2 * L) + state * states
        parallel = act * (L * (2 * d_qk + d_v) + 2 * L) + state * states + act * L * d_v + state * 2 * L
        return shape.num_heads * -(-prefill_length // L) * (recurrent + parallel)

    def block_step_mixing_bytes(self, shape: ModelShape, position: int, act: int, state: int) -> float:
        d_qk, d_v = shape.head_dim_qk, shape.head_dim_v
        activations = (2 * d_qk + d_v + 2) + d_v
        return shape.num_heads * (act * activations + state * 2 * self._state_scalars(shape))

    def block_activation_bytes_per_token(self, shape: ModelShape, act: int) -> float:
        d, heads, v = shape.embedding_dim, shape.num_heads, shape.num_heads * shape.head_dim_v
        qkv_and_gates = qkv_width(shape) + v + 2 * heads
        linear = (d + qkv_and_gates) + (v + d) + (d + 2 * shape.ffn_dim) + (shape.ffn_dim + d)
        return act * (linear + 2 * d + v)  # + pre-norm, norm of the feed-forward, multi-head norm

    def block_prefill_scores(self, shape: ModelShape, prefill_length: int) -> float:
        return 0.0 * prefill_length  # no softmax: the gates of a chunk are among its FLOPs

    def block_step_scores(self, shape: ModelShape, position: int) -> float:
        return 0.0 * position  # the past is in the state

    def prefill_streams(self, shape: ModelShape, prefill_length: int) -> float:
        return shape.num_heads + 0.0 * prefill_length  # a head's chunks come one after another

    def block_state_bytes(self, shape: ModelShape, tokens: int, act: int) -> float:
        return FP32_BYTES * shape.num_heads * self._state_scalars(shape) + 0 * tokens

    def block_inference_bytes_per_token(self, shape: ModelShape, act: int) -> int:
        v = shape.num_heads * shape.head_dim_v
        gates = FP32_BYTES * shape.num_heads * GATE_NUMBERS
        gates += FP32_BYTES * shape.embedding_dim if act < FP32_BYTES else 0  # their input
        return act * (qkv_width(shape) + 3 * v) + gates  # q, k, v; h, its norm, the output gate


def gpu_chunk_tokens(shape: ModelShape) -> int:
    """Tokens between two states that the Triton kernels keep (kernels/mlstm/chunkwise_triton.py), unless tuned."""
    return 256 if shape.head_dim_qk * shape.head_dim_v >= 128 * 128 else 128
