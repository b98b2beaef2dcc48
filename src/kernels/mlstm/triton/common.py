"""What the mLSTM kernels share on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_sigmoid(x):
    """log σ(x), accurate for large x too: log1p(y) = log(1 + y) · y / ((1 + y) − 1)."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def load_tile(ptr, tile, stride, first, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """[BT, BD]: tokens of a tile, channels from ``first``, of rows (T, D) at ``ptr``; zeros beyond T and D.

    A 64-bit base and 32-bit offsets: registers are short.
    """
    rows, d = tl.arange(0, BT), first + tl.arange(0, BD)
    base = ptr + tl.cast(tile, tl.int64) * BT * stride
    mask = (tile * BT + rows < T)[:, None]
    if D % BD != 0:
        mask = mask & (d < D)[None, :]
    return tl.load(base + rows[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, x, tile, stride, first, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """The reverse of ``load_tile``; x already has the dtype of ``ptr``."""
    rows, d = tl.arange(0, BT), first + tl.arange(0, BD)
    base = ptr + tl.cast(tile, tl.int64) * BT * stride
    tl.store(base + rows[:, None] * stride + d[None, :], x, mask=(tile * BT + rows < T)[:, None] & (d < D)[None, :])


@triton.jit
def load_state(ptr, first_k, first_v, D_QK: tl.constexpr, D_V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """A [BK, BV] block of a matrix (d_qk, d_v) at ``ptr``, zeros beyond."""
    dk, dv = first_k + tl.arange(0, BK)[:, None], first_v + tl.arange(0, BV)[None, :]
    return tl.load(ptr + dk * D_V + dv, mask=(dk < D_QK) & (dv < D_V), other=0.0)


@triton.jit
def store_state(ptr, x, first_k, first_v, D_QK: tl.constexpr, D_V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The reverse of ``load_state``; x already has the dtype of ``ptr``."""
    dk, dv = first_k + tl.arange(0, BK)[:, None], first_v + tl.arange(0, BV)[None, :]
    tl.store(ptr + dk * D_V + dv, x, mask=(dk < D_QK) & (dv < D_V))


@triton.jit
def sum_between(g_ptr, first, last, WIDTH: tl.constexpr):
    """Σ g_l over tiles first ≤ l < last, at most WIDTH of them."""
    index = first + tl.arange(0, WIDTH)
    return tl.sum(tl.load(g_ptr + index, mask=index < last, other=0.0), 0)


@triton.jit
def causal_weights(b, i, m, BT: tl.constexpr):
    """exp(b_t − b_s + i_s − m_t) for s ≤ t, else 0: rows t, columns s of the diagonal tile."""
    rows, columns = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    exponent = (i[None, :] - m[:, None]) + (b[:, None] - b[None, :])
    return tl.exp(tl.where(rows >= columns, exponent, float("-inf")))
