"""Gradients of the values of a tile: from the tiles after it in the chunk, and the state after the chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import causal_weights, sum_between
from xlstm_scaling.kernels.triton_math import cast, dot


@triton.jit
def value_gradients_kernel(
    q_ptr, k_ptr, dh_ptr, i_ptr, b_ptr, r_ptr, g_ptr, m_ptr, m_tile_ptr, inv_n_ptr, dC_ptr,
    dv_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, dh_sb, dh_sh, dh_st, dv_sb, dv_sh, dv_st,
    H, T, TILES, CHUNKS, scale,
    D_QK: tl.constexpr, D_V: tl.constexpr, NT: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv (B, H, T, d_v): dv_s = Σ_t P_ts dNUM_t + exp(…) dCᵀ k_s. A program computes [BT, BV] of it."""
    blocks_v: tl.constexpr = tl.cdiv(D_V, BV)
    pid = tl.program_id(0)
    block_v, source = pid % blocks_v, (pid // blocks_v) % TILES
    head = (pid // (blocks_v * TILES)).to(tl.int64)
    chunk = head * CHUNKS + source // NT
    end = tl.minimum((source // NT + 1) * NT, TILES)
    s = source * BT + tl.arange(0, BT)
    inside = s < T
    s = s.to(tl.int64)
    dv = block_v * BV + tl.arange(0, BV)
    in_v = dv < D_V
    q_ptr += (head // H) * q_sb + (head % H) * q_sh
    k_ptr += (head // H) * k_sb + (head % H) * k_sh
    dh_ptr += (head // H) * dh_sb + (head % H) * dh_sh
    g_ptr += head * TILES
    m_tile_ptr += head * (TILES + 1)
    at_s = head * TILES * BT + s
    m_next = tl.load(m_tile_ptr + source + 1)

    # the state after the chunk
    acc = tl.zeros((BT, BV), tl.float32)
    for start_k in tl.static_range(0, D_QK, BK):
        dk = start_k + tl.arange(0, BK)
        in_k = dk < D_QK
        k = tl.load(k_ptr + s[:, None] * k_st + dk[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
        at_C = chunk * D_QK * D_V + dk.to(tl.int64)[:, None] * D_V + dv[None, :]
        dC = tl.load(dC_ptr + at_C, mask=in_k[:, None] & in_v[None, :], other=0.0)
        acc = dot(k.to(MMA), dC.to(MMA), acc, PRECISION)
    acc *= tl.exp((m_next - tl.load(m_tile_ptr + end)) + sum_between(g_ptr, source + 1, end, WIDTH))

    # the tiles after, in the chunk
    for tile in range(source + 1, end):
        t = tile * BT + tl.arange(0, BT)
        in_t = t < T
        t = t.to(tl.int64)
        at_t = head * TILES * BT + t
        scores = tl.zeros((BT, BT), tl.float32)  # rows s, columns t
        for start_k in tl.static_range(0, D_QK, BK):
            dk = start_k + tl.arange(0, BK)
            in_k = dk < D_QK
            k = tl.load(k_ptr + s[:, None] * k_st + dk[None, :], mask=in_k[None, :], other=0.0)
            q = tl.load(q_ptr + t[:, None] * q_st + dk[None, :], mask=in_t[:, None] & in_k[None, :], other=0.0)
            scores = dot(k.to(MMA), tl.trans(q.to(MMA)), scores, PRECISION)
        m_i = tl.load(m_tile_ptr + tile)
        row = tl.exp((m_i - tl.load(m_ptr + at_t)) + tl.load(b_ptr + at_t)) * tl.load(inv_n_ptr + at_t)
        step = tl.exp((m_next - m_i) + sum_between(g_ptr, source + 1, tile, WIDTH)) * scale
        scores *= (row * step)[None, :]
        dh = tl.load(dh_ptr + t[:, None] * dh_st + dv[None, :], mask=in_t[:, None] & in_v[None, :], other=0.0)
        acc = dot(cast(scores, MMA), dh.to(MMA), acc, PRECISION)
    i = tl.load(i_ptr + at_s)
    acc *= tl.exp((i - m_next) + tl.load(r_ptr + at_s))[:, None]

    # the tile itself
    scores = tl.zeros((BT, BT), tl.float32)
    for start_k in tl.static_range(0, D_QK, BK):
        dk = start_k + tl.arange(0, BK)
        in_k = inside[:, None] & (dk < D_QK)[None, :]
        k = tl.load(k_ptr + s[:, None] * k_st + dk[None, :], mask=in_k, other=0.0)
        q = tl.load(q_ptr + s[:, None] * q_st + dk[None, :], mask=in_k, other=0.0)
        scores = dot(k.to(MMA), tl.trans(q.to(MMA)), scores, PRECISION)
    weights = tl.trans(causal_weights(tl.load(b_ptr + at_s), i, tl.load(m_ptr + at_s), BT))
    scores *= weights * (tl.load(inv_n_ptr + at_s) * scale)[None, :]
    dh = tl.load(dh_ptr + s[:, None] * dh_st + dv[None, :], mask=inside[:, None] & in_v[None, :], other=0.0)
    acc = dot(cast(scores, MMA), dh.to(MMA), acc, PRECISION)
    dv_ptr += (head // H) * dv_sb + (head % H) * dv_sh
    tl.store(dv_ptr + s[:, None] * dv_st + dv[None, :], cast(acc, dv_ptr.dtype.element_ty),
             mask=inside[:, None] & in_v[None, :])  # fmt: skip
