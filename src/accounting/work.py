"""FLOPs and bytes of inference by the kind of kernel that spends them, as the runtime model prices them.

The parts add up to ``counts.prefill_flops``, ``prefill_bytes``, ``step_flops`` and ``step_bytes``. Lengths and batches
may be numbers or float64 arrays that broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xlstm_scaling.accounting.architecture import BlockCounts
from xlstm_scaling.accounting.counts import parts, sum_blocks, weight_bytes
from xlstm_scaling.accounting.dtypes import BF16_BYTES, FP32_BYTES
from xlstm_scaling.accounting.shapes import ModelShape

LOGITS = ("last", "all")


@dataclass(frozen=True)
class Work:
    """What one forward call does, all sequences of the batch and all blocks together.

    ``linear_flops``: linear layers, head, and the scalar functions around them; ``mixing_flops``: attention or mLSTM
    cell; ``scores``: entries of the score matrix, one for each head, query and key that meet (mLSTM: within a chunk);
    ``weight_bytes``: every weight once; ``activation_bytes``: what linear layers and norms read and write;
    ``state_bytes``: what attention or cell move: q, k, v, output, KV cache, states; ``streams``: parts of the mixing
    that do not wait for each other: the heads of all sequences, each of which reads its keys or chunks one after
    another (in a Transformer's prefill every query of them). [FLOPs, bytes, 1]
    """

    linear_flops: float
    mixing_flops: float
    scores: float
    weight_bytes: float
    activation_bytes: float
    state_bytes: float
    streams: float

    @property
    def flops(self) -> float:
        """FLOPs of all kernels."""
        return self.linear_flops + self.mixing_flops

    @property
    def bytes(self) -> float:
        """Bytes moved by all kernels."""
        return self.weight_bytes + self.activation_bytes + self.state_bytes


def prefill_work(
    shape: ModelShape, prefill_length: float, batch_size: float = 1, weight: int = BF16_BYTES,
    act: int = BF16_BYTES, state: int = FP32_BYTES, logits: str = "last",
) -> Work:  # fmt: skip
    """Work until the first token of ``batch_size`` prompts of ``prefill_length`` tokens.

    ``logits``: of the prompt's ``last`` token, or of ``all``, as some implementations do; then each further token also
    pays for its logits: the product, its result, and the cast to fp32 and soft cap, which pass over it twice.
    """
    if logits not in LOGITS:
        raise ValueError(f"logits must be one of {', '.join(LOGITS)}, not {logits!r}")
    tokens, batch, d, V = prefill_length, batch_size, shape.embedding_dim, shape.vocab_size
    backbone = sum_blocks(shape, lambda kind, one: kind.block_backbone_flops_per_token(one))
    activations = sum_blocks(shape, lambda kind, one: kind.block_activation_bytes_per_token(one, act))
    num_logits = tokens if logits == "all" else 1.0
    cap_bytes = (num_logits - 1.0) * V * (act + 3 * FP32_BYTES)
    return Work(
        linear_flops=batch * (tokens * backbone + num_logits * 2 * d * V),
        mixing_flops=batch * sum_blocks(shape, lambda kind, one: kind.block_prefill_mixing_flops(one, tokens)),
        scores=batch * sum_blocks(shape, lambda kind, one: kind.block_prefill_scores(one, tokens)),
        weight_bytes=weight_bytes(shape, weight),
        activation_bytes=batch * (tokens * activations + num_logits * act * (d + V) + cap_bytes),
        state_bytes=batch
        * sum_blocks(shape, lambda kind, one: kind.block_prefill_mixing_bytes(one, tokens, act, state)),
        streams=batch * _mean_streams(shape, lambda kind, one: kind.prefill_streams(one, tokens)),
    )


def step_work(
    shape: ModelShape, position: float, batch_size: float = 1, weight: int = BF16_BYTES,
    act: int = BF16_BYTES, state: int = FP32_BYTES,
) -> Work:  # fmt: skip
    """Work of one generated token of each of ``batch_size`` sequences after ``position`` tokens."""
    batch, d, V = batch_size, shape.embedding_dim, shape.vocab_size
    backbone = sum_blocks(shape, lambda kind, one: kind.block_backbone_flops_per_token(one))
    activations = sum_blocks(shape, lambda kind, one: kind.block_activation_bytes_per_token(one, act))
    return Work(
        linear_flops=batch * (backbone + 2 * d * V),
        mixing_flops=batch * sum_blocks(shape, lambda kind, one: kind.block_step_mixing_flops(one, position)),
        scores=batch * sum_blocks(shape, lambda kind, one: kind.block_step_scores(one, position)),
        weight_bytes=weight_bytes(shape, weight),
        activation_bytes=batch * (activations + act * (d + V)),
        state_bytes=batch
        * sum_blocks(shape, lambda kind, one: kind.block_step_mixing_bytes(one, position, act, state)),
        streams=batch * _mean_streams(shape, lambda kind, one: one.num_heads),
    )


def _mean_streams(shape: ModelShape, streams: Callable[[BlockCounts, ModelShape], Any]) -> Any:
    """Streams of a block: their harmonic mean over the kinds of block, as it is waits that add up."""
    kinds = parts(shape)
    if len(kinds) == 1:
        return streams(kinds[0].kind, kinds[0].shape)
    return shape.num_blocks / sum_blocks(shape, lambda kind, one: 1.0 / streams(kind, one))
