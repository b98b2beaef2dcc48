"""Backward recurrence: the gradient of the state after every chunk."""

from __future__ import annotations

import triton
import triton.language as tl

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
    blocks_k: tl.constexpr = tl.cdiv(D_QK, BK)
    blocks_v: tl.constexpr = tl.cdiv(D_V, BV)
    pid = tl.program_id(0)
    block_v, block_k = pid % blocks_v, (pid // blocks_v) % blocks_k
    head = (pid // (blocks_v * blocks_k)).to(tl.int64)
    heads = tl.num_programs(0) // (blocks_v * blocks_k)
    passing_ptr += ((block_k * blocks_v + block_v) * heads.to(tl.int64) + head) * CHUNKS
    dk, dv = block_k * BK + tl.arange(0, BK), block_v * BV + tl.arange(0, BV)
    in_k, in_v = dk < D_QK, dv < D_V
    in_C = in_k[:, None] & in_v[None, :]
    at_C = dk.to(tl.int64)[:, None] * D_V + dv[None, :]
    q_ptr += (head // H) * q_sb + (head % H) * q_sh
    dh_ptr += (head // H) * dh_sb + (head % H) * dh_sh
    m_tile_ptr += head * (TILES + 1)

    dC = tl.zeros((BK, BV), tl.float32)
    dn = tl.zeros((BK,), tl.float32)
    if HAS_LAST:
        dC = tl.load(dC_last_ptr + head * D_QK * D_V + at_C, mask=in_C, other=0.0)
        dn = tl.load(dn_last_ptr + head * D_QK + dk, mask=in_k, other=0.0)
    for back in range(0, TILES):
        tile = TILES - 1 - back
        if (tile == TILES - 1) | (tile % NT == NT - 1):
            chunk = head * CHUNKS + tile // NT
            tl.store(dC_ptr + chunk * D_QK * D_V + at_C, cast(dC, dC_ptr.dtype.element_ty), mask=in_C)
            tl.store(dn_ptr + chunk * D_QK + dk, dn, mask=in_k & (block_v == 0))
            C = tl.load(C_ptr + chunk * D_QK * D_V + at_C, mask=in_C, other=0.0).to(tl.float32)
            n = tl.load(n_ptr + chunk * D_QK + dk, mask=in_k & (block_v == 0), other=0.0)
            tl.store(passing_ptr + tile // NT, tl.sum(tl.sum(C * dC, 1) + n * dn, 0))
        t = tile * BT + tl.arange(0, BT)
        inside = t < T
        t = t.to(tl.int64)
        q = tl.load(q_ptr + t[:, None] * q_st + dk[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
        dh = tl.load(dh_ptr + t[:, None] * dh_st + dv[None, :], mask=inside[:, None] & in_v[None, :], other=0.0)
        at_t = head * TILES * BT + t
        m = tl.load(m_tile_ptr + tile)
        row = tl.exp((m - tl.load(m_ptr + at_t)) + tl.load(b_ptr + at_t)) * scale
        carry = tl.exp((m - tl.load(m_tile_ptr + tile + 1)) + tl.load(g_ptr + head * TILES + tile))
        q = q.to(tl.float32) * row[:, None]
        weighted = q * tl.load(inv_n_ptr + at_t)[:, None]  # [BT, BK]
        dC = dot(tl.trans(cast(weighted, MMA)), dh.to(MMA), dC * carry, PRECISION)
        dn = dn * carry + tl.sum(q * tl.load(dden_ptr + at_t)[:, None], 0)
    tl.store(dC0_ptr + head * D_QK * D_V + at_C, dC, mask=in_C)
    tl.store(dn0_ptr + head * D_QK + dk, dn, mask=in_k & (block_v == 0))
