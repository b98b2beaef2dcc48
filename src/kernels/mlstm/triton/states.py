"""Forward recurrence: the state before every chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import load_state, load_tile, store_state
from xlstm_scaling.kernels.triton_math import cast, dot


@triton.jit
def states_kernel(
    k_ptr, v_ptr, i_ptr, r_ptr, g_ptr, C0_ptr, n0_ptr, m0_ptr,
    C_ptr, n_ptr, m_ptr, C_last_ptr, n_last_ptr, m_last_ptr,
    k_sb, k_sh, k_st, v_sb, v_sh, v_st,
    H, T, TILES, CHUNKS,
    HAS_INITIAL: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, NT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """k, v, i, r, g -> C (B·H, CHUNKS, d_qk, d_v), n (B·H, CHUNKS, d_qk) before each chunk, m (B·H, TILES + 1) before
    each tile, and the last state.

    C' = exp(g + m − m') C + Σ_s exp(i_s + r_s − m') k_s v_sᵀ with m' = max(g + m, max_s (i_s + r_s)). A program keeps a
    [BK, BV] block of C over all tokens.
    """
    blocks_k: tl.constexpr = (D_QK + BK - 1) // BK
    blocks_v: tl.constexpr = (D_V + BV - 1) // BV
    pid = tl.program_id(0)
    block_v, block_k = pid % blocks_v, (pid // blocks_v) % blocks_k
    head = (pid // (blocks_v * blocks_k)).to(tl.int64)
    first = (block_k == 0) & (block_v == 0)
    first_k, first_v = block_k * BK, block_v * BV
    dk, rows = first_k + tl.arange(0, BK), tl.arange(0, BT)
    own_n = (dk < D_QK) & (block_v == 0)
    k_ptr += (head // H) * k_sb + (head % H) * k_sh
    v_ptr += (head // H) * v_sb + (head % H) * v_sh
    i_ptr += head * TILES * BT
    r_ptr += head * TILES * BT
    g_ptr += head * TILES
    m_ptr += head * (TILES + 1)

    C = tl.zeros((BK, BV), tl.float32)
    n = tl.zeros((BK,), tl.float32)
    m = 0.0
    if HAS_INITIAL:
        C = load_state(C0_ptr + head * D_QK * D_V, first_k, first_v, D_QK, D_V, BK, BV)
        n = tl.load(n0_ptr + head * D_QK + dk, mask=dk < D_QK, other=0.0)
        m = tl.load(m0_ptr + head)
    for tile in range(0, TILES):
        if tile % NT == 0:
            chunk = head * CHUNKS + tile // NT
            C_out = cast(C, C_ptr.dtype.element_ty)
            store_state(C_ptr + chunk * D_QK * D_V, C_out, first_k, first_v, D_QK, D_V, BK, BV)
            tl.store(n_ptr + chunk * D_QK + dk, n, mask=own_n)
        tl.store(m_ptr + tile, m, mask=first)
        k = load_tile(k_ptr, tile, k_st, first_k, T, D_QK, BT, BK)
        v = load_tile(v_ptr, tile, v_st, first_v, T, D_V, BT, BV)
        i = tl.load(i_ptr + tile * BT + rows)
        r = tl.load(r_ptr + tile * BT + rows)
        g = tl.load(g_ptr + tile)
        m_next = tl.maximum(g + m, tl.max(i + r, 0))
        carry = tl.exp((m - m_next) + g)
        weighted = k.to(tl.float32) * tl.exp((i - m_next) + r)[:, None]  # [BT, BK]
        C = dot(tl.trans(cast(weighted, MMA)), v.to(MMA), C * carry, PRECISION)
        n = n * carry + tl.sum(weighted, 0)
        m = m_next
    store_state(C_last_ptr + head * D_QK * D_V, C, first_k, first_v, D_QK, D_V, BK, BV)
    tl.store(n_last_ptr + head * D_QK + dk, n, mask=own_n)
    tl.store(m_ptr + TILES, m, mask=first)
    tl.store(m_last_ptr + head, m, mask=first)
