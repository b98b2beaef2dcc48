"""Gradients of the gates' pre-activations from the masses that the query and key kernels counted."""

from __future__ import annotations

import triton
import triton.language as tl

from xlstm_scaling.kernels.triton_math import cast


@triton.jit
def gate_gradients_kernel(
    i_ptr, f_ptr, g_ptr, m_ptr, m_tile_ptr, dm_ptr, flow_ptr, carried_ptr, dm_last_ptr,
    received_ptr, row_ptr, sent_ptr, column_ptr, tile_column_ptr, crossing_ptr, passing_ptr,
    di_ptr, df_ptr, dm0_ptr,
    f_sb, f_sh, f_st,
    H, T, TILES, CHUNKS,
    NT: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, SCAN: tl.constexpr,
    RECEIVED_BLOCKS: tl.constexpr, SENT_BLOCKS: tl.constexpr, PASSING_BLOCKS: tl.constexpr,
):  # fmt: skip
    """-> di, df (B, H, T); and what the chain of max states adds to dm of the first state (B·H).

    The gradient of log σ(f_u) is all mass G_ts with s < u ≤ t: over the whole tile (received by later tiles from before
    it, sent by earlier tiles behind the chunk, passing through the chunk), ending in the tile at or after u (row),
    starting in it before u (column), and inside it (crossing). m_t = max(log σ(f_t) + m_{t−1}, i_t) hands its gradient
    to the forget gates back to the token whose input gate is the maximum, and to that gate.
    """
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    heads = (tl.num_programs(0) // TILES).to(tl.int64)
    chunk, start = tile // NT, (tile // NT) * NT
    end = tl.minimum(start + NT, TILES)
    columns = tl.arange(0, BT)
    t = tile * BT + columns
    inside = t < T
    t = t.to(tl.int64)
    at_t = head * TILES * BT + t
    m_tile_ptr += head * (TILES + 1)
    g_ptr += head * TILES

    # mass across the whole tile
    index = start + tl.arange(0, WIDTH)
    whole = 0.0
    for block in tl.static_range(RECEIVED_BLOCKS):
        after = (index > tile) & (index < end)
        at = (((block * heads + head) * TILES) + index) * NT + tile - start
        whole += tl.sum(tl.load(received_ptr + at, mask=after, other=0.0), 0)
    for block in tl.static_range(SENT_BLOCKS):
        at = (block * heads + head) * TILES + index
        whole += tl.sum(tl.load(sent_ptr + at, mask=index < tile, other=0.0), 0)
    passing = 0.0
    for block in tl.static_range(PASSING_BLOCKS):
        passing += tl.load(passing_ptr + (block * heads + head) * CHUNKS + chunk)
    decay = tl.sum(tl.load(g_ptr + index, mask=index < end, other=0.0), 0)
    whole += passing * tl.exp((tl.load(m_tile_ptr + start) - tl.load(m_tile_ptr + end)) + decay)

    # mass that ends, starts or stays in the tile
    later = columns > 0  # entry t − 1 counts for token t
    ending = tl.zeros((BT,), tl.float32)
    starting = tl.zeros((BT,), tl.float32)
    di = tl.load(tile_column_ptr + at_t)
    for block in tl.static_range(RECEIVED_BLOCKS):
        ending += tl.load(row_ptr + block * heads * TILES * BT + at_t)
    for block in tl.static_range(SENT_BLOCKS):
        part = block * heads * TILES * BT
        starting += tl.load(column_ptr + part + at_t - 1, mask=later, other=0.0)
        di += tl.load(column_ptr + part + at_t)
    dlog_f = whole + tl.cumsum(ending, 0, reverse=True) + tl.cumsum(starting, 0)
    dlog_f += tl.load(crossing_ptr + at_t - 1, mask=later, other=0.0)

    # the chain of max states: what flows back into this tile's end
    inflow = 0.0
    open_ = 1
    for block in range(tile + 1, TILES, SCAN):
        tiles = block + tl.arange(0, SCAN)
        exists = tiles < TILES
        stops = tl.load(carried_ptr + head * TILES + tiles, mask=exists, other=1) == 0
        first_stop = tl.min(tl.where(stops, tiles, TILES), 0)
        flow = tl.load(flow_ptr + head * TILES + tiles, mask=exists & (tiles <= first_stop), other=0.0)
        inflow += open_ * tl.sum(flow, 0)
        open_ = tl.where(first_stop < TILES, 0, open_)
    inflow += open_ * tl.load(dm_last_ptr + head)
    f = tl.load(f_ptr + (head // H) * f_sb + (head % H) * f_sh + t * f_st, mask=inside, other=0.0)
    fresh = tl.load(i_ptr + at_t) >= tl.load(m_ptr + at_t)
    count = tl.cumsum(fresh.to(tl.int32), 0)
    dm = tl.load(dm_ptr + at_t)
    # dm_t' reaches t where no maximum is fresh in between
    reaches = (columns[:, None] <= columns[None, :]) & (count[:, None] == count[None, :])
    chain = tl.sum(tl.where(reaches, dm[None, :], 0.0), 1)
    chain += tl.where(count == tl.max(count, 0), inflow, 0.0)
    di += tl.where(fresh, chain, 0.0)
    dlog_f += tl.where(fresh, 0.0, chain)

    df = dlog_f * tl.sigmoid(-f.to(tl.float32))
    tl.store(di_ptr + head * T + t, cast(di, di_ptr.dtype.element_ty), mask=inside)
    tl.store(df_ptr + head * T + t, cast(df, df_ptr.dtype.element_ty), mask=inside)
    if tile == 0:
        through = tl.where(tl.sum(fresh.to(tl.int32), 0) == 0, inflow, 0.0)
        tl.store(dm0_ptr + head, tl.load(flow_ptr + head * TILES) + through)
