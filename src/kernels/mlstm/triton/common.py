"""What the mLSTM kernels share on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_sigmoid(x):  # noqa: ANN001, ANN201
    """log σ(x), accurate for large x too: log1p(y) = log(1 + y) · y / ((1 + y) − 1)."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def sum_between(g_ptr, first, last, WIDTH: tl.constexpr):  # noqa: ANN001, ANN201
    """Σ g_l over tiles first ≤ l < last, at most WIDTH of them."""
    index = first + tl.arange(0, WIDTH)
    return tl.sum(tl.load(g_ptr + index, mask=index < last, other=0.0), 0)


@triton.jit
def causal_weights(b, i, m, BT: tl.constexpr):  # noqa: ANN001, ANN201
    """exp(b_t − b_s + i_s − m_t) for s ≤ t, else 0: rows t, columns s of the diagonal tile."""
    rows, columns = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    exponent = (i[None, :] - m[:, None]) + (b[:, None] - b[None, :])
    return tl.exp(tl.where(rows >= columns, exponent, float("-inf")))
