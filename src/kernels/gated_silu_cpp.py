"""Gated SiLU in C++ for CPUs: one pass forward, one backward, nothing kept but the input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from xlstm_scaling.kernels.cpp import rows
from xlstm_scaling.kernels.gated_silu import check_gated_silu, gated_silu_cpu
from xlstm_scaling.kernels.registry import register


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        rows.call("gated_silu_forward", y, y.numel() // width, width, gate_up, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        width = grad.shape[-1]
        d_gate_up = torch.empty_like(gate_up)
        rows.call("gated_silu_backward", grad, grad.numel() // width, width, gate_up, grad.contiguous(), d_gate_up)
        return d_gate_up


@register("gated_silu", form="fused", backend="cpp")
def gated_silu_cpp(gate_up: Tensor) -> Tensor:
    """gate_up (..., 2 F), the gate first -> silu(gate) · up (..., F), in the dtype of gate_up; computed in fp32.

    fp32 and bf16; others go to ``gated_silu_cpu``. ValueError on an odd last dimension.
    """
    check_gated_silu(gate_up)
    return _GatedSiLU.apply(gate_up) if rows.takes(gate_up) else gated_silu_cpu(gate_up)
