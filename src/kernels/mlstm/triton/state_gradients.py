"""Backward recurrence: the gradient of the state after every chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import load_state, load_tile, store_state
from xlstm_scaling.kernels.triton_math import cast, dot


@triton.jit
def state_gradients_kernel(
    q_ptr, dh_ptr, b_ptr, g_ptr, m_ptr, m_tile_ptr, inv_n_ptr, dden_ptr, C_ptr, n_ptr, dC_last_ptr, dn_last_ptr,
    dC_ptr, dn_ptr, passing_ptr, dC0_ptr, dn0_ptr,
    q_sb, q_sh, q_st, dh_sb, dh_sh, dh_st,
    H, T, TILES, CHUNKS, scale,
    HAS_LAST: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, NT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-> dC (B·H, CHUNKS, d_qk, d_v), dn (B·H, CHUNKS, d_qk): gradients of the state after each chunk; of the first
    state; and a program's part of <C before the chunk, dC after it> + <n, dn>, (programs of a head, B·H, CHUNKS).

    dC = exp(g + m − m') dC' + Σ_t exp(b_t + m − m_t) q_t dNUM_tᵀ with dNUM_t = dh_t / N_t.
    """
    blocks_k: tl.constexpr = (D_QK + BK - 1) // BK
    blocks_v: tl.constexpr = (D_V + BV - 1) // BV
    pid = tl.program_id(0)
    block_v, block_k = pid % blocks_v, (pid // blocks_v) % blocks_k
    head = (pid // (blocks_v * blocks_k)).to(tl.int64)
    heads = tl.num_programs(0) // (blocks_v * blocks_k)
    passing_ptr += ((block_k * blocks_v + block_v) * heads.to(tl.int64) + head) * CHUNKS
    first_k, first_v = block_k * BK, block_v * BV
    dk, rows = first_k + tl.arange(0, BK), tl.arange(0, BT)
    own_n = (dk < D_QK) & (block_v == 0)
    q_ptr += (head // H) * q_sb + (head % H) * q_sh
    dh_ptr += (head // H) * dh_sb + (head % H) * dh_sh
    b_ptr += head * TILES * BT
    m_ptr += head * TILES * BT
    inv_n_ptr += head * TILES * BT
    dden_ptr += head * TILES * BT
    g_ptr += head * TILES
    m_tile_ptr += head * (TILES + 1)

    dC = tl.zeros((BK, BV), tl.float32)
    dn = tl.zeros((BK,), tl.float32)
    if HAS_LAST:
        dC = load_state(dC_last_ptr + head * D_QK * D_V, first_k, first_v, D_QK, D_V, BK, BV)
        dn = tl.load(dn_last_ptr + head * D_QK + dk, mask=dk < D_QK, other=0.0)
    for back in range(0, TILES):
        tile = TILES - 1 - back
        if (tile == TILES - 1) | (tile % NT == NT - 1):
            chunk = head * CHUNKS + tile // NT
            dC_out = cast(dC, dC_ptr.dtype.element_ty)
            store_state(dC_ptr + chunk * D_QK * D_V, dC_out, first_k, first_v, D_QK, D_V, BK, BV)
            tl.store(dn_ptr + chunk * D_QK + dk, dn, mask=own_n)
            C = load_state(C_ptr + chunk * D_QK * D_V, first_k, first_v, D_QK, D_V, BK, BV)
            n = tl.load(n_ptr + chunk * D_QK + dk, mask=own_n, other=0.0)
            tl.store(passing_ptr + tile // NT, tl.sum(tl.sum(C.to(tl.float32) * dC, 1) + n * dn, 0))
        q = load_tile(q_ptr, tile, q_st, first_k, T, D_QK, BT, BK)
        dh = load_tile(dh_ptr, tile, dh_st, first_v, T, D_V, BT, BV)
        at_t = tile * BT + rows
        m = tl.load(m_tile_ptr + tile)
        row = tl.exp((m - tl.load(m_ptr + at_t)) + tl.load(b_ptr + at_t)) * scale
        carry = tl.exp((m - tl.load(m_tile_ptr + tile + 1)) + tl.load(g_ptr + tile))
        weighted = q.to(tl.float32) * (row * tl.load(inv_n_ptr + at_t))[:, None]  # [BT, BK]
        dC = dot(tl.trans(cast(weighted, MMA)), dh.to(MMA), dC * carry, PRECISION)
        dn = dn * carry + tl.sum(q.to(tl.float32) * (row * tl.load(dden_ptr + at_t))[:, None], 0)
    store_state(dC0_ptr + head * D_QK * D_V, dC, first_k, first_v, D_QK, D_V, BK, BV)
    tl.store(dn0_ptr + head * D_QK + dk, dn, mask=own_n)
