"""The gated activation of a feed-forward layer: silu(gate) ⊙ up (Shazeer, 2020, SwiGLU)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_scaling.kernels.registry import register

#: for fewer outputs, what Python takes is more than what the copy takes
MIN_NUMBERS = 2**18


def check_gated_silu(gate_up: Tensor) -> None:
    """Raise ValueError unless the last dimension holds two halves."""
    if gate_up.dim() < 1 or gate_up.shape[-1] < 2 or gate_up.shape[-1] % 2:
        raise ValueError(f"gated_silu takes gate and up side by side, (..., 2 F), got {tuple(gate_up.shape)}")


@register("gated_silu", form="reference", backend="torch")
def gated_silu_reference(gate_up: Tensor) -> Tensor:
    """gate_up (..., 2 F), the gate first -> silu(gate) · up (..., F). ValueError on an odd last dimension."""
    check_gated_silu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _GatedSiLU(torch.autograd.Function):
    """Writes both halves of the gradient where they belong, instead of joining them by another copy."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # noqa: ANN001
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(grad, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return d_gate_up


@register("gated_silu", form="fused", backend="cpu")
def gated_silu_cpu(gate_up: Tensor) -> Tensor:
    """gate_up (..., 2 F), the gate first -> silu(gate) · up (..., F), in the dtype of gate_up.

    Keeps gate_up and silu(gate), F numbers a token: computing it again costs more than all else in the backward.
    ValueError on an odd last dimension.
    """
    check_gated_silu(gate_up)
    if gate_up.numel() <= 2 * MIN_NUMBERS:
        return gated_silu_reference(gate_up)  # the same bits
    return _GatedSiLU.apply(gate_up)
