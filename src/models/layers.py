"""Blocks that both models share, and their initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_scaling.kernels import get_kernel, select

NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear map with fp32 master weights that computes in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def fast(op: str, x: Tensor) -> Callable:
    """The kernel of ``op`` for the device and dtype of x; what torch.compile can fuse, where it is compiling."""
    if torch.compiler.is_compiling():
        return get_kernel(op, "reference")
    return select(op, x.device.type, double=x.dtype == torch.float64).function


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return fast("rms_norm", x)(x, self.weight, eps=self.eps)

    def add(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + y, and x + y: the residual stream is read once."""
        return fast("rms_norm", x)(y, self.weight, x, self.eps)


class HeadNormGate(nn.Module):
    """σ(gate) ⊙ LayerNorm of each head of (B, T, H, d_v), without bias; a scale per channel of all heads."""

    def __init__(self, num_heads: int, head_dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))

    def forward(self, h: Tensor, gate: Tensor) -> Tensor:
        """h (B, T, H, d_v), gate (B, T, H·d_v) -> (B, T, H·d_v)."""
        return fast("head_norm_gate", h)(h, gate, self.weight, self.eps)


class GatedFeedForward(nn.Module):
    """W_down(silu(W_gate x) ⊙ W_up x); gate and up in one product."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * ffn_dim)
        self.down = Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(fast("gated_silu", x)(self.gate_up(x)))


def small_init_(weight: Tensor, dim: int, generator: torch.Generator | None = None) -> None:
    """Normal with std sqrt(2 / (5 d)) (Nguyen & Salazar, 2019)."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * dim)), generator=generator)


def wang_init_(
    weight: Tensor, dim: int, num_blocks: int, scale: float = 1.0, generator: torch.Generator | None = None
) -> None:
    """Normal with std scale · 2 / n_b / sqrt(d), for projections back into the residual stream (Wang, 2021)."""
    nn.init.normal_(weight, std=scale * 2 / num_blocks / math.sqrt(dim), generator=generator)
