"""Gates of a chunkwise mLSTM as weights of keys and queries that factorise, and the way back to gate gradients.

With b_t = Σ_{u ≤ t} log σ(f_u) and source_s = i_s − b_s, the maximum of the log-weights of token t is m_t = b_t + M_t with
M_t = max(m_0, max_{s ≤ t} source_s), and the weight of token s in it is

    exp(D_ts − m_t) = exp(source_s − ref) · exp(ref − M_t)      for any reference ``ref``.

M never falls, so with one reference a chunk, in the middle of the range that M runs through there, both factors of all
pairs s ≤ t stay within exp(±RANGE / 2). Chunks in which M rises by more than RANGE are cut into shorter ones. b and M are
accumulated in float64: over 65,536 tokens of closed gates b reaches −10⁶.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.kernels.mlstm.state import EPS

#: largest rise of M within a chunk: exp(±RANGE / 2) times activations and their gradients stay normal fp32 and bf16 numbers
RANGE = 80.0
#: no source lies below: exp of a difference to it is 0, and it is finite
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
    """Gate pre-activations i, f (R, T) and the initial maximum m (R,), 0 if None; ``chunk_size`` divides T.

    Chunks may come out shorter, by a factor that divides ``chunk_size``.
    """
    R, T = i.shape
    b = F.logsigmoid(f).cumsum(-1, dtype=torch.float64)
    source = torch.empty(R, T + 1, dtype=torch.float64)
    source[:, 0] = 0 if m is None else m
    torch.sub(i, b, out=source[:, 1:])
    M, origin = source.clamp_(min=LOWEST).cummax(-1)

    L = chunk_size
    while True:
        bounds = M[:, ::L].t()  # (N + 1, R)
        rise = bounds[1:] - bounds[:-1]
        if L == 1 or rise.max().item() <= RANGE:
            break
        L = next(shorter for shorter in range(L // 2, 0, -1) if L % shorter == 0)
    N = T // L
    ref = torch.empty(N + 2, R, dtype=torch.float64)
    ref[:: N + 1] = bounds[::N]
    torch.sub(bounds[1:], rise.mul_(0.5).clamp_(max=RANGE / 2), out=ref[1:-1])

    weights = torch.empty(3, N, R, L, 1, dtype=i.dtype)
    chunks = (N, R, L), (L, T + 1, 1)
    middle = ref[1:-1, :, None]
    torch.sub(source.as_strided(*chunks, 1), middle, out=weights[0, ..., 0])
    torch.sub(middle, M.as_strided(*chunks, 1), out=weights[1, ..., 0])
    m_t = b.add_(M[:, 1:]).neg_()
    weights[2, ..., 0] = m_t.view(R, N, L).transpose(0, 1)
    key, query, floor = weights.exp_().unbind()
    decay = (ref[:-1] - ref[1:]).to(i.dtype).exp_()[..., None, None].unbind()
    return ChunkGates(L, key, query.mul_(scale), floor, decay, origin[:, 1:], m_t[:, -1].neg().to(i.dtype))


def gate_gradients(
    gates: ChunkGates, f: Tensor, di: Tensor, step: Tensor, anchors: Tensor, span: int, dh_h: Tensor, dm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of i (R, T), f (R, T or less) and of the initial maximum (R,).

    di, step, dh_h (N, R, L) in any shape: mass that leaves a token; what it leaves less what arrives at it, both without
    the token's weight on itself; the product of h and its gradient. anchors (·, R): mass across every ``span``-th token, from
    the first.
    dm (R,): gradient of the last maximum.
    """
    R, T = gates.origin.shape
    L = gates.chunk_size

    def tokens(x: Tensor) -> Tensor:
        return x.view(-1, R, L).transpose(0, 1).reshape(R, T)

    # across a token goes what crosses the anchor before it, plus the steps between
    step = tokens(step)
    if T % span:
        step = F.pad(step, (0, -T % span))
    step = step.view(R, -1, span)
    after = step.cumsum(-1).add_(anchors.t()[..., None])
    # h falls by eps / N times itself as m_t rises; the last state falls, by all the mass that crosses the end
    dm_t = tokens(dh_h).double().mul_(-EPS)
    dm_t[:, -1] -= after[:, -1, -1]
    if dm is not None:
        dm_t[:, -1] += dm
    crossing = after.sub_(step).view(R, -1)[:, :T]
    source = torch.zeros(R, T + 1, dtype=torch.float64).scatter_add_(-1, gates.origin, dm_t)
    di = source[:, 1:] + tokens(di)
    dm_0 = anchors[0] + source[:, 0]
    source[:, 1:] -= dm_t
    d_log = source.cumsum(-1)[:, :T].add_(crossing)
    f = f.reshape(R, -1)
    return di, d_log[:, : f.shape[-1]].mul_(torch.sigmoid(-f)), dm_0
