"""Gradients of the keys of a tile: from the tiles after it in the chunk, and the state after the chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import causal_weights, load_state, load_tile, store_tile, sum_between
from xlstm_scaling.kernels.triton_math import cast, dot


@triton.jit
def key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, i_ptr, b_ptr, r_ptr, g_ptr, m_ptr, m_tile_ptr, inv_n_ptr, dden_ptr, dC_ptr, dn_ptr,
    dk_ptr, sent_ptr, column_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, dh_sb, dh_sh, dh_st, dk_sb, dk_sh, dk_st,
    H, T, TILES, CHUNKS, scale,
    D_QK: tl.constexpr, D_V: tl.constexpr, NT: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (B, H, T, d_qk) and, with G_ts the gradient of the log weight of source s in output t:

    sent (blocks of d_qk, B·H, TILES): Σ_s Σ_t G_ts over s in the tile and t after its chunk; column (blocks, B·H,
    TILES·BT): Σ_t G_ts over all t after the tile.
    """
    blocks_k: tl.constexpr = (D_QK + BK - 1) // BK
    pid = tl.program_id(0)
    block_k, source = pid % blocks_k, (pid // blocks_k) % TILES
    head = (pid // (blocks_k * TILES)).to(tl.int64)
    heads = (tl.num_programs(0) // (blocks_k * TILES)).to(tl.int64)
    chunk = head * CHUNKS + source // NT
    end = tl.minimum((source // NT + 1) * NT, TILES)  # behind the last tile of the chunk
    first_k = block_k * BK
    rows, dk = tl.arange(0, BT), first_k + tl.arange(0, BK)
    q_ptr += (head // H) * q_sb + (head % H) * q_sh
    k_ptr += (head // H) * k_sb + (head % H) * k_sh
    v_ptr += (head // H) * v_sb + (head % H) * v_sh
    dh_ptr += (head // H) * dh_sb + (head % H) * dh_sh
    b_ptr += head * TILES * BT
    m_ptr += head * TILES * BT
    inv_n_ptr += head * TILES * BT
    dden_ptr += head * TILES * BT
    g_ptr += head * TILES
    m_tile_ptr += head * (TILES + 1)
    own = source * BT + rows
    at_s = head * TILES * BT + own
    m_next = tl.load(m_tile_ptr + source + 1)
    i = tl.load(i_ptr + at_s)
    column = tl.exp((i - m_next) + tl.load(r_ptr + at_s))

    # the state after the chunk
    acc = tl.zeros((BT, BK), tl.float32)
    for first_v in range(0, D_V, BC):
        v = load_tile(v_ptr, source, v_st, first_v, T, D_V, BT, BC)
        dC = load_state(dC_ptr + chunk * D_QK * D_V, first_k, first_v, D_QK, D_V, BK, BC)
        rounded = cast(dC, MMA)
        acc = dot(v.to(MMA), tl.trans(rounded), acc, PRECISION)
        if dC.dtype != MMA:  # a gradient of the last state is given: one rounding for all tokens would add up
            rest = cast(dC.to(tl.float32) - rounded.to(tl.float32), MMA)
            acc = dot(v.to(MMA), tl.trans(rest), acc, PRECISION)
    acc += tl.load(dn_ptr + chunk * D_QK + dk, mask=dk < D_QK, other=0.0)[None, :]
    acc *= tl.exp((m_next - tl.load(m_tile_ptr + end)) + sum_between(g_ptr, source + 1, end, WIDTH))
    k = load_tile(k_ptr, source, k_st, first_k, T, D_QK, BT, BK)
    mass = tl.sum(k.to(tl.float32) * acc * column[:, None])  # at once: Triton 3.6 and 3.7 on sm_100 fail on two steps
    tl.store(sent_ptr + (block_k * heads + head) * TILES + source, mass)

    # the tiles after, in the chunk
    if D_V <= BV:
        v_all = load_tile(v_ptr, source, v_st, 0, T, D_V, BT, BV).to(MMA)
    for tile in range(source + 1, end):
        dP = tl.zeros((BT, BT), tl.float32)  # rows s, columns t
        if D_V <= BV:
            dh = load_tile(dh_ptr, tile, dh_st, 0, T, D_V, BT, BV)
            dP = dot(v_all, tl.trans(dh.to(MMA)), dP, PRECISION)
        else:
            for slice_v in range(0, D_V, BV):
                v = load_tile(v_ptr, source, v_st, slice_v, T, D_V, BT, BV)
                dh = load_tile(dh_ptr, tile, dh_st, slice_v, T, D_V, BT, BV)
                dP = dot(v.to(MMA), tl.trans(dh.to(MMA)), dP, PRECISION)
        at_t = tile * BT + rows
        dP = dP * tl.load(inv_n_ptr + at_t)[None, :] + tl.load(dden_ptr + at_t)[None, :]
        m_i = tl.load(m_tile_ptr + tile)
        row = tl.exp((m_i - tl.load(m_ptr + at_t)) + tl.load(b_ptr + at_t))
        step = tl.exp((m_next - m_i) + sum_between(g_ptr, source + 1, tile, WIDTH)) * scale
        dP *= (row * step)[None, :]
        q = load_tile(q_ptr, tile, q_st, first_k, T, D_QK, BT, BK)
        acc = dot(cast(dP, MMA), q.to(MMA), acc, PRECISION)
    k = load_tile(k_ptr, source, k_st, first_k, T, D_QK, BT, BK)  # again: registers are short
    tl.store(column_ptr + block_k * heads * TILES * BT + at_s, tl.sum(k.to(tl.float32) * acc, 1) * column)
    acc *= column[:, None]

    # the tile itself
    dP = tl.zeros((BT, BT), tl.float32)
    if D_V <= BV:
        dh = load_tile(dh_ptr, source, dh_st, 0, T, D_V, BT, BV)
        dP = dot(v_all, tl.trans(dh.to(MMA)), dP, PRECISION)
    else:
        for slice_v in range(0, D_V, BV):
            v = load_tile(v_ptr, source, v_st, slice_v, T, D_V, BT, BV)
            dh = load_tile(dh_ptr, source, dh_st, slice_v, T, D_V, BT, BV)
            dP = dot(v.to(MMA), tl.trans(dh.to(MMA)), dP, PRECISION)
    dP = dP * tl.load(inv_n_ptr + own)[None, :] + tl.load(dden_ptr + own)[None, :]
    dP *= tl.trans(causal_weights(tl.load(b_ptr + own), i, tl.load(m_ptr + own), BT)) * scale
    q = load_tile(q_ptr, source, q_st, first_k, T, D_QK, BT, BK)
    acc = dot(cast(dP, MMA), q.to(MMA), acc, PRECISION)
    dk_ptr += (head // H) * dk_sb + (head % H) * dk_sh
    store_tile(dk_ptr, cast(acc, dk_ptr.dtype.element_ty), source, dk_st, first_k, T, D_QK, BT, BK)
