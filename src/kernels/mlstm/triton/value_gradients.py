"""Gradients of the values of a tile: from the tiles after it in the chunk, and the state after the chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import causal_weights, load_state, load_tile, store_tile, sum_between
from xlstm_scaling.kernels.triton_math import cast, dot


@triton.jit
def value_gradients_kernel(
    q_ptr, k_ptr, dh_ptr, i_ptr, b_ptr, r_ptr, g_ptr, m_ptr, m_tile_ptr, inv_n_ptr, dC_ptr,
    dv_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, dh_sb, dh_sh, dh_st, dv_sb, dv_sh, dv_st,
    H, T, TILES, CHUNKS, scale,
    D_QK: tl.constexpr, D_V: tl.constexpr, NT: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv (B, H, T, d_v): dv_s = Σ_t P_ts dNUM_t + exp(…) dCᵀ k_s. A program computes [BT, BV] of it."""
    blocks_v: tl.constexpr = (D_V + BV - 1) // BV
    pid = tl.program_id(0)
    block_v, source = pid % blocks_v, (pid // blocks_v) % TILES
    head = (pid // (blocks_v * TILES)).to(tl.int64)
    chunk = head * CHUNKS + source // NT
    end = tl.minimum((source // NT + 1) * NT, TILES)
    first_v = block_v * BV
    rows = tl.arange(0, BT)
    q_ptr += (head // H) * q_sb + (head % H) * q_sh
    k_ptr += (head // H) * k_sb + (head % H) * k_sh
    dh_ptr += (head // H) * dh_sb + (head % H) * dh_sh
    i_ptr += head * TILES * BT
    b_ptr += head * TILES * BT
    r_ptr += head * TILES * BT
    m_ptr += head * TILES * BT
    inv_n_ptr += head * TILES * BT
    g_ptr += head * TILES
    m_tile_ptr += head * (TILES + 1)
    own = source * BT + rows
    m_next = tl.load(m_tile_ptr + source + 1)
    i = tl.load(i_ptr + own)

    # the state after the chunk
    acc = tl.zeros((BT, BV), tl.float32)
    for first_k in range(0, D_QK, BC):
        k = load_tile(k_ptr, source, k_st, first_k, T, D_QK, BT, BC)
        dC = load_state(dC_ptr + chunk * D_QK * D_V, first_k, first_v, D_QK, D_V, BC, BV)
        acc = dot(k.to(MMA), cast(dC, MMA), acc, PRECISION)
    acc *= tl.exp((m_next - tl.load(m_tile_ptr + end)) + sum_between(g_ptr, source + 1, end, WIDTH))

    # the tiles after, in the chunk
    if D_QK <= BK:
        k_all = load_tile(k_ptr, source, k_st, 0, T, D_QK, BT, BK).to(MMA)
    for tile in range(source + 1, end):
        scores = tl.zeros((BT, BT), tl.float32)  # rows s, columns t
        if D_QK <= BK:
            q = load_tile(q_ptr, tile, q_st, 0, T, D_QK, BT, BK)
            scores = dot(k_all, tl.trans(q.to(MMA)), scores, PRECISION)
        else:
            for slice_k in range(0, D_QK, BK):
                k = load_tile(k_ptr, source, k_st, slice_k, T, D_QK, BT, BK)
                q = load_tile(q_ptr, tile, q_st, slice_k, T, D_QK, BT, BK)
                scores = dot(k.to(MMA), tl.trans(q.to(MMA)), scores, PRECISION)
        at_t = tile * BT + rows
        m_i = tl.load(m_tile_ptr + tile)
        row = tl.exp((m_i - tl.load(m_ptr + at_t)) + tl.load(b_ptr + at_t)) * tl.load(inv_n_ptr + at_t)
        step = tl.exp((m_next - m_i) + sum_between(g_ptr, source + 1, tile, WIDTH)) * scale
        scores *= (row * step)[None, :]
        dh = load_tile(dh_ptr, tile, dh_st, first_v, T, D_V, BT, BV)
        acc = dot(cast(scores, MMA), dh.to(MMA), acc, PRECISION)
    acc *= tl.exp((i - m_next) + tl.load(r_ptr + own))[:, None]

    # the tile itself
    scores = tl.zeros((BT, BT), tl.float32)
    if D_QK <= BK:
        q = load_tile(q_ptr, source, q_st, 0, T, D_QK, BT, BK)
        scores = dot(k_all, tl.trans(q.to(MMA)), scores, PRECISION)
    else:
        for slice_k in range(0, D_QK, BK):
            k = load_tile(k_ptr, source, k_st, slice_k, T, D_QK, BT, BK)
            q = load_tile(q_ptr, source, q_st, slice_k, T, D_QK, BT, BK)
            scores = dot(k.to(MMA), tl.trans(q.to(MMA)), scores, PRECISION)
    weights = tl.trans(causal_weights(tl.load(b_ptr + own), i, tl.load(m_ptr + own), BT))
    scores *= weights * (tl.load(inv_n_ptr + own) * scale)[None, :]
    dh = load_tile(dh_ptr, source, dh_st, first_v, T, D_V, BT, BV)
    acc = dot(cast(scores, MMA), dh.to(MMA), acc, PRECISION)
    dv_ptr += (head // H) * dv_sb + (head % H) * dv_sh
    store_tile(dv_ptr, cast(acc, dv_ptr.dtype.element_ty), source, dv_st, first_v, T, D_V, BT, BV)
