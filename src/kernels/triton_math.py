"""Device functions that all Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.triton_launch import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with fp32 accumulation; PRECISION (tf32x3 | ieee | tf32) concerns fp32 operands only."""
    if INTERPRETED:  # the interpreter multiplies the bits of bf16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in ``dtype``, rounded to nearest even (the interpreter truncates fp32 to bf16)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
