"""Outputs of a tile: from the state before its chunk, the tiles before it in the chunk, and itself."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import causal_weights, sum_between
from xlstm_scaling.kernels.triton_math import cast, dot


@triton.jit
def outputs_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, b_ptr, r_ptr, g_ptr, C_ptr, n_ptr, m_tile_ptr,
    h_ptr, den_ptr, m_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, h_sb, h_sh, h_st,
    H, T, TILES, CHUNKS, scale, eps,
    D_QK: tl.constexpr, D_V: tl.constexpr, NT: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-> h (B, H, T, d_v), den = n_tᵀ q_t and m_t (B·H, TILES·BT) for the backward.

    A program computes [BT, BV] outputs; products over d_qk run in slices of BK.
    """
    blocks_v: tl.constexpr = tl.cdiv(D_V, BV)
    pid = tl.program_id(0)
    block_v, tile = pid % blocks_v, (pid // blocks_v) % TILES
    head = (pid // (blocks_v * TILES)).to(tl.int64)
    start = (tile // NT) * NT  # first tile of the chunk
    chunk = head * CHUNKS + tile // NT
    t = tile * BT + tl.arange(0, BT)
    inside = t < T
    t = t.to(tl.int64)
    dv = block_v * BV + tl.arange(0, BV)
    in_v = dv < D_V
    q_ptr += (head // H) * q_sb + (head % H) * q_sh
    k_ptr += (head // H) * k_sb + (head % H) * k_sh
    v_ptr += (head // H) * v_sb + (head % H) * v_sh
    g_ptr += head * TILES
    m_tile_ptr += head * (TILES + 1)
    m_i = tl.load(m_tile_ptr + tile)

    # the state before the chunk
    acc = tl.zeros((BT, BV), tl.float32)
    den = tl.zeros((BT,), tl.float32)
    for start_k in tl.static_range(0, D_QK, BK):
        dk = start_k + tl.arange(0, BK)
        in_k = dk < D_QK
        q = tl.load(q_ptr + t[:, None] * q_st + dk[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
        at_C = chunk * D_QK * D_V + dk.to(tl.int64)[:, None] * D_V + dv[None, :]
        C = tl.load(C_ptr + at_C, mask=in_k[:, None] & in_v[None, :], other=0.0)
        n = tl.load(n_ptr + chunk * D_QK + dk, mask=in_k, other=0.0)
        acc = dot(q.to(MMA), C.to(MMA), acc, PRECISION)
        den += tl.sum(q.to(tl.float32) * n[None, :], 1)
    step = tl.exp((tl.load(m_tile_ptr + start) - m_i) + sum_between(g_ptr, start, tile, WIDTH)) * scale
    acc *= step
    den *= step

    # the tiles before, in the chunk
    for source in range(start, tile):
        s = source * BT + tl.arange(0, BT).to(tl.int64)  # all inside
        scores = tl.zeros((BT, BT), tl.float32)
        for start_k in tl.static_range(0, D_QK, BK):
            dk = start_k + tl.arange(0, BK)
            in_k = dk < D_QK
            q = tl.load(q_ptr + t[:, None] * q_st + dk[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
            k = tl.load(k_ptr + s[:, None] * k_st + dk[None, :], mask=in_k[None, :], other=0.0)
            scores = dot(q.to(MMA), tl.trans(k.to(MMA)), scores, PRECISION)
        m_next = tl.load(m_tile_ptr + source + 1)
        column = tl.load(i_ptr + head * TILES * BT + s) - m_next + tl.load(r_ptr + head * TILES * BT + s)
        step = tl.exp((m_next - m_i) + sum_between(g_ptr, source + 1, tile, WIDTH)) * scale
        scores *= (tl.exp(column) * step)[None, :]
        v = tl.load(v_ptr + s[:, None] * v_st + dv[None, :], mask=in_v[None, :], other=0.0)
        acc = dot(cast(scores, MMA), v.to(MMA), acc, PRECISION)
        den += tl.sum(scores, 1)

    # the tile itself
    b = tl.load(b_ptr + head * TILES * BT + t)
    i = tl.load(i_ptr + head * TILES * BT + t)
    columns = tl.arange(0, BT)
    exponent = (b[:, None] - b[None, :]) + i[None, :]
    exponent = tl.where(columns[:, None] >= columns[None, :], exponent, float("-inf"))
    m = tl.maximum(b + m_i, tl.max(exponent, 1))
    row = tl.exp((m_i - m) + b)
    acc *= row[:, None]
    den *= row
    scores = tl.zeros((BT, BT), tl.float32)
    for start_k in tl.static_range(0, D_QK, BK):
        dk = start_k + tl.arange(0, BK)
        in_k = inside[:, None] & (dk < D_QK)[None, :]
        q = tl.load(q_ptr + t[:, None] * q_st + dk[None, :], mask=in_k, other=0.0)
        k = tl.load(k_ptr + t[:, None] * k_st + dk[None, :], mask=in_k, other=0.0)
        scores = dot(q.to(MMA), tl.trans(k.to(MMA)), scores, PRECISION)
    scores *= causal_weights(b, i, m, BT) * scale
    v = tl.load(v_ptr + t[:, None] * v_st + dv[None, :], mask=inside[:, None] & in_v[None, :], other=0.0)
    acc = dot(cast(scores, MMA), v.to(MMA), acc, PRECISION)
    den += tl.sum(scores, 1)

    norm = tl.maximum(tl.abs(den), tl.exp(-m)) + eps
    h_ptr += (head // H) * h_sb + (head % H) * h_sh
    out = inside[:, None] & in_v[None, :]
    tl.store(h_ptr + t[:, None] * h_st + dv[None, :], cast(acc / norm[:, None], h_ptr.dtype.element_ty), mask=out)
    tl.store(den_ptr + head * TILES * BT + t, den, mask=(columns >= 0) & (block_v == 0))
    tl.store(m_ptr + head * TILES * BT + t, m, mask=(columns >= 0) & (block_v == 0))
