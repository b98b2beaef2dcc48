"""Linear head, soft cap and cross entropy for CPUs: products of chunks of tokens, what lies between them in C++.

As in ``cross_entropy``, the gradients are computed in the forward pass and only scaled in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from xlstm_scaling.kernels.cpp import rows
from xlstm_scaling.kernels.cross_entropy import CHUNK_LOGITS, SAFE_CAP, linear_cross_entropy
from xlstm_scaling.kernels.registry import register


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        hidden, targets = hidden.contiguous(), targets.contiguous()
        M, V = hidden.shape[0], weight.shape[0]
        weight_c = weight.to(hidden.dtype)
        graded = any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if graded else None
        d_weight = torch.zeros_like(weight) if graded else None
        losses = torch.empty(M, dtype=torch.float64)
        safe = cap is not None and cap <= SAFE_CAP
        step = max(1, CHUNK_LOGITS // V)
        for start in range(0, M, step):
            part = hidden[start : start + step]
            logits = part @ weight_c.T
            wide = logits.float()
            grad = logits if graded else None
            rows.call(
                "softmax_loss_rows", hidden, len(part), V, wide, targets[start : start + step], float(cap or 0), safe,
                losses[start : start + step], grad,
            )  # fmt: skip
            if graded:
                torch.mm(grad, weight_c, out=d_hidden[start : start + step])
                if hidden.dtype == d_weight.dtype:
                    d_weight.addmm_(grad.T, part)
                else:
                    d_weight += grad.T @ part
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.scale = 1.0 / M
        return (losses.sum() / M).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grad_output * ctx.scale
        return d_hidden * scale.to(d_hidden.dtype), d_weight * scale, None, None


@register("linear_cross_entropy", form="chunked", backend="cpp")
def linear_cross_entropy_cpp(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Mean loss [nat/token]: hidden (M, d), weight (V, d) fp32, targets (M,) int64 -> scalar fp32.

    Products run in the dtype of ``hidden``, fp32 or bf16; the soft cap, softmax and sums in fp32. Others go to
    ``cross_entropy.linear_cross_entropy``.
    """
    if not rows.takes(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, cap)
    if not torch.is_grad_enabled():  # autograd would ask for gradients all the same
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, cap)
