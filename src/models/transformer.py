"""Llama-style Transformer: pre-norm, rotary positions, causal attention without grouped queries, gated feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.kernels.rotary_attention import rotate
from xlstm_scaling.models.language_model import Block, LanguageModel, Operation
from xlstm_scaling.models.layers import NORM_EPS, GatedFeedForward, Linear, RMSNorm, fast, small_init_, wang_init_

ROPE_THETA = 500_000.0
RESIDUAL_SCALE = 0.5  # of the wang init


@dataclass
class KVCache:
    """Keys and values of one layer: k, v (B, H, max_length, d); ``length`` tokens are filled.

    ``padding`` (B,) int64: slots before the first token of every sequence, in a batch of unequal lengths; never read.
    """

    k: Tensor
    v: Tensor
    length: int = 0
    padding: Tensor | None = None

    def positions(self) -> int | Tensor:
        """Of the next token: one for all sequences, or (B,)."""
        return self.length if self.padding is None else self.length - self.padding


def rotary_angles(
    length: int, head_dim: int, theta: float, device: torch.device, offset: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, head_dim) of positions offset … offset + T − 1 in fp32 (Su et al., 2021).

    An offset (B,) for every sequence gives (B, 1, T, head_dim).
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if isinstance(offset, Tensor):
        position = (offset[:, None] + torch.arange(length, device=device)).float()[:, None]
        angle = (position[..., None] * frequency).repeat(1, 1, 1, 2)
    else:
        position = torch.arange(offset, offset + length, dtype=torch.float32, device=device)
        angle = (position[:, None] * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, shape: ModelShape, rope_theta: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.theta = shape.num_heads, shape.head_dim_v, rope_theta
        self.qkv = Linear(shape.embedding_dim, 3 * self.heads * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, shape.embedding_dim)

    def forward(self, x: Tensor, document_starts: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, self.head_dim)
        cos, sin = rotary_angles(T, self.head_dim, self.theta, x.device, 0 if cache is None else cache.positions())
        if cache is None:
            return self.out(fast("rotary_attention", x)(qkv, cos, sin, document_starts))
        if document_starts is not None:
            raise ValueError("a cache holds one document a sequence: no document_starts with it")
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = self.cached(rotate(q, cos, sin), rotate(k, cos, sin), v, cache)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """q, k, v (B, H, T, d), rotated -> (B, H, T, d); keys and values are appended to the cache."""
        T, offset = q.shape[2], cache.length
        if offset + T > cache.k.shape[2]:
            raise ValueError(f"KV cache holds {cache.k.shape[2]} tokens, {offset + T} are needed")
        cache.k[:, :, offset : offset + T], cache.v[:, :, offset : offset + T] = k, v
        cache.length = offset + T
        k, v = cache.k[:, :, : offset + T], cache.v[:, :, : offset + T]
        mask = torch.ones(T, offset + T, dtype=torch.bool, device=q.device).tril(offset) if offset and T > 1 else None
        if cache.padding is not None:
            filled = torch.arange(offset + T, device=q.device) >= cache.padding[:, None, None, None]
            mask = filled if mask is None else filled & mask  # (B, 1, 1 or T, offset + T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)


class TransformerBlock(Block):
    """x += attention(norm(x)); x += FFN(norm(x))."""

    @classmethod
    def operations(cls, **options: Any) -> list[Operation]:
        return [(op, None, "auto") for op in ("rms_norm", "rotary_attention", "gated_silu")]

    def __init__(self, shape: ModelShape, rope_theta: float = ROPE_THETA, norm_eps: float = NORM_EPS) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.embedding_dim, norm_eps)
        self.attention = Attention(shape, rope_theta)
        self.ffn_norm = RMSNorm(shape.embedding_dim, norm_eps)
        self.ffn = GatedFeedForward(shape.embedding_dim, shape.ffn_dim)

    def forward(
        self, x: Tensor, document_starts: Tensor | None = None, state: KVCache | None = None
    ) -> tuple[Tensor, KVCache | None]:
        normed, x = self.ffn_norm.add(self.attention(self.attention_norm(x), document_starts, state), x)
        return x + self.ffn(normed), state

    def init_state(self, batch_size: int, max_length: int, dtype: torch.dtype) -> KVCache:
        attention, device = self.attention, self.attention_norm.weight.device
        size = (batch_size, attention.heads, max_length, attention.head_dim)
        return KVCache(torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device))

    def take_rows(self, state: KVCache, rows: slice, padding: int) -> KVCache:
        return KVCache(state.k[rows, :, padding:], state.v[rows, :, padding:])  # views: filled in place

    def put_rows(self, state: KVCache, rows: slice, part: KVCache, padding: int) -> None:
        if state.padding is None:
            state.padding = torch.zeros(len(state.k), dtype=torch.int64, device=state.k.device)
        state.padding[rows] = padding
        state.length = part.length + padding

    def reset_parameters(self, num_blocks: int, generator: torch.Generator | None) -> None:
        d = self.attention.qkv.in_features
        small_init_(self.attention.qkv.weight, d, generator)
        wang_init_(self.attention.out.weight, d, num_blocks, RESIDUAL_SCALE, generator)
        small_init_(self.ffn.gate_up.weight, d, generator)
        wang_init_(self.ffn.down.weight, d, num_blocks, RESIDUAL_SCALE, generator)


class Transformer(LanguageModel):
    """The Transformer language model; option: ``rope_theta``."""

    kinds: ClassVar = {"transformer": TransformerBlock}
