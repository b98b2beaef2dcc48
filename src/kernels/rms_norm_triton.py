"""RMS norm with a weight, alone or together with the sum of the residual stream before it, for GPUs.

One pass over memory each way: a program holds whole rows. Backward keeps nothing but x (or the sum) and the weight;
programs stay for many rows and sum the weight's gradient on the way, so that it needs no atomic operation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.rms_norm import EPS, check_rms_norm
from xlstm_scaling.kernels.triton_launch import check_device, configuration, current_target, launch
from xlstm_scaling.kernels.triton_math import cast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: widest row that a program holds
MAX_WIDTH = 8192
#: multiprocessors where there is no device to ask (while launches are recorded), and under the interpreter
RECORDED_PROCESSORS, INTERPRETED_PROCESSORS = 132, 2
#: what tuning tries first, as steps from the default: other programs at the same elements a thread, and, where programs
#: stay, at the same threads a multiprocessor
CANDIDATES = {
    "rms_norm_forward_kernel": ({"ROWS": -1, "num_warps": -1}, {"ROWS": 1, "num_warps": 1}),
    "rms_norm_backward_kernel": (
        {"ROWS": -1, "num_warps": -1, "PER_PROCESSOR": 1},
        {"ROWS": 1, "num_warps": 1, "PER_PROCESSOR": -1},
    ),
}


def check_tensors(op: str, *tensors: Tensor, eps: float = EPS) -> None:
    """Raise ValueError unless kernels take the dtypes and reach the tensors, all on one device, and eps is above 0."""
    if any(x.dtype not in DTYPES for x in tensors):
        found = ", ".join(sorted({str(x.dtype) for x in tensors}))
        raise ValueError(f"{op} (triton) takes fp32, bf16 and fp16, got {found}; use backend 'torch' for others")
    if not eps > 0:  # what a tile has beyond the last row is 0, and normed as well
        raise ValueError(f"{op} (triton) takes an eps above 0, got {eps}")
    check_device(*tensors)
    if len({x.device for x in tensors}) > 1:
        raise ValueError(f"{op} (triton) takes tensors on one device, got {', '.join(str(x.device) for x in tensors)}")


def row_tiles(op: str, width: int, backward: bool = False) -> dict[str, int]:
    """Default configuration for rows of ``width``: how many a program holds, and with how many threads.

    A thread has 16 elements of each tensor, in the backward 8, and 4 where rows are not aligned and each element needs
    a pointer: with more, registers spill. ValueError where a row is wider than a program holds.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"{op} (triton) takes rows of up to {MAX_WIDTH} channels, got {width}; use backend 'torch'")
    block = triton.next_power_of_2(width)
    elements, of_thread = (2048, 16) if not backward else (2048, 8) if width % 16 == 0 else (512, 4)
    rows = max(1, elements // block)
    tiles = {"ROWS": rows, "num_warps": min(16, rows * block // (32 * of_thread)), "num_stages": 1}
    # programs that stay on a multiprocessor: about as many threads as it holds
    return tiles | ({"PER_PROCESSOR": 32 // tiles["num_warps"]} if backward else {})


def register_limit() -> dict[str, int]:
    """Option for NVIDIA: without a limit, ptxas sets itself a lower one and spills a few bytes to keep to it."""
    return {"maxnreg": 128} if current_target().backend == "cuda" else {}


def resident_programs(x: Tensor, blocks: int, per_processor: int) -> int:
    """Programs that stay for all rows: so many a multiprocessor, no more than there are blocks of rows."""
    if x.device.type == "cuda":
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    else:
        processors = RECORDED_PROCESSORS if x.device.type == "meta" else INTERPRETED_PROCESSORS
    return max(1, min(blocks, processors * per_processor))


def as_rows(x: Tensor) -> Tensor:
    """x (..., d) as (M, d) with contiguous rows; a view where its strides allow one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def rms_norm_forward_kernel(  # noqa: ANN201
    x,  # noqa: ANN001
    residual,  # noqa: ANN001
    weight,  # noqa: ANN001
    y,  # noqa: ANN001
    total,  # noqa: ANN001
    M,  # noqa: ANN001
    stride_x,  # noqa: ANN001
    stride_residual,  # noqa: ANN001
    eps,  # noqa: ANN001
    WITH_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of y, and of total = x + residual. y and total are contiguous."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < M) & (column < WIDTH)
    value = tl.load(x + row * stride_x + column, inside, 0.0).to(tl.float32)
    if WITH_RESIDUAL:
        value += tl.load(residual + row * stride_residual + column, inside, 0.0).to(tl.float32)
        rounded = cast(value, total.dtype.element_ty)
        tl.store(total + row * WIDTH + column, rounded, inside)
        value = rounded.to(tl.float32)  # what is normed is what the stream holds
    scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None]
    w = tl.load(weight + column, column < WIDTH, 0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, cast(value * scale * w, y.dtype.element_ty), inside)


@triton.jit
def rms_norm_backward_kernel(  # noqa: ANN201
    x,  # noqa: ANN001
    weight,  # noqa: ANN001
    grad,  # noqa: ANN001
    grad_total,  # noqa: ANN001
    d_x,  # noqa: ANN001
    d_weight,  # noqa: ANN001
    M,  # noqa: ANN001
    stride_x,  # noqa: ANN001
    stride_grad,  # noqa: ANN001
    stride_total,  # noqa: ANN001
    eps,  # noqa: ANN001
    WITH_TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_x = r (g w − x̂ mean(g w x̂)) (+ grad_total) with x̂ = r x; this program's share of d_weight = Σ g x̂."""
    column = tl.arange(0, BLOCK)[None, :]
    share = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < M) & (column < WIDTH)
        normed = tl.load(x + row * stride_x + column, inside, 0.0).to(tl.float32)
        g = tl.load(grad + row * stride_grad + column, inside, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(normed * normed, 1) / WIDTH + eps)[:, None]
        normed *= scale
        share += g * normed
        g *= tl.load(weight + column, column < WIDTH, 0.0).to(tl.float32)  # again and again, to save its registers
        d = (g - normed * (tl.sum(g * normed, 1) / WIDTH)[:, None]) * scale
        if WITH_TOTAL:
            d += tl.load(grad_total + row * stride_total + column, inside, 0.0).to(tl.float32)
        tl.store(d_x + row * WIDTH + column, cast(d, d_x.dtype.element_ty), inside)
    column = tl.arange(0, BLOCK)
    tl.store(d_weight + tl.program_id(0) * WIDTH + column, tl.sum(share, 0), column < WIDTH)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float):  # noqa: ANN001, ANN205
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        d, rows = x.shape[-1], as_rows(x)
        residual_rows = rows if residual is None else as_rows(residual)  # without one, a pointer that is left alone
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = y if residual is None else torch.empty_like(y)
        tiles = configuration("rms_norm_forward_kernel", row_tiles("rms_norm", d), x.dtype, d=d)
        if rows.shape[0]:
            launch(
                rms_norm_forward_kernel,
                (triton.cdiv(rows.shape[0], tiles["ROWS"]),),
                x=rows,
                residual=residual_rows,
                weight=weight,
                y=y,
                total=total,
                M=rows.shape[0],
                stride_x=rows.stride(0),
                stride_residual=residual_rows.stride(0),
                eps=eps,
                WITH_RESIDUAL=residual is not None,
                WIDTH=d,
                BLOCK=triton.next_power_of_2(d),
                **tiles,
            )
        ctx.save_for_backward(x if residual is None else total, weight)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_total: Tensor | None = None):  # noqa: ANN001, ANN205
        total, weight = ctx.saved_tensors
        with_residual, d = ctx.needs_input_grad[2], total.shape[-1]
        if grad is None:
            return grad_total, None, grad_total if with_residual else None, None
        rows, grads = as_rows(total), as_rows(grad)
        totals = grads if grad_total is None else as_rows(grad_total)
        d_x = torch.empty_like(total, memory_format=torch.contiguous_format)
        tiles = configuration("rms_norm_backward_kernel", row_tiles("rms_norm", d, backward=True), total.dtype, d=d)
        programs = resident_programs(rows, triton.cdiv(rows.shape[0], tiles["ROWS"]), tiles.pop("PER_PROCESSOR"))
        d_weight = torch.empty(programs, d, dtype=torch.float32, device=rows.device)
        launch(
            rms_norm_backward_kernel,
            (programs,),
            x=rows,
            weight=weight,
            grad=grads,
            grad_total=totals,
            d_x=d_x,
            d_weight=d_weight,
            M=rows.shape[0],
            stride_x=rows.stride(0),
            stride_grad=grads.stride(0),
            stride_total=totals.stride(0),
            eps=ctx.eps,
            WITH_TOTAL=grad_total is not None,
            WIDTH=d,
            BLOCK=triton.next_power_of_2(d),
            **tiles,
            **register_limit(),
        )
        return d_x, d_weight.sum(0).to(weight.dtype), d_x if with_residual else None, None


@register("rms_norm", form="fused", backend="triton")
def rms_norm_triton(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = EPS
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x²) + eps) · w; with a residual, the same of x + residual, and that sum.

    Statistics in fp32; the sum is rounded to the dtype of x before it is normed. The backward keeps x, or the sum, and
    the weight. Deterministic on a device: no atomic operations.

    Args:
        x: (..., d), fp32, bf16 or fp16, d up to 8,192.
        weight: (d,), fp32 or any of those.
        residual: like x, or None.

    Returns:
        y like x, contiguous; with a residual the pair y, x + residual.

    Raises:
        ValueError: shapes, dtypes (fp64 among them) or devices that do not fit, an eps of 0.
    """
    check_rms_norm(x, weight, residual)
    check_tensors("rms_norm", x, weight, *([] if residual is None else [residual]), eps=eps)
    return _RMSNorm.apply(x, weight.contiguous(), residual, eps)
