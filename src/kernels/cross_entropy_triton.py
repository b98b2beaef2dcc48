"""Linear head, logit soft cap and cross entropy in bounded memory, for GPUs.

The three matrix products are the vendor's (cuBLAS, hipBLASLt), with fp32 results whatever their operands are: 6 M V d
FLOPs in all, nothing is computed twice. Everything between the logits and their gradient is one Triton kernel. Logits
exist as fp32 for a few hundred tokens at a time, their gradients in the dtype of the products for a few thousand: the
gradient of the weights is read and written once per so many tokens, which is what costs when there are few.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_scaling.kernels.cross_entropy import SAFE_CAP
from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.triton_launch import check_device, configuration, launch
from xlstm_scaling.kernels.triton_math import cast

#: most memory for logits and their gradients: 256 tokens of fp32 logits and 2,048 of bf16 gradients at V = 50,304
LOGITS_BYTES = 256 * 1024**2
#: logits of fewer tokens would leave the matrix product waiting for the weights
MIN_LOGIT_ROWS = 128
MAX_ROWS = 8192
#: rows of the buffers start at multiples of this many elements, also for an odd vocabulary
ROW_ALIGNMENT = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = tl.constexpr(math.log2(math.e))
#: what tuning tries first, as steps from the default: fewer threads at the same elements each, or more blocks under way
CANDIDATES = {
    "softmax_cross_entropy_kernel": (
        {"BLOCK_V": -1, "num_warps": -1},
        {"BLOCK_V": -2, "num_warps": -2},
        {"BLOCK_V": -1, "num_stages": 1},
    )
}


@triton.jit
def _soft_cap(x, cap, CAPPED: tl.constexpr):  # noqa: ANN001, ANN202
    """cap · tanh(x / cap) and its derivative 1 − tanh², to fp32's digits for any x."""
    if CAPPED:
        y = x * (1.0 / cap)
        e = tl.exp2(tl.abs(y) * (-2.0 * LOG2_E))  # tanh |y| = (1 − e) / (1 + e): no digits are left where e is near 1
        square = y * y  # so that a polynomial takes over below 5/8 (Cephes, tanhf)
        series = -5.70498872745e-3 * square + 2.06390887954e-2
        series = series * square - 5.37397155531e-2
        series = series * square + 1.33314422036e-1
        series = series * square - 3.33332819422e-1
        half = 1.0 / (1.0 + e)
        tanh = (1.0 - e) * half
        tanh = tl.where(tl.abs(y) < 0.625, y + y * square * series, tl.where(y < 0, -tanh, tanh))
        capped, slope = cap * tanh, 4.0 * e * half * half
    else:
        capped, slope = x, 1.0
    return capped, slope


@triton.jit
def softmax_cross_entropy_kernel(  # noqa: ANN201
    logits,  # noqa: ANN001
    gradient,  # noqa: ANN001
    targets,  # noqa: ANN001
    losses,  # noqa: ANN001
    cap,  # noqa: ANN001
    V: tl.constexpr,
    STRIDE: tl.constexpr,  # of rows, in elements
    CAPPED: tl.constexpr,
    BOUNDED: tl.constexpr,  # capped so low that exp cannot overflow
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,  # blocks on their way or in work: without products, only loops ask for a pipeline
):
    """One row: its loss, and the gradient of the loss by the raw logits, cast to the dtype of ``gradient``.

    Rows of both have STRIDE elements, a multiple of 16, and are read and written to their end: whole vectors for any V.
    What lies behind V is not used.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    gradient += row * STRIDE
    target = tl.load(targets + row)
    # 4 fp32 logits are a vector of 16 bytes; 8, as 16-bit gradients would have it, leave gaps between loads
    columns = tl.max_contiguous(tl.arange(0, BLOCK_V), 4)
    # lanes keep maxima and sums of their own: one reduction a row
    largest = tl.full((BLOCK_V,), 0.0 if BOUNDED else -1.0e38, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        x = tl.load(logits + start + columns, start + columns < STRIDE, 0.0)
        x, _ = _soft_cap(x, cap, CAPPED)
        x = tl.where(start + columns < V, x, float("-inf"))
        if BOUNDED:
            total += tl.exp2(x * LOG2_E)
        else:
            larger = tl.maximum(largest, x)
            total = total * tl.exp2((largest - larger) * LOG2_E) + tl.exp2((x - larger) * LOG2_E)
            largest = larger
    # a probability is 2^((x − peak) log2 e − shift) · scale: exponents of what counts are small, errors with them
    if BOUNDED:
        peak = 0.0
        total = tl.sum(total, 0)
        shift = tl.floor(tl.log2(total))
    else:
        peak = tl.max(largest, 0)
        total = tl.sum(total * tl.exp2((largest - peak) * LOG2_E), 0)
        shift = 0.0
    scale = 1.0 / (total * tl.exp2(-shift))
    known = (target >= 0) & (target < V)
    target_logit, _ = _soft_cap(tl.load(logits + target, known, float("nan")), cap, CAPPED)
    tl.store(losses + row, tl.log(total) + (peak - target_logit))
    if GRADIENT:
        blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
        for index in tl.range(0, blocks, num_stages=STAGES):
            start = (blocks - 1 - index) * BLOCK_V  # from the end, which is still in the cache
            stored = start + columns < STRIDE
            x, slope = _soft_cap(tl.load(logits + start + columns, stored, 0.0), cap, CAPPED)
            p = tl.exp2((x - peak) * LOG2_E - shift) * scale
            by_capped = tl.where(start + columns == target, p - 1.0, p)
            tl.store(gradient + start + columns, cast(by_capped * slope, gradient.dtype.element_ty), stored)


def _stride(V: int) -> int:
    return triton.cdiv(V, ROW_ALIGNMENT) * ROW_ALIGNMENT


def rows_at_once(V: int, gradient_bytes: int) -> tuple[int, int]:
    """Tokens whose logits, and tokens whose gradients of logits are held at once: powers of two, the first the smaller.

    ``gradient_bytes`` per element, 0 without gradients. Both buffers together keep to ``LOGITS_BYTES``, except that
    there is never less than one row of each.
    """
    row_bytes = LOGITS_BYTES // _stride(V)
    rows = MAX_ROWS
    while rows > 1:
        logit_rows = min((row_bytes - gradient_bytes * rows) // 4, rows)
        if logit_rows >= min(rows, MIN_LOGIT_ROWS):
            return 1 << (logit_rows.bit_length() - 1), rows
        rows //= 2
    return 1, 1


def _rows(count: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (count, V) buffer with aligned rows."""
    return torch.empty(count, _stride(V), dtype=dtype, device=device)[:, :V]


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b: summed and kept in fp32 for operands of any dtype."""
    if a.dtype == torch.float32 or a.device.type == "cpu":  # a CPU, interpreting, has no mixed product
        a, b = a.float(), b.float()
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float | None,
        grad_hidden: bool,
        grad_weight: bool,
    ):
        M, V = hidden.shape[0], weight.shape[0]
        weight_c = weight.to(hidden.dtype)
        need_grad = grad_hidden or grad_weight
        d_hidden = torch.empty_like(hidden, dtype=torch.float32) if grad_hidden else None
        d_weight = torch.empty_like(weight, dtype=torch.float32) if grad_weight else None
        losses = torch.empty(M, dtype=torch.float32, device=hidden.device)
        logit_rows, gradient_rows = rows_at_once(V, hidden.element_size() if need_grad else 0)
        logits = _rows(min(M, logit_rows), V, torch.float32, hidden.device)
        # without gradients the kernel gets a pointer that it leaves alone
        gradients = _rows(min(M, gradient_rows), V, hidden.dtype, hidden.device) if need_grad else logits
        block = min(triton.next_power_of_2(V), 4096)
        default = {"BLOCK_V": block, "num_warps": max(1, min(16, block // 256)), "num_stages": 3}
        tiles = configuration("softmax_cross_entropy_kernel", default, hidden.dtype, V=V)
        for first in range(0, M, gradient_rows):
            last = min(first + gradient_rows, M)
            for start in range(first, last, logit_rows):
                count = min(logit_rows, last - start)
                _product(hidden[start : start + count], weight_c.T, logits[:count])
                launch(
                    softmax_cross_entropy_kernel,
                    (count,),
                    logits=logits,
                    gradient=gradients[start - first :] if need_grad else gradients,
                    targets=targets[start:],
                    losses=losses[start:],
                    cap=0.0 if cap is None else float(cap),
                    V=V,
                    STRIDE=logits.stride(0),
                    CAPPED=cap is not None,
                    BOUNDED=cap is not None and cap <= SAFE_CAP,
                    GRADIENT=need_grad,
                    STAGES=tiles["num_stages"],
                    **tiles,
                )
            if grad_hidden:
                _product(gradients[: last - first], weight_c, d_hidden[first:last])
            if grad_weight:
                _product(gradients[: last - first].T, hidden[first:last], d_weight, add=first > 0)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.scale, ctx.dtypes = 1.0 / M, (hidden.dtype, weight.dtype)
        return (losses.sum(dtype=torch.float64) / M).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        scale = (grad_output.float() * ctx.scale).reshape(1)  # not a scalar: that would be rounded to a dtype of 16 bit
        gradients = [
            None if x is None else torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return *gradients, None, None, None, None


@register("linear_cross_entropy", form="fused", backend="triton")
def linear_cross_entropy_triton(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Mean loss [nat/token] of a linear head with soft-capped logits, and its gradients in the same pass.

    loss = mean_t(log Σ_v exp c(h_t·w_v) − c(h_t·w_target)) with c(x) = cap · tanh(x / cap).

    Logits are never rounded below fp32 nor held for more than a few hundred tokens (``LOGITS_BYTES``); the gradients
    by the logits enter the products in the dtype of ``hidden``. Between forward and backward the gradients are kept,
    4 d (M + V) bytes. No atomic operations: results are the same in every run.

    Args:
        hidden: (M, d), bf16, fp16 or fp32; matrix products run in this dtype.
        weight: (V, d), fp32 master weights.
        targets: (M,) int64 in [0, V); the loss is NaN where one is not.
        cap: the soft cap of the logits, above 0, or None.

    Returns:
        A scalar in fp32. Gradients come in the dtypes of ``hidden`` and ``weight``.

    Raises:
        ValueError: shapes or dtypes that do not fit, no tokens, a cap that is not positive, tensors on a wrong device.
    """
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
        or 0 in (*hidden.shape, *weight.shape)
    ):
        shapes = {"hidden": tuple(hidden.shape), "weight": tuple(weight.shape), "targets": tuple(targets.shape)}
        raise ValueError(f"cross entropy takes hidden (M, d), weight (V, d) and targets (M,), none empty, got {shapes}")
    if hidden.dtype not in DTYPES or not weight.is_floating_point() or targets.dtype != torch.int64:
        dtypes = {"hidden": hidden.dtype, "weight": weight.dtype, "targets": targets.dtype}
        raise ValueError(f"cross entropy takes hidden in fp32, bf16 or fp16, weight in fp32, int64 targets: {dtypes}")
    if cap is not None and not cap > 0:
        raise ValueError(f"the soft cap must be above 0, got {cap}")
    check_device(hidden, weight, targets)
    grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden.contiguous(),
        weight.contiguous(),
        targets.contiguous(),
        cap,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
    )
