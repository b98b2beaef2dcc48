"""Gradients of the queries of a tile, and the masses from which the gates' gradients are added up."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import causal_weights, load_state, load_tile, store_tile, sum_between
from xlstm_scaling.kernels.triton_math import cast, dot


@triton.jit
def query_gradients_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, i_ptr, b_ptr, r_ptr, g_ptr, m_ptr, m_tile_ptr, inv_n_ptr, dden_ptr, C_ptr, n_ptr,
    dq_ptr, received_ptr, row_ptr, column_ptr, crossing_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, dh_sb, dh_sh, dh_st, dq_sb, dq_sh, dq_st,
    H, T, TILES, CHUNKS, scale,
    D_QK: tl.constexpr, D_V: tl.constexpr, NT: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B, H, T, d_qk) and, with G_ts the gradient of the log weight of source s in output t:

    received (blocks of d_qk, B·H, TILES, NT): Σ_t Σ_s G_ts over t in the tile and all s before tile l of the chunk;
    row (blocks, B·H, TILES·BT): Σ_s G_ts over all s before the tile; and inside the tile column_s = Σ_{t ≥ s} G_ts and
    crossing_s = Σ_{t > s ≥ r} G_tr (B·H, TILES·BT). All are sums of what they mean, never differences of larger sums.
    """
    blocks_k: tl.constexpr = (D_QK + BK - 1) // BK
    pid = tl.program_id(0)
    block_k, tile = pid % blocks_k, (pid // blocks_k) % TILES
    head = (pid // (blocks_k * TILES)).to(tl.int64)
    heads = (tl.num_programs(0) // (blocks_k * TILES)).to(tl.int64)
    start = (tile // NT) * NT
    chunk = head * CHUNKS + tile // NT
    first_k = block_k * BK
    rows, dk = tl.arange(0, BT), first_k + tl.arange(0, BK)
    q_ptr += (head // H) * q_sb + (head % H) * q_sh
    k_ptr += (head // H) * k_sb + (head % H) * k_sh
    v_ptr += (head // H) * v_sb + (head % H) * v_sh
    dh_ptr += (head // H) * dh_sb + (head % H) * dh_sh
    i_ptr += head * TILES * BT
    r_ptr += head * TILES * BT
    g_ptr += head * TILES
    m_tile_ptr += head * (TILES + 1)
    received_ptr += ((block_k * heads + head) * TILES + tile) * NT
    at_t = head * TILES * BT + tile * BT + rows
    m_i = tl.load(m_tile_ptr + tile)
    b = tl.load(b_ptr + at_t)
    m = tl.load(m_ptr + at_t)
    inv_n = tl.load(inv_n_ptr + at_t)
    dden = tl.load(dden_ptr + at_t)
    row = tl.exp((m_i - m) + b) * scale

    # the state before the chunk
    acc = tl.zeros((BT, BK), tl.float32)
    for first_v in range(0, D_V, BC):
        dh = load_tile(dh_ptr, tile, dh_st, first_v, T, D_V, BT, BC)
        C = load_state(C_ptr + chunk * D_QK * D_V, first_k, first_v, D_QK, D_V, BK, BC)
        acc = dot(dh.to(MMA), tl.trans(cast(C, MMA)), acc, PRECISION)
    n = tl.load(n_ptr + chunk * D_QK + dk, mask=dk < D_QK, other=0.0)
    acc = acc * inv_n[:, None] + dden[:, None] * n[None, :]
    acc *= tl.exp((tl.load(m_tile_ptr + start) - m_i) + sum_between(g_ptr, start, tile, WIDTH))
    q = load_tile(q_ptr, tile, q_st, first_k, T, D_QK, BT, BK)
    # summed at once: Triton 3.6 and 3.7 on sm_100 fail on two steps
    tl.store(received_ptr, tl.sum(q.to(tl.float32) * acc * row[:, None]))

    # the tiles before, in the chunk, oldest first
    if D_V <= BV:
        dh_all = load_tile(dh_ptr, tile, dh_st, 0, T, D_V, BT, BV).to(MMA)
    for source in range(start, tile):
        dP = tl.zeros((BT, BT), tl.float32)
        if D_V <= BV:
            v = load_tile(v_ptr, source, v_st, 0, T, D_V, BT, BV)
            dP = dot(dh_all, tl.trans(v.to(MMA)), dP, PRECISION)
        else:
            for slice_v in range(0, D_V, BV):
                dh = load_tile(dh_ptr, tile, dh_st, slice_v, T, D_V, BT, BV)
                v = load_tile(v_ptr, source, v_st, slice_v, T, D_V, BT, BV)
                dP = dot(dh.to(MMA), tl.trans(v.to(MMA)), dP, PRECISION)
        m_next = tl.load(m_tile_ptr + source + 1)
        column = (tl.load(i_ptr + source * BT + rows) - m_next) + tl.load(r_ptr + source * BT + rows)
        step = tl.exp((m_next - m_i) + sum_between(g_ptr, source + 1, tile, WIDTH))
        dP = (dP * inv_n[:, None] + dden[:, None]) * (tl.exp(column) * step)[None, :]
        k = load_tile(k_ptr, source, k_st, first_k, T, D_QK, BT, BK)
        acc = dot(cast(dP, MMA), k.to(MMA), acc, PRECISION)
        q = load_tile(q_ptr, tile, q_st, first_k, T, D_QK, BT, BK)  # again: registers are short
        mass = tl.sum(q.to(tl.float32) * acc * row[:, None])
        tl.store(received_ptr + source + 1 - start, mass, mask=source + 1 - start < NT)
    q = load_tile(q_ptr, tile, q_st, first_k, T, D_QK, BT, BK)
    tl.store(row_ptr + block_k * heads * TILES * BT + at_t, tl.sum(q.to(tl.float32) * acc, 1) * row)
    acc *= row[:, None]

    # the tile itself
    dP = tl.zeros((BT, BT), tl.float32)
    if D_V <= BV:
        v = load_tile(v_ptr, tile, v_st, 0, T, D_V, BT, BV)
        dP = dot(dh_all, tl.trans(v.to(MMA)), dP, PRECISION)
    else:
        for slice_v in range(0, D_V, BV):
            dh = load_tile(dh_ptr, tile, dh_st, slice_v, T, D_V, BT, BV)
            v = load_tile(v_ptr, tile, v_st, slice_v, T, D_V, BT, BV)
            dP = dot(dh.to(MMA), tl.trans(v.to(MMA)), dP, PRECISION)
    i = tl.load(i_ptr + tile * BT + rows)
    dS = (dP * inv_n[:, None] + dden[:, None]) * causal_weights(b, i, m, BT) * scale
    k = load_tile(k_ptr, tile, k_st, first_k, T, D_QK, BT, BK)
    acc = dot(cast(dS, MMA), k.to(MMA), acc, PRECISION)
    dq_ptr += (head // H) * dq_sb + (head % H) * dq_sh
    store_tile(dq_ptr, cast(acc, dq_ptr.dtype.element_ty), tile, dq_st, first_k, T, D_QK, BT, BK)
    if block_k == 0:
        scores = tl.zeros((BT, BT), tl.float32)
        for first_d in range(0, D_QK, BK):
            q = load_tile(q_ptr, tile, q_st, first_d, T, D_QK, BT, BK)
            k = load_tile(k_ptr, tile, k_st, first_d, T, D_QK, BT, BK)
            scores = dot(q.to(MMA), tl.trans(k.to(MMA)), scores, PRECISION)
        G = scores * dS
        tl.store(column_ptr + at_t, tl.sum(G, 0))
        before = tl.cumsum(G, 1)  # Σ_{r ≤ s} G_tr
        before = tl.where(rows[:, None] > rows[None, :], before, 0.0)
        tl.store(crossing_ptr + at_t, tl.sum(before, 0))
