"""Gradient of the outputs -> gradients of the normaliser and of the max state, a token at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def output_gradients_kernel(
    h_ptr, dh_ptr, den_ptr, m_ptr, i_ptr,
    inv_n_ptr, dden_ptr, dm_ptr, flow_ptr, carried_ptr,
    h_sb, h_sh, h_st, dh_sb, dh_sh, dh_st,
    H, T, TILES, eps,
    D_V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """With N_t = max(|den_t|, exp(−m_t)) + eps and δ_t = dh_t · h_t:

    inv_n = 1 / N, dden = −δ / N · sign(den) where |den| > exp(−m), dm = −δ · eps / N (N in absolute terms grows with
    eps · exp(m)). For the chain of max states: whether a tile carries m through (no token in it is a new maximum), and
    the sum of dm that flows out of its start.
    """
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    t = tile * BT + tl.arange(0, BT)
    inside = t < T
    t = t.to(tl.int64)
    h_ptr += (head // H) * h_sb + (head % H) * h_sh
    dh_ptr += (head // H) * dh_sb + (head % H) * dh_sh
    delta = tl.zeros((BT,), tl.float32)
    for start_v in tl.static_range(0, D_V, BV):
        dv = start_v + tl.arange(0, BV)
        valid = inside[:, None] & (dv < D_V)[None, :]
        h = tl.load(h_ptr + t[:, None] * h_st + dv[None, :], mask=valid, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + t[:, None] * dh_st + dv[None, :], mask=valid, other=0.0).to(tl.float32)
        delta += tl.sum(h * dh, 1)
    den = tl.load(den_ptr + head * TILES * BT + t)
    m = tl.load(m_ptr + head * TILES * BT + t)
    floor = tl.exp(-m)
    inv_n = 1.0 / (tl.maximum(tl.abs(den), floor) + eps)
    share = -delta * inv_n
    dden = tl.where(tl.abs(den) > floor, tl.where(den > 0, share, -share), 0.0)
    dm = share * eps
    tl.store(inv_n_ptr + head * TILES * BT + t, inv_n)
    tl.store(dden_ptr + head * TILES * BT + t, dden)
    tl.store(dm_ptr + head * TILES * BT + t, dm)

    fresh = (tl.load(i_ptr + head * TILES * BT + t) >= m).to(tl.int32)  # the maximum is this token's own input gate
    tl.store(flow_ptr + head * TILES + tile, tl.sum(tl.where(tl.cumsum(fresh, 0) == 0, dm, 0.0), 0))
    tl.store(carried_ptr + head * TILES + tile, (tl.sum(fresh, 0) == 0).to(tl.int32))
