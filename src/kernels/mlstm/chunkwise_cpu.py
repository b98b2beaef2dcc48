"""mLSTM, chunkwise-parallel form for CPUs: products over groups of chunks, few passes between them, gradients by hand.

The form for machines without a C++ compiler (``chunkwise_cpp``). Matrix products are fast on a CPU; what lies between
them is not: memory traffic, conversions to and from bf16, the overhead of each call. So the weights of the gates are
factorised (see ``gates``) and enter q and k once, in place of a matrix of weights a chunk; the normaliser n and its
gradients are one more column of C and of its gradients; chunks are worked on in groups that share scratch memory; only
the states before each chunk are kept for the backward pass.

In a chunk, with queries q̃ = q d_qk^-1/2 exp(ref − M), keys k̃ = k exp(source − ref), values ṽ = (v, 1) and the state
before it C̃ = (C, n) relative to exp(ref): P = tril(q̃ k̃ᵀ), (numerator, denominator) = P ṽ + q̃ C̃,
h = numerator / (max(|denominator|, exp(−m)) + eps); the state after it is C̃ + k̃ᵀ ṽ, rescaled to the next reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from xlstm_scaling.kernels.mlstm.gates import LOWEST, ChunkGates, chunk_gates, gate_gradients
from xlstm_scaling.kernels.mlstm.state import EPS, MLSTMState, check_inputs, state_dtype
from xlstm_scaling.kernels.registry import register

#: forget pre-activation of padding: log sigmoid(1e4) = 0
PAD_FORGET = 1e4
#: bytes of P over all chunks of a group
GROUP_BYTES = 2**20
#: chunks between those for which the mass that crosses their start is taken from the states, not from sums over tokens
ANCHOR = 8
#: tokens of a chunk, unless told
CHUNK = 64


@register("mlstm", form="chunkwise", backend="cpu")
def mlstm_chunkwise_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, MLSTMState]:
    """q, k (B, H, T, d_qk), v (B, H, T, d_v), i, f (B, H, T) -> h (B, H, T, d_v), last state; any T, any strides.

    What ``mlstm_chunkwise`` computes (Beck et al., xLSTM, appendix), with exact first derivatives of h and of the last
    state with respect to all inputs and the initial state. Gates, maxima, states and products are fp32, fp64 for fp64:
    products in bf16 round the denominator, and dq was off by up to 15 times what the reference is. ``chunk_size``:
    tokens of a chunk at most; fewer where gates close so fast that the weights within a chunk would leave the range of
    fp32.
    Raises ValueError on shapes that do not match and on chunks of less than one token.
    """
    check_inputs(q, k, v, i, f)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} is less than one token")
    T = q.shape[2]
    inputs = (q, k, v, i, f, *((None,) * 3 if state is None else state))
    L = default_chunk_size(T) if chunk_size is None else min(chunk_size, T)
    graded = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if any(graded):
        h, *last = _Chunkwise.apply(*inputs, L)
    else:
        h, *last, _ = _forward(*inputs, L, keep=False)
    return h, MLSTMState(*last)


def default_chunk_size(T: int) -> int:
    """Chunks of at most CHUNK tokens that need the least padding."""
    return -(-T // -(-T // CHUNK))


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, chunk_size = inputs
        ctx.set_materialize_grads(False)
        # detached, or each view of an input would be tracked
        detached = [None if x is None else x.detach() for x in tensors]
        h, C, n, m, kept = _forward(*detached, chunk_size, keep=True)
        q, k, v, _, f, *_ = tensors
        ctx.save_for_backward(q, k, v, f, h, kept.states)
        ctx.kept = kept._replace(states=None)
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        return h, C, n, m

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, states = (x.detach() for x in ctx.saved_tensors)
        gradients = _backward(ctx.kept._replace(states=states), *saved, *d_outputs)
        return *(x if x is None else x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes)), None


class _Kept(NamedTuple):
    """What the forward pass leaves for the backward pass, apart from its inputs and outputs."""

    gates: ChunkGates
    states: Tensor | None  #: C̃ (N + 1, R, d_qk, d_v + 1) before each chunk and after the last
    denominator: Tensor  #: (N, R, L, 1)
    inverse: Tensor  #: (N, R, L, 1), of the normaliser
    past: bool  #: an initial state was given
    group: int  #: chunks a group


def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C_0: Tensor | None, n_0: Tensor | None, m_0: Tensor | None, chunk_size: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, _Kept | None]:  # fmt: skip
    """h, C, n, m and, if ``keep``, what the backward pass needs. R = B·H heads; tiles: heads of chunks."""
    B, H, T, d_qk = q.shape
    d_v = v.shape[-1]
    R, width = B * H, d_v + 1
    dtype = state_dtype(q.dtype)
    pad = -T % chunk_size
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        i, f = F.pad(i, (0, pad), value=LOWEST), F.pad(f, (0, pad), value=PAD_FORGET)
    i, f = (x.to(dtype).reshape(R, T + pad) for x in (i, f))
    gates = chunk_gates(i, f, None if m_0 is None else m_0.reshape(R), chunk_size, d_qk**-0.5)
    L = gates.chunk_size
    N = (T + pad) // L
    group = max(1, min(N, GROUP_BYTES // (R * L * L * dtype.itemsize)))
    tiles = group * R

    C = torch.zeros(R, d_qk, width, dtype=dtype)  # C̃ before the next chunk
    past = C_0 is not None
    if past:
        C[..., :d_v] = C_0.reshape(R, d_qk, d_v)
        C[..., d_v] = n_0.reshape(R, d_qk)
        C.mul_(gates.decay[0])
    states = torch.empty((N if keep else group) + 1, R, d_qk, width, dtype=dtype)
    update = states[1:].view(-1, d_qk, width)
    h = _empty(v, T + pad)
    denominator, inverse = torch.empty(2, N, R, L, 1, dtype=dtype).unbind()
    scratch = (
        *torch.empty(2, tiles, L, d_qk, dtype=dtype).unbind(),
        *torch.empty(2, tiles, L, width, dtype=dtype).unbind(),
        torch.empty(tiles, L, L, dtype=dtype),
    )
    scratch[2][..., d_v:] = 1
    weights = gates.query, gates.key, inverse
    chunked = [_tiles(x, L) for x in (q, k, v, h)] + [x.view(N, B, H, L, 1) for x in weights]
    vectors = [x.view(N * R, L, 1) for x in (gates.floor, denominator, inverse)]
    for start in range(0, N, group):
        n = min(group, N - start)
        q5, k5, v5, h5, query, key, inv5 = _cut(chunked, start, start + n)
        floor, den, inv = _cut(vectors, start * R, (start + n) * R)
        queries, keys, values, outputs, P = _cut(scratch, 0, n * R)
        shape = n, B, H, L
        torch.mul(q5, query, out=queries.view_as(q5))
        torch.mul(k5, key, out=keys.view_as(k5))
        values.view(*shape, width)[..., :d_v].copy_(v5)
        # states before each chunk
        first = start if keep else 0
        states[first].copy_(C)
        torch.bmm(keys.transpose(1, 2), values, out=update[first * R : (first + n) * R])
        slots = states[first : first + n + 1].unbind()
        for j in range(n):
            C = slots[j + 1].add_(slots[j]).mul_(gates.decay[start + j + 1])
        # outputs; before the first chunk there may be nothing
        torch.bmm(queries, keys.transpose(1, 2), out=P).tril_()
        torch.bmm(P, values, out=outputs)
        a = 0 if past or start else R
        if a < n * R:
            outputs[a:].baddbmm_(queries[a:], states[first : first + n].view(n * R, d_qk, width)[a:])
        den.copy_(outputs[..., d_v:])
        torch.maximum(den.abs(), floor, out=inv).add_(EPS).reciprocal_()
        torch.mul(outputs.view(*shape, width)[..., :d_v], inv5, out=h5)
    C_last, n_last = C[..., :d_v].reshape(B, H, d_qk, d_v), C[..., d_v].reshape(B, H, d_qk)
    kept = _Kept(gates, states, denominator, inverse, past, group) if keep else None
    return h[:, :, :T], C_last, n_last, gates.m.view(B, H), kept


def _backward(
    kept: _Kept, q: Tensor, k: Tensor, v: Tensor, f: Tensor, h: Tensor,
    dh: Tensor | None, dC_last: Tensor | None, dn_last: Tensor | None, dm_last: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, i, f and of the initial C, n, m, None where there was none.

    With normaliser N_t: d numerator = dh / N and, where |denominator| decides it, d denominator = −sign (dh·h) / N. The
    gradient of the log-weight of a pair is its mass G = P ∘ dP, dP = (d numerator, d denominator) ṽᵀ: i_s receives all
    mass that leaves s, log σ(f_u) all that crosses u.
    """
    gates, states, denominator, inverse, past, group = kept
    B, H, T, d_qk = q.shape
    d_v = v.shape[-1]
    N, R, L, _ = inverse.shape
    width, tiles = d_v + 1, group * R
    dtype = states.dtype
    if dh is None:
        dh = torch.zeros_like(h)
    pad = N * L - T
    if pad:
        q, k, v, h, dh = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v, h, dh))
    dq, dk, dv = (_empty(x, T + pad) for x in (q, k, v))

    # dC: gradient of the state after a chunk, relative to the chunk's ref
    dC = torch.zeros(R, d_qk, width, dtype=dtype)
    future = dC_last is not None or dn_last is not None
    if dC_last is not None:
        dC[..., :d_v] = dC_last.reshape(R, d_qk, d_v)
    if dn_last is not None:
        dC[..., d_v] = dn_last.reshape(R, d_qk)
    dC.mul_(gates.decay[N])
    dstates = torch.empty(group + 1, R, d_qk, width, dtype=dtype)
    update = dstates[:-1].view(-1, d_qk, width)

    scratch = (
        *torch.empty(3, tiles, L, d_qk, dtype=dtype).unbind(),
        *torch.empty(3, tiles, L, width, dtype=dtype).unbind(),
        *torch.empty(3, tiles, L, L, dtype=dtype).unbind(),
    )
    scratch[3][..., d_v:] = 1
    sign = denominator.sign().mul_(denominator.abs() > gates.floor).neg_()
    # mass at (into the past: row, from the future: column) each token, and across the start of every ANCHOR-th chunk
    diagonal, row, row_past, column, column_future, dh_h = torch.zeros(6, N * R, L, 1, dtype=dtype).unbind()
    anchors = torch.zeros(-(-N // ANCHOR), R, dtype=dtype)
    weights = gates.query, gates.key, inverse
    chunked = [_tiles(x, L) for x in (q, k, v, h, dh, dq, dk, dv)] + [x.view(N, B, H, L, 1) for x in weights]
    vectors = [x.view(N * R, L, 1) for x in (sign, dh_h, diagonal, row, row_past, column, column_future)]
    for start in reversed(range(0, N, group)):
        n = min(group, N - start)
        q5, k5, v5, h5, dh5, dq5, dk5, dv5, query, key, inv5 = _cut(chunked, start, start + n)
        sgn, s, diag, ro, ro_past, co, co_future = _cut(vectors, start * R, (start + n) * R)
        queries, keys, narrow, values, dout, wide, P_t, dP_t, mass = _cut(scratch, 0, n * R)
        shape = n, B, H, L
        a = 0 if past or start else R  # tiles with a past
        z = n * R if future or start + n < N else (n - 1) * R  # tiles with a future
        torch.mul(q5, query, out=queries.view_as(q5))
        torch.mul(k5, key, out=keys.view_as(k5))
        values.view(*shape, width)[..., :d_v].copy_(v5)
        queries_t = queries.transpose(1, 2)
        # gradients of numerator and denominator
        dout5 = dout.view(*shape, width)[..., :d_v]
        torch.mul(dh5, inv5, out=dout5)
        torch.sum(torch.mul(dout5, h5, out=wide.view(*shape, width)[..., :d_v]), -1, out=s.view(shape))
        torch.mul(s, sgn, out=dout[..., d_v:])
        # gradients of the states
        before = states[start : start + n].view(n * R, d_qk, width)
        slots, added = dstates.unbind(), update.view(-1, *dC.shape).unbind()
        slots[n].copy_(dC)  # before the products: it lies in the first slot
        if a < n * R:
            torch.bmm(queries_t[a:], dout[a:], out=update[a : n * R])
        for j in reversed(range(n)):
            c = start + j
            if c or past:
                dC = added[j].add_(slots[j + 1])
                if c % ANCHOR == 0:
                    torch.sum(dC * states[c], (-1, -2), out=anchors[c // ANCHOR])
                dC.mul_(gates.decay[c])
        after = dstates[1 : n + 1].view(n * R, d_qk, width)[:z]
        # pairs within a chunk
        torch.bmm(keys, queries_t, out=P_t).triu_()
        torch.bmm(values, dout.transpose(1, 2), out=dP_t).triu_()
        torch.mul(dP_t, P_t, out=mass)
        self_mass = mass.diagonal(0, 1, 2).unsqueeze(-1)
        diag.copy_(self_mass)
        self_mass.zero_()
        torch.sum(mass, -2, out=ro.squeeze(-1))
        torch.sum(mass, -1, keepdim=True, out=co)
        # queries
        product = wide.view(-1)[: n * R * L * d_qk].view(n * R, L, d_qk) if d_qk <= width else torch.empty_like(narrow)
        narrow[:a] = 0
        if a < n * R:
            torch.bmm(dout[a:], before[a:].transpose(1, 2), out=narrow[a:])
            torch.mul(narrow[a:], queries[a:], out=product[a:])
            torch.sum(product[a:], -1, keepdim=True, out=ro_past[a:])
        torch.mul(narrow.baddbmm_(dP_t.transpose(1, 2), keys).view_as(q5), query, out=dq5)
        # keys
        narrow[z:] = 0
        if z:
            torch.bmm(values[:z], after.transpose(1, 2), out=narrow[:z])
            torch.mul(narrow[:z], keys[:z], out=product[:z])
            torch.sum(product[:z], -1, keepdim=True, out=co_future[:z])
        torch.mul(narrow.baddbmm_(dP_t, queries).view_as(k5), key, out=dk5)
        # values
        torch.bmm(P_t, dout, out=wide)
        if z:
            wide[:z].baddbmm_(keys[:z], after)
        dv5.copy_(wide.view(*shape, width)[..., :d_v])

    column.add_(column_future)
    crossing, end = _crossing(anchors, (column - row - row_past).view(N, R, L))
    dm = None if dm_last is None else dm_last.reshape(R)
    di, df, dm_0 = gate_gradients(gates, f, diagonal.add_(column), crossing, end, dh_h, dm)
    d_tokens = (x[:, :, :T] for x in (dq, dk, dv, di.view(B, H, -1), df.view(B, H, -1)))
    if not past:
        return *d_tokens, None, None, None
    return *d_tokens, dC[..., :d_v].reshape(B, H, d_qk, d_v), dC[..., d_v].reshape(B, H, d_qk), dm_0.view(B, H)


def _crossing(anchors: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Mass that crosses each token (N, R, L) and the end (R,): across the anchor before it, and the steps between.

    anchors (·, R): mass across the start of every ANCHOR-th chunk; step (N, R, L): what leaves a token less what
    arrives.
    """
    N, R, L = step.shape
    step = F.pad(step, (0, 0, 0, 0, 0, -N % ANCHOR)).view(-1, ANCHOR, R, L).transpose(1, 2).reshape(-1, R, ANCHOR * L)
    # not after less step: that rounds what is small beside step
    after = torch.cat([anchors[..., None], step], -1).cumsum(-1)
    crossing = after[..., :-1].reshape(-1, R, ANCHOR, L).transpose(1, 2).reshape(-1, R, L)
    return crossing[:N], after[-1, :, -1]


def _cut(tensors: Sequence[Tensor], start: int, end: int) -> Sequence[Tensor]:
    """A range of the first axis of each."""
    return tensors if len(tensors[0]) == end - start else [x[start:end] for x in tensors]


def _tiles(x: Tensor, L: int) -> Tensor:
    """(B, H, N·L, d) as (N, B, H, L, d), a view whatever the strides."""
    B, H, T, d = x.shape
    return x.view(B, H, T // L, L, d).permute(2, 0, 1, 3, 4)


def _empty(like: Tensor, T: int) -> Tensor:
    """(B, H, T, d), laid out as (B, T, H, d) unless ``like`` is contiguous."""
    B, H, _, d = like.shape
    return like.new_empty(B, H, T, d) if like.is_contiguous() else like.new_empty(B, T, H, d).transpose(1, 2)
