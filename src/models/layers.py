"""Blocks that both models share, and their initialisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear map with fp32 master weights that computes in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class _RMSNormFunction(torch.autograd.Function):
    """y = x / rms(x) · w with fp32 statistics and a hand-written backward (one pass over x each way)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN001
        x32 = x.float() if x.dtype != torch.float64 else x
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True).add_(eps))
        normed = x32 * scale
        ctx.save_for_backward(normed, scale, weight)
        ctx.dtype = x.dtype
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN001
        normed, scale, weight = ctx.saved_tensors
        grad = grad.to(normed.dtype)
        d_weight = (grad * normed).flatten(0, -2).sum(0)
        weighted = grad * weight
        d_x = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * scale
        return d_x.to(ctx.dtype), d_weight, None


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNormFunction.apply(x, self.weight, self.eps)


class MultiHeadLayerNorm(nn.Module):
    """LayerNorm over each head of (B, T, H, d_v), without bias; a scale per channel of all heads."""

    def __init__(self, num_heads: int, head_dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps, self.head_dim = eps, head_dim
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        normed = F.layer_norm(x.to(dtype), (self.head_dim,), eps=self.eps)
        return (normed.flatten(-2) * self.weight).to(x.dtype)


class GatedFeedForward(nn.Module):
    """W_down(silu(W_gate x) ⊙ W_up x); gate and up in one product."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * ffn_dim)
        self.down = Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def small_init_(weight: Tensor, dim: int, generator: torch.Generator | None = None) -> None:
    """Normal with std sqrt(2 / (5 d)) (Nguyen & Salazar, 2019)."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * dim)), generator=generator)


def wang_init_(
    weight: Tensor, dim: int, num_blocks: int, scale: float = 1.0, generator: torch.Generator | None = None
) -> None:
    """Normal with std scale · 2 / n_b / sqrt(d), for projections back into the residual stream (Wang, 2021)."""
    nn.init.normal_(weight, std=scale * 2 / num_blocks / math.sqrt(dim), generator=generator)
