"""The gated activation of a feed-forward layer, silu(gate) ⊙ up, for GPUs: one pass over memory each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_scaling.kernels.gated_silu import check_gated_silu
from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.rms_norm_triton import as_rows, check_tensors
from xlstm_scaling.kernels.triton_launch import configuration, launch
from xlstm_scaling.kernels.triton_math import cast

#: elements that a program handles
TILE = 1024
#: what tuning tries first, as steps from the default: other programs at the same elements a thread, or longer rows
CANDIDATES = {
    kernel: ({"ROWS": -1, "num_warps": -1}, {"ROWS": 1, "num_warps": 1}, {"ROWS": -1, "BLOCK": 1})
    for kernel in ("gated_silu_forward_kernel", "gated_silu_backward_kernel")
}


def column_block(width: int) -> int:
    """The power of two, 64 to ``TILE``, in whose multiples ``width`` wastes least; of equals the largest."""
    blocks = [TILE >> shift for shift in range(TILE.bit_length() - 6)]
    return min(blocks, key=lambda block: (triton.cdiv(width, block) * block, -block))


@triton.jit
def gated_silu_forward_kernel(  # noqa: ANN201
    gate_up,  # noqa: ANN001
    y,  # noqa: ANN001
    M,  # noqa: ANN001
    stride,  # noqa: ANN001
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of rows and columns of y = gate · σ(gate) · up; y is contiguous."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < M) & (column < F)
    gate = tl.load(gate_up + row * stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + column, inside, 0.0).to(tl.float32)
    tl.store(y + row * F + column, cast(gate * tl.sigmoid(gate) * up, y.dtype.element_ty), inside)


@triton.jit
def gated_silu_backward_kernel(  # noqa: ANN201
    gate_up,  # noqa: ANN001
    grad,  # noqa: ANN001
    d_gate_up,  # noqa: ANN001
    M,  # noqa: ANN001
    stride,  # noqa: ANN001
    stride_grad,  # noqa: ANN001
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_up = g silu(gate), d_gate = g up σ (1 + gate (1 − σ)) with σ = σ(gate); d_gate_up is contiguous."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < M) & (column < F)
    gate = tl.load(gate_up + row * stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + column, inside, 0.0).to(tl.float32)
    g = tl.load(grad + row * stride_grad + column, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = g * gate * sigmoid
    d_gate_up += row * (2 * F) + column
    tl.store(d_gate_up, cast(d_gate, d_gate_up.dtype.element_ty), inside)
    tl.store(d_gate_up + F, cast(d_up, d_gate_up.dtype.element_ty), inside)


def _launch(kernel: triton.JITFunction, rows: Tensor, **arguments: Tensor | int) -> None:
    """Over all rows and columns of gate_up as (M, 2 F)."""
    M, F = rows.shape[0], rows.shape[1] // 2
    block = column_block(F)
    default = {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 4, "num_stages": 1}
    tiles = configuration(kernel.fn.__name__, default, rows.dtype, F=F)
    grid = (triton.cdiv(M, tiles["ROWS"]), triton.cdiv(F, tiles["BLOCK"]))
    if M:
        launch(kernel, grid, gate_up=rows, M=M, stride=rows.stride(0), F=F, **arguments, **tiles)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(gate_up)
        y = torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)
        _launch(gated_silu_forward_kernel, as_rows(gate_up), y=y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001
        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        grads = as_rows(grad)
        _launch(
            gated_silu_backward_kernel, as_rows(gate_up), grad=grads, stride_grad=grads.stride(0), d_gate_up=d_gate_up
        )
        return d_gate_up


@register("gated_silu", form="fused", backend="triton")
def gated_silu_triton(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, computed in fp32 and rounded once; the backward keeps gate_up alone.

    Args:
        gate_up: (..., 2 F), the gate first; fp32, bf16 or fp16.

    Returns:
        (..., F), contiguous, in the dtype of gate_up.

    Raises:
        ValueError: an odd last dimension, another dtype (fp64 among them), a wrong device.
    """
    check_gated_silu(gate_up)
    check_tensors("gated_silu", gate_up)
    return _GatedSiLU.apply(gate_up)
