"""Gate pre-activations -> sums of log forget gates relative to tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.mlstm.triton.common import log_sigmoid


@triton.jit
def gate_tiles_kernel(
    i_ptr, f_ptr, input_ptr, b_ptr, r_ptr, g_ptr,
    i_sb, i_sh, i_st, f_sb, f_sh, f_st,
    H, T, TILES,
    BT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """i, f (B, H, T) -> i, b, r (B·H, TILES·BT), g (B·H, TILES), fp32; beyond T: log σ(f) = 0 and i = −inf.

    A program takes ROWS tiles.
    """
    blocks = tl.cdiv(TILES, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    tiles = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BT)
    t = tiles.to(tl.int64)[:, None] * BT + columns[None, :]  # [ROWS, BT]
    f_row = f_ptr + (head // H) * f_sb + (head % H) * f_sh
    i_row = i_ptr + (head // H) * i_sb + (head % H) * i_sh
    inside = t < T
    log_f = log_sigmoid(tl.load(f_row + t * f_st, mask=inside, other=0.0).to(tl.float32))
    log_f = tl.where(inside, log_f, 0.0)
    following = (t + 1 < T) & (columns < BT - 1)[None, :]  # the next token's gate, if it is in the tile
    log_f_next = log_sigmoid(tl.load(f_row + (t + 1) * f_st, mask=following, other=0.0).to(tl.float32))
    log_f_next = tl.where(following, log_f_next, 0.0)
    i = tl.load(i_row + t * i_st, mask=inside, other=float("-inf")).to(tl.float32)
    exists = (tiles < TILES)[:, None]
    tl.store(b_ptr + head * TILES * BT + t, tl.cumsum(log_f, 1), mask=exists)
    tl.store(r_ptr + head * TILES * BT + t, tl.cumsum(log_f_next, 1, reverse=True), mask=exists)
    tl.store(input_ptr + head * TILES * BT + t, i, mask=exists)
    tl.store(g_ptr + head * TILES + tiles, tl.sum(log_f, 1), mask=tiles < TILES)
