"""Gates of a chunkwise mLSTM as weights of keys and of queries, and the way back to the gradients of gates.

With b_t = Σ_{u ≤ t} log σ(f_u) and source_s = i_s − b_s, the maximum of the log-weights of token t is m_t = b_t + M_t,
M_t = max(m_0, max_{s ≤ t} source_s), and the weight of token s in token t is

    exp(b_t − b_s + i_s − m_t) = exp(source_s − ref) · exp(ref − M_t)      for any reference ``ref``.

M never falls. So with one reference a chunk, in the middle of what M runs through there, both factors of a pair s ≤ t
stay below exp(RANGE / 2); chunks in which M rises by more than RANGE are cut into shorter ones. b and M are float64:
over 65,536 tokens of closed gates b falls to −10⁶.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.kernels.mlstm.state import EPS

#: largest rise of M within a chunk: exp(±RANGE / 2) times an activation or its gradient is a normal number in fp32
RANGE = 80.0
#: no source lies below: the exponential of a difference to it is 0, and the difference is finite
LOWEST = -1e30


class ChunkGates(NamedTuple):
    """Weights of N chunks of L tokens; R = B·H heads. In the dtype of the gates that were given."""

    chunk_size: int
    key: Tensor  #: (N, R, L, 1) exp(source_s − ref_c)
    query: Tensor  #: (N, R, L, 1) scale · exp(ref_c − M_t)
    floor: Tensor  #: (N, R, L, 1) exp(−m_t)
    decay: tuple[
        Tensor, ...
    ]  #: N + 1 times (R, 1, 1): state of the reference before -> reference of chunk c; last: -> M_T
    origin: Tensor  #: (R, T) int64, the s in which M_t reached its maximum, from 1; 0 is the initial state
    m: Tensor  #: (R,) the last maximum


def chunk_gates(i: Tensor, f: Tensor, m: Tensor | None, chunk_size: int, scale: float) -> ChunkGates:
    """Gate pre-activations i, f (R, T), initial maximum m (R,), 0 if None; T is a multiple of ``chunk_size``.

    Where M rises too steeply chunks are shorter, by a divisor of ``chunk_size``.
    """
    R, T = i.shape
    b = F.logsigmoid(f).cumsum(-1, dtype=torch.float64)
    source = torch.empty(R, T + 1, dtype=torch.float64)  # the initial state first
    source[:, 0] = 0 if m is None else m
    torch.sub(i, b, out=source[:, 1:])
    M, origin = source.clamp_(min=LOWEST).cummax(-1)
    m_t = b.add_(M[:, 1:])

    L = chunk_size
    bounds, rise = _bounds(M, L)
    if rise.max().item() > RANGE:
        # a steep rise leaves less than exp(−RANGE / 2) of what was before, in fp64 too as good as nothing
        excess = (M[:, 1:] - M[:, :-1]).sub_(RANGE / 2).clamp_(min=0).cumsum(-1)
        source[:, 1:] -= excess
        M[:, 1:] -= excess
        bounds, rise = _bounds(M, L)
        while L > 1 and rise.max().item() > RANGE:
            L = next(shorter for shorter in range(L // 2, 0, -1) if L % shorter == 0)
            bounds, rise = _bounds(M, L)
    N = T // L
    ref = torch.empty(N + 2, R, dtype=torch.float64)
    ref[:: N + 1] = bounds[::N]
    torch.sub(bounds[1:], rise.mul_(0.5), out=ref[1:-1])

    weights = torch.empty(3, N, R, L, 1, dtype=i.dtype)
    in_chunks = (N, R, L), (L, T + 1, 1), 1
    middle = ref[1:-1, :, None]
    torch.sub(source.as_strided(*in_chunks), middle, out=weights[0, ..., 0])
    torch.sub(middle, M.as_strided(*in_chunks), out=weights[1, ..., 0])
    weights[2, ..., 0] = (-m_t).view(R, N, L).transpose(0, 1)
    key, query, floor = weights.exp_().unbind()
    decay = (ref[:-1] - ref[1:]).to(i.dtype).exp_()[..., None, None].unbind()
    return ChunkGates(L, key, query.mul_(scale), floor, decay, origin[:, 1:], m_t[:, -1].to(i.dtype))


def _bounds(M: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """M at the bounds of chunks (N + 1, R), its rise within them (N, R)."""
    bounds = M[:, ::L].t()
    return bounds, bounds[1:] - bounds[:-1]


def gate_gradients(
    gates: ChunkGates, f: Tensor, leaving: Tensor, crossing: Tensor, end: Tensor, dh_h: Tensor, dm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of i (R, T), of f (R, at most T) and of the initial maximum (R,).

    The mass of a pair is its part of the gradient of log-weights: i_s receives all that leaves s, log σ(f_u) all that
    crosses u, from before u to u or later. leaving, crossing (N, R, L), in any shape: those masses. end (R,): what
    crosses the end. dh_h, like leaving: the product of h with its gradient. dm (R,): gradient of the last maximum.
    """
    R, T = gates.origin.shape
    L = gates.chunk_size

    def tokens(x: Tensor) -> Tensor:
        return x.view(-1, R, L).transpose(0, 1).reshape(R, T)

    crossing = tokens(crossing)
    # as m_t rises h falls, by eps / N of itself, and the last state by all of it: the mass that crosses the end
    dm_t = tokens(dh_h).double().mul_(-EPS)
    dm_t[:, -1] -= end
    if dm is not None:
        dm_t[:, -1] += dm
    source = torch.zeros(R, T + 1, dtype=torch.float64).scatter_add_(-1, gates.origin, dm_t)
    di = source[:, 1:] + tokens(leaving)
    dm_0 = crossing[:, 0] + source[:, 0]
    source[:, 1:] -= dm_t
    d_log = source.cumsum(-1)[:, :T].add_(crossing)
    f = f.reshape(R, -1)
    return di, d_log[:, : f.shape[-1]].mul_(torch.sigmoid(-f)), dm_0
