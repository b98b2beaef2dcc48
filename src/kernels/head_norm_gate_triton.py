"""The output of an mLSTM layer, LayerNorm over each head, weight and output gate, for GPUs.

One pass over memory each way, with h in any order of its axes: heads are read where the cell has left them. Backward
keeps h, gate and weight; programs stay with one head for many tokens and sum the weight's gradient on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_scaling.kernels.head_norm_gate import check_head_norm_gate
from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.rms_norm import EPS
from xlstm_scaling.kernels.rms_norm_triton import as_rows, check_tensors, register_limit, resident_programs, row_tiles
from xlstm_scaling.kernels.triton_launch import configuration, launch
from xlstm_scaling.kernels.triton_math import cast

#: what tuning tries first, as steps from the default; as those of the RMS norm
CANDIDATES = {
    "head_norm_gate_forward_kernel": ({"ROWS": -1, "num_warps": -1}, {"ROWS": 1, "num_warps": 1}),
    "head_norm_gate_backward_kernel": (
        {"ROWS": -1, "num_warps": -1, "PER_PROCESSOR": 1},
        {"ROWS": 1, "num_warps": 1, "PER_PROCESSOR": -1},
    ),
}


@triton.jit
def head_norm_gate_forward_kernel(  # noqa: ANN201
    h,  # noqa: ANN001
    gate,  # noqa: ANN001
    weight,  # noqa: ANN001
    y,  # noqa: ANN001
    tokens,  # noqa: ANN001
    T,  # noqa: ANN001
    stride_b,  # noqa: ANN001
    stride_t,  # noqa: ANN001
    stride_h,  # noqa: ANN001
    stride_gate,  # noqa: ANN001
    eps,  # noqa: ANN001
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens of one head of y (B T, H WIDTH), which is contiguous. Grid: blocks of tokens, heads."""
    head = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    sequence, time = (token // T).to(tl.int64), (token % T).to(tl.int64)  # divided while in 32 bits
    token = token.to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < WIDTH)
    h += head.to(tl.int64) * stride_h
    value = tl.load(h + sequence * stride_b + time * stride_t + column, inside, 0.0).to(tl.float32)
    channel = head * WIDTH + column
    g = tl.load(gate + token * stride_gate + channel, inside, 0.0).to(tl.float32)
    w = tl.load(weight + channel, column < WIDTH, 0.0).to(tl.float32)
    centred = tl.where(column < WIDTH, value - (tl.sum(value, 1) / WIDTH)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)[:, None]
    out = centred * scale * w * tl.sigmoid(g)
    width = tl.num_programs(1) * WIDTH
    tl.store(y + token * width + channel, cast(out, y.dtype.element_ty), inside)


@triton.jit
def head_norm_gate_backward_kernel(  # noqa: ANN201
    h,  # noqa: ANN001
    gate,  # noqa: ANN001
    weight,  # noqa: ANN001
    grad,  # noqa: ANN001
    d_h,  # noqa: ANN001
    d_gate,  # noqa: ANN001
    d_weight,  # noqa: ANN001
    tokens,  # noqa: ANN001
    T,  # noqa: ANN001
    stride_b,  # noqa: ANN001
    stride_t,  # noqa: ANN001
    stride_h,  # noqa: ANN001
    stride_gate,  # noqa: ANN001
    stride_grad,  # noqa: ANN001
    stride_db,  # noqa: ANN001
    stride_dt,  # noqa: ANN001
    stride_dh,  # noqa: ANN001
    eps,  # noqa: ANN001
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With x̂ = r (h − mean), u = g σ: d_gate = u x̂ w (1 − σ), d_h = r (u w − mean(u w) − x̂ mean(u w x̂)).

    d_weight (programs, H WIDTH): this program's share of Σ u x̂. Grid: programs that stay, heads.
    """
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)[None, :]
    channel = head * WIDTH + column
    width = tl.num_programs(1) * WIDTH
    h += head.to(tl.int64) * stride_h
    d_h += head.to(tl.int64) * stride_dh
    share = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        token = block * ROWS + tl.arange(0, ROWS)[:, None]
        sequence, time = (token // T).to(tl.int64), (token % T).to(tl.int64)  # divided while in 32 bits
        token = token.to(tl.int64)
        inside = (token < tokens) & (column < WIDTH)
        value = tl.load(h + sequence * stride_b + time * stride_t + column, inside, 0.0).to(tl.float32)
        u = tl.load(grad + token * stride_grad + channel, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(tl.load(gate + token * stride_gate + channel, inside, 0.0).to(tl.float32))
        normed = tl.where(column < WIDTH, value - (tl.sum(value, 1) / WIDTH)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(normed * normed, 1) / WIDTH + eps)[:, None]
        normed *= scale
        u *= sigmoid  # 0 outside
        share += u * normed
        u *= tl.load(weight + channel, column < WIDTH, 0.0).to(tl.float32)  # again and again, to save its registers
        by_gate = u * normed * (1.0 - sigmoid)
        tl.store(d_gate + token * width + channel, cast(by_gate, d_gate.dtype.element_ty), inside)
        mean = (tl.sum(u, 1) / WIDTH)[:, None]
        along = (tl.sum(u * normed, 1) / WIDTH)[:, None]
        by_h = (u - mean - normed * along) * scale
        tl.store(d_h + sequence * stride_db + time * stride_dt + column, cast(by_h, d_h.dtype.element_ty), inside)
    column = tl.arange(0, BLOCK)
    d_weight += tl.program_id(0) * width + head * WIDTH + column
    tl.store(d_weight, tl.sum(share, 0), column < WIDTH)


class _HeadNormGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN001
        ctx.eps = eps
        ctx.save_for_backward(h, gate, weight)
        B, T, H, d = h.shape
        gates = as_rows(gate)
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        tiles = configuration("head_norm_gate_forward_kernel", row_tiles("head_norm_gate", d), h.dtype, d=d)
        if B * T:
            launch(
                head_norm_gate_forward_kernel,
                (triton.cdiv(B * T, tiles["ROWS"]), H),
                h=h,
                gate=gates,
                weight=weight,
                y=y,
                tokens=B * T,
                T=T,
                stride_b=h.stride(0),
                stride_t=h.stride(1),
                stride_h=h.stride(2),
                stride_gate=gates.stride(0),
                eps=eps,
                WIDTH=d,
                BLOCK=triton.next_power_of_2(d),
                **tiles,
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        h, gate, weight = ctx.saved_tensors
        B, T, H, d = h.shape
        gates, grads = as_rows(gate), as_rows(grad)
        d_h = torch.empty_like(h)  # in the order of h, so that the cell's backward gets what the cell made
        d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        default = row_tiles("head_norm_gate", d, backward=True)
        tiles = configuration("head_norm_gate_backward_kernel", default, h.dtype, d=d)
        per_processor = triton.cdiv(tiles.pop("PER_PROCESSOR"), H)
        programs = resident_programs(h, triton.cdiv(B * T, tiles["ROWS"]), per_processor)
        d_weight = torch.empty(programs, H * d, dtype=torch.float32, device=h.device)
        launch(
            head_norm_gate_backward_kernel,
            (programs, H),
            h=h,
            gate=gates,
            weight=weight,
            grad=grads,
            d_h=d_h,
            d_gate=d_gate,
            d_weight=d_weight,
            tokens=B * T,
            T=T,
            stride_b=h.stride(0),
            stride_t=h.stride(1),
            stride_h=h.stride(2),
            stride_gate=gates.stride(0),
            stride_grad=grads.stride(0),
            stride_db=d_h.stride(0),
            stride_dt=d_h.stride(1),
            stride_dh=d_h.stride(2),
            eps=ctx.eps,
            WIDTH=d,
            BLOCK=triton.next_power_of_2(d),
            **tiles,
            **register_limit(),
        )
        return d_h, d_gate, d_weight.sum(0).to(weight.dtype), None


@register("head_norm_gate", form="fused", backend="triton")
def head_norm_gate_triton(h: Tensor, gate: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """y = σ(gate) · (h − mean) / sqrt(var + eps) · w, mean and variance over the channels of a head.

    Statistics in fp32, one rounding. The backward keeps h, gate and weight. Deterministic on a device: no atomic
    operations.

    Args:
        h: (B, T, H, d_v), fp32, bf16 or fp16, d_v up to 8,192; any strides, such as those of a transposed
            (B, H, T, d_v), are read in place if those of d_v are 1.
        gate: (B, T, H d_v) before its sigmoid, in the dtype of h.
        weight: (H d_v,), fp32 or any of those.

    Returns:
        (B, T, H d_v), contiguous, in the dtype of h. The gradient of h has the strides of h.

    Raises:
        ValueError: shapes, dtypes (fp64 among them) or devices that do not fit, an eps of 0.
    """
    check_head_norm_gate(h, gate, weight)
    check_tensors("head_norm_gate", h, gate, weight, eps=eps)
    if h.stride(3) != 1:
        h = h.contiguous()
    return _HeadNormGate.apply(h, gate, weight.contiguous(), eps)
