"""Outputs of a tile: from the state before its chunk, the tiles before it in the chunk, and itself."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import causal_weights, load_state, load_tile, store_tile, sum_between
from xlstm_scaling.kernels.triton_math import cast, dot


@triton.jit
def outputs_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, b_ptr, r_ptr, g_ptr, C_ptr, n_ptr, m_tile_ptr,
    h_ptr, den_ptr, m_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, h_sb, h_sh, h_st,
    H, T, TILES, CHUNKS, scale, eps,
    D_QK: tl.constexpr, D_V: tl.constexpr, NT: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
    MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-> h (B, H, T, d_v), den = n_tᵀ q_t and m_t (B·H, TILES·BT) for the backward.

    A program computes [BT, BV] outputs. Products over d_qk run in slices of BK; where one slice is all of d_qk, the
    queries stay on the chip. The state is read in slices of BC.
    """
    blocks_v: tl.constexpr = (D_V + BV - 1) // BV
    pid = tl.program_id(0)
    block_v, tile = pid % blocks_v, (pid // blocks_v) % TILES
    head = (pid // (blocks_v * TILES)).to(tl.int64)
    start = (tile // NT) * NT  # first tile of the chunk
    chunk = head * CHUNKS + tile // NT
    first_v = block_v * BV
    rows = tl.arange(0, BT)
    q_ptr += (head // H) * q_sb + (head % H) * q_sh
    k_ptr += (head // H) * k_sb + (head % H) * k_sh
    v_ptr += (head // H) * v_sb + (head % H) * v_sh
    i_ptr += head * TILES * BT
    r_ptr += head * TILES * BT
    at_t = head * TILES * BT + tile * BT + rows
    g_ptr += head * TILES
    m_tile_ptr += head * (TILES + 1)
    m_i = tl.load(m_tile_ptr + tile)

    # the state before the chunk
    acc = tl.zeros((BT, BV), tl.float32)
    den = tl.zeros((BT,), tl.float32)
    for first_k in range(0, D_QK, BC):
        dk = first_k + tl.arange(0, BC)
        q = load_tile(q_ptr, tile, q_st, first_k, T, D_QK, BT, BC)
        C = load_state(C_ptr + chunk * D_QK * D_V, first_k, first_v, D_QK, D_V, BC, BV)
        n = tl.load(n_ptr + chunk * D_QK + dk, mask=dk < D_QK, other=0.0)
        acc = dot(q.to(MMA), cast(C, MMA), acc, PRECISION)
        den += tl.sum(q.to(tl.float32) * n[None, :], 1)
    step = tl.exp((tl.load(m_tile_ptr + start) - m_i) + sum_between(g_ptr, start, tile, WIDTH)) * scale
    acc *= step
    den *= step

    # the tiles before, in the chunk
    if D_QK <= BK:
        q_all = load_tile(q_ptr, tile, q_st, 0, T, D_QK, BT, BK).to(MMA)
    for source in range(start, tile):
        scores = tl.zeros((BT, BT), tl.float32)
        if D_QK <= BK:
            k = load_tile(k_ptr, source, k_st, 0, T, D_QK, BT, BK)
            scores = dot(q_all, tl.trans(k.to(MMA)), scores, PRECISION)
        else:
            for slice_k in range(0, D_QK, BK):
                q = load_tile(q_ptr, tile, q_st, slice_k, T, D_QK, BT, BK)
                k = load_tile(k_ptr, source, k_st, slice_k, T, D_QK, BT, BK)
                scores = dot(q.to(MMA), tl.trans(k.to(MMA)), scores, PRECISION)
        m_next = tl.load(m_tile_ptr + source + 1)
        column = (tl.load(i_ptr + source * BT + rows) - m_next) + tl.load(r_ptr + source * BT + rows)
        step = tl.exp((m_next - m_i) + sum_between(g_ptr, source + 1, tile, WIDTH)) * scale
        scores *= (tl.exp(column) * step)[None, :]
        v = load_tile(v_ptr, source, v_st, first_v, T, D_V, BT, BV)
        acc = dot(cast(scores, MMA), v.to(MMA), acc, PRECISION)
        den += tl.sum(scores, 1)

    # the tile itself
    b = tl.load(b_ptr + at_t)
    i = tl.load(i_ptr + tile * BT + rows)
    exponent = (b[:, None] - b[None, :]) + i[None, :]
    exponent = tl.where(rows[:, None] >= rows[None, :], exponent, float("-inf"))
    m = tl.maximum(b + m_i, tl.max(exponent, 1))
    row = tl.exp((m_i - m) + b)
    acc *= row[:, None]
    den *= row
    scores = tl.zeros((BT, BT), tl.float32)
    if D_QK <= BK:
        k = load_tile(k_ptr, tile, k_st, 0, T, D_QK, BT, BK)
        scores = dot(q_all, tl.trans(k.to(MMA)), scores, PRECISION)
    else:
        for slice_k in range(0, D_QK, BK):
            q = load_tile(q_ptr, tile, q_st, slice_k, T, D_QK, BT, BK)
            k = load_tile(k_ptr, tile, k_st, slice_k, T, D_QK, BT, BK)
            scores = dot(q.to(MMA), tl.trans(k.to(MMA)), scores, PRECISION)
    scores *= causal_weights(b, i, m, BT) * scale
    v = load_tile(v_ptr, tile, v_st, first_v, T, D_V, BT, BV)
    acc = dot(cast(scores, MMA), v.to(MMA), acc, PRECISION)
    den += tl.sum(scores, 1)

    norm = tl.maximum(tl.abs(den), tl.exp(-m)) + eps
    h_ptr += (head // H) * h_sb + (head % H) * h_sh
    store_tile(h_ptr, cast(acc / norm[:, None], h_ptr.dtype.element_ty), tile, h_st, first_v, T, D_V, BT, BV)
    first = (rows >= 0) & (block_v == 0)
    tl.store(den_ptr + at_t, den, mask=first)
    tl.store(m_ptr + at_t, m, mask=first)
