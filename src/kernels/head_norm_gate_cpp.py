"""Norm of each head, weight and output gate in C++ for CPUs: one pass forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from xlstm_scaling.kernels.cpp import rows
from xlstm_scaling.kernels.head_norm_gate import check_head_norm_gate, head_norm_gate_cpu
from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.rms_norm import EPS


def _heads(h: Tensor) -> rows.Heads:
    return rows.Heads(*h.shape[1:], *h.stride()[:3])


class _HeadNormGate(torch.autograd.Function):
    """Keeps its inputs and two numbers a head."""

    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = h if h.stride(-1) == 1 else h.contiguous()
        gate, weight = gate.contiguous(), weight.contiguous()
        B, T, H, _ = h.shape
        mean, scale = torch.empty(2, B * T, H).unbind()
        y = torch.empty_like(gate)
        rows.call("head_norm_gate_forward", h, B * T, _heads(h), h, gate, weight, float(eps), y, mean, scale)
        ctx.save_for_backward(h, gate, weight, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        h, gate, weight, mean, scale = ctx.saved_tensors
        M = len(mean)
        d_h, d_gate, d_weight = h.new_empty(h.shape), torch.empty_like(gate), torch.empty_like(weight)
        rows.call(
            "head_norm_gate_backward", h, M, _heads(h), h, gate, weight, mean, scale, grad.contiguous(), d_h, d_gate,
            d_weight, rows.parts(M, len(weight)),
        )  # fmt: skip
        return d_h, d_gate, d_weight, None


@register("head_norm_gate", form="fused", backend="cpp")
def head_norm_gate_cpp(h: Tensor, gate: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """h (B, T, H, d_v), any strides, gate (B, T, H d_v) before its sigmoid, weight (H d_v,) fp32 -> y like gate.

    Everything between reading and writing in fp32. fp32 and bf16; others go to ``head_norm_gate_cpu``. ValueError on
    shapes that do not fit.
    """
    check_head_norm_gate(h, gate, weight)
    if not rows.takes(h, weight):
        return head_norm_gate_cpu(h, gate, weight, eps)
    return _HeadNormGate.apply(h, gate, weight, eps)
