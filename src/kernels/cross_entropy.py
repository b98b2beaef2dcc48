"""Linear head, logit soft cap and cross entropy in one operation that never holds all logits.

The loss is a scalar, so the gradients are computed chunk by chunk in the forward pass and only scaled in the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.kernels.registry import register

#: tokens whose logits are held at once: 256 x 1,024 fp32 logits fit a 1 MiB cache, larger vocabularies get fewer
CHUNK_LOGITS = 256 * 1024
#: exp of a logit below this, times any vocabulary, is finite in fp32
SAFE_CAP = 60.0


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap); unchanged where ``cap`` is None."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@register("linear_cross_entropy", form="reference", backend="torch")
def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Mean loss [nat/token] of hidden (M, d), weight (V, d), targets (M,); materialises the logits."""
    logits = soft_cap(hidden.to(weight.dtype) @ weight.T, cap)
    return F.cross_entropy(logits, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:  # noqa: ANN001
        M, V = hidden.shape[0], weight.shape[0]
        weight_c = weight.to(hidden.dtype)
        need_grad = any(ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if need_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        step = max(1, CHUNK_LOGITS // V)
        for start in range(0, M, step):
            rows, target = hidden[start : start + step], targets[start : start + step, None]
            logits = (rows @ weight_c.T).float()
            if cap is not None:
                # tanh(x) = 2 σ(2x) − 1; torch's vectorised sigmoid is ten times as fast as its tanh on a CPU
                tanh = logits.mul_(2 / cap).sigmoid_().mul_(2).sub_(1)
                logits = tanh * cap
            target_logits = logits.gather(1, target)
            # capped logits cannot overflow exp, so that the softmax needs no maximum
            largest = None if cap is not None and cap <= SAFE_CAP else logits.amax(-1, keepdim=True)
            grad = (logits if largest is None else logits.sub_(largest)).exp_()
            normaliser = grad.sum(-1, keepdim=True)
            log_z = normaliser.log() if largest is None else normaliser.log() + largest
            total += (log_z - target_logits).sum(dtype=torch.float64)
            if not need_grad:
                continue
            grad.div_(normaliser)
            grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand(target.shape[0], 1))
            if cap is not None:
                grad.mul_(tanh.square_().neg_().add_(1))
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight_c, out=d_hidden[start : start + step])
            d_weight += grad.T @ rows
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.scale = 1.0 / M
        return (total / M).float()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN001
        d_hidden, d_weight = ctx.saved_tensors
        scale = grad_output * ctx.scale
        return d_hidden * scale.to(d_hidden.dtype), d_weight * scale, None, None


@register("linear_cross_entropy", form="chunked", backend="torch")
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Mean loss [nat/token]: hidden (M, d) in any float dtype, weight (V, d) fp32, targets (M,) int64 -> scalar fp32.

    Matrix products run in the dtype of ``hidden``; the soft cap, softmax and sums in fp32.
    """
    if not torch.is_grad_enabled():  # autograd would ask for gradients all the same
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, cap)
