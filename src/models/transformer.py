"""Llama-style Transformer: pre-norm, rotary positions, causal attention without grouped queries, gated feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.models.language_model import Block, LanguageModel, Operation
from xlstm_scaling.models.layers import NORM_EPS, GatedFeedForward, Linear, RMSNorm, small_init_, wang_init_

ROPE_THETA = 500_000.0
RESIDUAL_SCALE = 0.5  # of the wang init


@dataclass
class KVCache:
    """Keys and values of one layer: k, v (B, H, max_length, d); ``length`` tokens are filled."""

    k: Tensor
    v: Tensor
    length: int = 0


def rotary_angles(
    length: int, head_dim: int, theta: float, device: torch.device, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, head_dim) of positions offset … offset + T − 1 in fp32 (Su et al., 2021)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    position = torch.arange(offset, offset + length, dtype=torch.float32, device=device)
    angle = (position[:, None] * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x (B, H, T, d) against each other."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


def document_mask(document_starts: Tensor) -> Tensor | None:
    """(B, 1, T, T) bool, True where a query may see a key: causal and in one document. None if no start is inside."""
    if not bool(document_starts[:, 1:].any()):
        return None
    document = document_starts.long().cumsum(-1)
    T = document.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=document.device).tril()
    return (causal & (document[:, :, None] == document[:, None, :]))[:, None]


class Attention(nn.Module):
    """Causal self-attention through torch's scaled_dot_product_attention."""

    def __init__(self, shape: ModelShape, rope_theta: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.theta = shape.num_heads, shape.head_dim_v, rope_theta
        self.qkv = Linear(shape.embedding_dim, 3 * self.heads * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, shape.embedding_dim)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        offset = 0 if cache is None else cache.length
        cos, sin = rotary_angles(T, self.head_dim, self.theta, x.device, offset)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            if offset + T > cache.k.shape[2]:
                raise ValueError(f"KV cache holds {cache.k.shape[2]} tokens, {offset + T} are needed")
            cache.k[:, :, offset : offset + T], cache.v[:, :, offset : offset + T] = k, v
            cache.length = offset + T
            k, v = cache.k[:, :, : offset + T], cache.v[:, :, : offset + T]
            if offset and T > 1:
                mask = torch.ones(T, offset + T, dtype=torch.bool, device=x.device).tril(offset)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class TransformerBlock(Block):
    """x += attention(norm(x)); x += FFN(norm(x))."""

    @classmethod
    def operations(cls, **options: Any) -> list[Operation]:
        return [("rms_norm", None, "auto"), ("gated_silu", None, "auto")]

    def __init__(self, shape: ModelShape, rope_theta: float = ROPE_THETA, norm_eps: float = NORM_EPS) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.embedding_dim, norm_eps)
        self.attention = Attention(shape, rope_theta)
        self.ffn_norm = RMSNorm(shape.embedding_dim, norm_eps)
        self.ffn = GatedFeedForward(shape.embedding_dim, shape.ffn_dim)

    def forward(
        self, x: Tensor, document_starts: Tensor | None = None, state: KVCache | None = None
    ) -> tuple[Tensor, KVCache | None]:
        mask = None if document_starts is None else document_mask(document_starts)
        x = x + self.attention(self.attention_norm(x), mask, state)
        return x + self.ffn(self.ffn_norm(x)), state

    def init_state(self, batch_size: int, max_length: int, dtype: torch.dtype) -> KVCache:
        attention, device = self.attention, self.attention_norm.weight.device
        size = (batch_size, attention.heads, max_length, attention.head_dim)
        return KVCache(torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device))

    def reset_parameters(self, num_blocks: int, generator: torch.Generator | None) -> None:
        d = self.attention.qkv.in_features
        small_init_(self.attention.qkv.weight, d, generator)
        wang_init_(self.attention.out.weight, d, num_blocks, RESIDUAL_SCALE, generator)
        small_init_(self.ffn.gate_up.weight, d, generator)
        wang_init_(self.ffn.down.weight, d, num_blocks, RESIDUAL_SCALE, generator)


class Transformer(LanguageModel):
    """The Transformer language model; option: ``rope_theta``."""

    block = TransformerBlock
