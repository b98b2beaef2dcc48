"""Gradient of the outputs -> gradients of the normaliser and of the max state, a token at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import load_tile


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
    h_ptr += (head // H) * h_sb + (head % H) * h_sh
    dh_ptr += (head // H) * dh_sb + (head % H) * dh_sh
    delta = tl.zeros((BT,), tl.float32)
    for slice_v in range(0, D_V, BV):
        h = load_tile(h_ptr, tile, h_st, slice_v, T, D_V, BT, BV).to(tl.float32)
        delta += tl.sum(h * load_tile(dh_ptr, tile, dh_st, slice_v, T, D_V, BT, BV).to(tl.float32), 1)
    at_t = head * TILES * BT + tile * BT + tl.arange(0, BT)
    den = tl.load(den_ptr + at_t)
    m = tl.load(m_ptr + at_t)
    floor = tl.exp(-m)
    inv_n = 1.0 / (tl.maximum(tl.abs(den), floor) + eps)
    share = -delta * inv_n
    dden = tl.where(tl.abs(den) > floor, tl.where(den > 0, share, -share), 0.0)
    dm = share * eps
    tl.store(inv_n_ptr + at_t, inv_n)
    tl.store(dden_ptr + at_t, dden)
    tl.store(dm_ptr + at_t, dm)

    fresh = (tl.load(i_ptr + at_t) >= m).to(tl.int32)  # the maximum is this token's own input gate
    tl.store(flow_ptr + head * TILES + tile, tl.sum(tl.where(tl.cumsum(fresh, 0) == 0, dm, 0.0), 0))
    tl.store(carried_ptr + head * TILES + tile, (tl.sum(fresh, 0) == 0).to(tl.int32))
