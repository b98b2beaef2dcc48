"""RMS norm with a weight, alone or together with the sum of the residual stream before it (Zhang & Sennrich, 2019).

y = x / sqrt(mean(x²) + eps) · w. With ``residual``, x + residual takes the place of x and is returned beside y: a block
adds what the last layer made to the stream, and norms the stream for the next layer, in one operation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_scaling.kernels.registry import register

EPS = 1e-6


def widened(x: Tensor) -> Tensor:
    """x in fp32, in fp64 where it is; itself where it has that dtype."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError on shapes or dtypes that do not belong together."""
    if x.dim() < 1 or x.shape[-1] < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm takes x (..., d) and weight (d,), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        found = f"{residual.dtype} {tuple(residual.shape)}"
        raise ValueError(f"rms_norm takes a residual like x, {x.dtype} {tuple(x.shape)}, got {found}")


@register("rms_norm", form="reference", backend="torch")
def rms_norm_reference(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = EPS
) -> Tensor | tuple[Tensor, Tensor]:
    """x (..., d), weight (d,), residual like x or None -> y like x; with a residual y, x + residual.

    Statistics in fp32 (fp64 for fp64), y and the sum in the dtype of x. ValueError on shapes that do not fit.
    """
    check_rms_norm(x, weight, residual)
    total = x if residual is None else x + residual
    wide = widened(total)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * scale * weight).to(x.dtype)
    return y if residual is None else (y, total)


class _RMSNorm(torch.autograd.Function):
    """Keeps x (or the sum, which the residual stream keeps anyway) and 1 / rms.

    The backward is torch's native one of LayerNorm with a mean of zero. That subtracts r · mean(g w) as well, which is
    added again: two passes over memory instead of the six that a backward of elementwise operations takes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float):  # noqa: ANN001, ANN205
        ctx.set_materialize_grads(False)
        d = x.shape[-1]
        total = x if residual is None else x + residual
        wide = widened(total)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale.square_().div_(d).add_(eps).rsqrt_()
        y = wide * scale if wide is total else wide.mul_(scale)
        y = y.mul_(weight).to(x.dtype)
        ctx.save_for_backward(total, weight, scale)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_total: Tensor | None = None):  # noqa: ANN001, ANN205
        total, weight, scale = ctx.saved_tensors
        with_residual, d = ctx.needs_input_grad[2], total.shape[-1]
        if grad is None:
            return grad_total, None, grad_total if with_residual else None, None
        wide_grad, scale = widened(grad).reshape(-1, d), scale.view(-1, 1)
        wide_weight = weight.to(wide_grad.dtype)
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            wide_grad, widened(total).reshape(-1, d), (d,), torch.zeros_like(scale), scale, wide_weight, None,
            [True, ctx.needs_input_grad[1], False],
        )  # fmt: skip
        mean = torch.mv(wide_grad, wide_weight).div_(d).mul_(scale[:, 0])  # r · mean(g w), (M,)
        d_x = d_x.add_(mean[:, None]).view(total.shape)
        if grad_total is not None:
            d_x.add_(grad_total)
        d_x = d_x.to(total.dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_x, d_weight, d_x if with_residual else None, None


@register("rms_norm", form="fused", backend="cpu")
def rms_norm_cpu(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = EPS
) -> Tensor | tuple[Tensor, Tensor]:
    """x (..., d), weight (d,), residual like x or None -> y like x; with a residual y, x + residual.

    Statistics in fp32 (fp64 for fp64), y and the sum in the dtype of x. Keeps x or the sum for the backward, and four
    bytes a row. ValueError on shapes that do not fit.
    """
    check_rms_norm(x, weight, residual)
    return _RMSNorm.apply(x, weight, residual, eps)
