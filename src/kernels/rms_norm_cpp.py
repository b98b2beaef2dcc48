"""RMS norm with residual in C++ for CPUs: one pass forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from xlstm_scaling.kernels.cpp import rows
from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.rms_norm import EPS, check_rms_norm, rms_norm_cpu


class _RMSNorm(torch.autograd.Function):
    """Keeps x, or the sum that the residual stream keeps anyway, and 1 / rms."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x, d = x.contiguous(), x.shape[-1]
        residual = None if residual is None else residual.contiguous()
        y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
        M = x.numel() // d
        scale = torch.empty(M)
        rows.call("rms_norm_forward", x, M, d, x, residual, weight.contiguous(), float(eps), y, total, scale)
        ctx.save_for_backward(x if total is None else total, weight, scale)
        return y if total is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: Tensor | None, grad_total: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, scale = ctx.saved_tensors
        with_residual, d = ctx.needs_input_grad[2], total.shape[-1]
        if grad is None:
            return grad_total, None, grad_total if with_residual else None, None
        grad_total = None if grad_total is None else grad_total.contiguous()
        d_x, d_weight, M = torch.empty_like(total), torch.empty_like(weight), len(scale)
        rows.call(
            "rms_norm_backward", total, M, d, total, weight.contiguous(), scale, grad.contiguous(), grad_total, d_x,
            d_weight, rows.parts(M, d),
        )  # fmt: skip
        return d_x, d_weight if ctx.needs_input_grad[1] else None, d_x if with_residual else None, None


@register("rms_norm", form="fused", backend="cpp")
def rms_norm_cpp(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = EPS
) -> Tensor | tuple[Tensor, Tensor]:
    """x (..., d), weight (d,) fp32, residual like x or None -> y like x; with a residual y, x + residual.

    Statistics in fp32, y and the sum in the dtype of x. fp32 and bf16; others go to ``rms_norm_cpu``. ValueError on
    shapes that do not fit.
    """
    check_rms_norm(x, weight, residual)
    if not rows.takes(x, weight):
        return rms_norm_cpu(x, weight, residual, eps)
    return _RMSNorm.apply(x, weight, residual, eps)
