"""The output of an mLSTM layer: LayerNorm over each head, a weight per channel, an output gate (Beck et al., 2025).

y = σ(gate) · (h − mean) / sqrt(var + eps) · w, mean and (biased) variance over the channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.rms_norm import EPS, widened

#: inputs of fewer numbers are left to the reference
MIN_NUMBERS = 2**15
#: narrower heads are left to autograd
MIN_HEAD_DIM = 64


def check_head_norm_gate(h: Tensor, gate: Tensor, weight: Tensor) -> None:
    """Raise ValueError on shapes or dtypes that do not belong together."""
    shape = tuple(h.shape)
    width = shape[2] * shape[3] if len(shape) == 4 else 0
    if width < 1 or gate.shape != (*shape[:2], width) or weight.shape != (width,):
        raise ValueError(
            "head_norm_gate takes h (B, T, H, d_v), gate (B, T, H d_v) and weight (H d_v,), "
            f"got {shape}, {tuple(gate.shape)} and {tuple(weight.shape)}"
        )
    if gate.dtype != h.dtype:
        raise ValueError(f"head_norm_gate takes h and gate of one dtype, got {h.dtype} and {gate.dtype}")


@register("head_norm_gate", form="reference", backend="torch")
def head_norm_gate_reference(h: Tensor, gate: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """h (B, T, H, d_v), gate (B, T, H d_v) before its sigmoid, weight (H d_v,) -> y like gate.

    Statistics in fp32 (fp64 for fp64). ValueError on shapes that do not fit.
    """
    check_head_norm_gate(h, gate, weight)
    normed = F.layer_norm(widened(h), h.shape[-1:], eps=eps)
    return torch.sigmoid(gate) * (normed.flatten(-2) * weight).to(h.dtype)


class _OneHeadNormGate(torch.autograd.Function):
    """Keeps h, σ(gate), y (which the projection behind keeps anyway) and two numbers a token.

    The gate's gradient needs no norm again, d_gate = g y (1 − σ), and the native LayerNorm takes the weight with it.
    """

    @staticmethod
    def forward(ctx, h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN001
        h = h[:, :, 0]
        sigmoid = torch.sigmoid(gate)
        y, mean, scale = torch.native_layer_norm(h, weight.shape, weight, None, eps)
        y.mul_(sigmoid)
        ctx.save_for_backward(h, sigmoid, weight, y, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        h, sigmoid, weight, y, mean, scale = ctx.saved_tensors
        d_gate = grad * y
        d_gate.addcmul_(d_gate, sigmoid, value=-1)
        d_h, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad * sigmoid, h, weight.shape, mean, scale, weight, None, [True, True, False]
        )
        return d_h[:, :, None], d_gate, d_weight, None


@register("head_norm_gate", form="fused", backend="cpu")
def head_norm_gate_cpu(h: Tensor, gate: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """h (B, T, H, d_v), any strides, gate (B, T, H d_v) before its sigmoid, weight (H d_v,) -> y like gate.

    Statistics in fp32 (fp64 for fp64); in bf16 and fp16 each product is rounded. ValueError on shapes that do not fit.
    """
    check_head_norm_gate(h, gate, weight)
    if h.numel() < MIN_NUMBERS:
        return head_norm_gate_reference(h, gate, weight, eps)
    heads, d = h.shape[2:]
    if heads == 1 and d >= MIN_HEAD_DIM and h.dtype == weight.dtype == widened(weight).dtype:
        return _OneHeadNormGate.apply(h, gate, weight, eps)
    # With fp32 weights torch's native norm reads bf16 without widening it and keeps statistics in fp32. The weight of
    # the heads is not that one: its gradient would be summed in bf16, 5 % wrong for 2,048 tokens.
    wide = torch.promote_types(h.dtype, torch.float32)
    ones, zeros = (torch.full((d,), value, dtype=wide, device=h.device) for value in (1.0, 0.0))
    normed = F.layer_norm(h, (d,), ones, zeros, eps).flatten(-2)
    return torch.sigmoid(gate) * (normed * weight.to(h.dtype))
