"""mLSTM, chunkwise-parallel form for CPUs: batched products over groups of chunks, a backward pass by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from xlstm_scaling.kernels.mlstm.gates import LOWEST, chunk_gates, gate_gradients
from xlstm_scaling.kernels.mlstm.state import EPS, MLSTMState, check_inputs, state_dtype
from xlstm_scaling.kernels.registry import register

PAD_FORGET = 1e4
EXTRA = 16
GROUP = 2**19
ANCHOR = 8
SMALL = 0


@register("mlstm", form="chunkwise", backend="cpu")
def mlstm_chunkwise_cpu(q, k, v, i, f, state=None, chunk_size=None):
    check_inputs(q, k, v, i, f)
    B, H, T, d_qk = q.shape
    if chunk_size is None:
        chunk_size = default_chunk_size(q, v)
    L = min(chunk_size, T)
    inputs = (q, k, v, i, f, *((None,) * 3 if state is None else state))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        h, C, n, m = _Chunkwise.apply(*inputs, L)
    else:
        h, C, n, m, _ = _forward(*inputs, L, keep=False)
    return h, MLSTMState(C, n, m)


def default_chunk_size(q, v):
    return 64


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, i, f, C, n, m, chunk_size):
        ctx.set_materialize_grads(False)
        h, C_last, n_last, m_last, saved = _forward(q, k, v, i, f, C, n, m, chunk_size, keep=True)
        ctx.saved = saved
        ctx.save_for_backward(q, k, v, f, h, C_last, n_last)
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, i, f, C, n, m)]
        return h, C_last, n_last, m_last

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dC, dn, dm):
        grads = _backward(ctx.saved, *ctx.saved_tensors, dh, dC, dn, dm)
        return *(None if d is None or g is None else g.to(d) for g, d in zip(grads, ctx.dtypes)), None


def _tiles(x, N, L):
    """(B, H, N·L, d) as (N, B, H, L, d), a view whatever the strides."""
    B, H, _, d = x.shape
    b, h, t, e = x.stride()
    return x.as_strided((N, B, H, L, d), (L * t, b, h, t, e))


def _pad(x, pad, value=0.0):
    return F.pad(x, (0, 0, 0, pad)) if x.dim() == 4 else F.pad(x, (0, pad), value=value)


def _empty(like, B, H, T, d):
    if like.is_contiguous():
        return like.new_empty(B, H, T, d)
    return like.new_empty(B, T, H, d).transpose(1, 2)


def _forward(q, k, v, i, f, C0, n0, m0, chunk_size, keep):
    B, H, T, d_qk = q.shape
    d_v = v.shape[-1]
    R, width = B * H, d_v + EXTRA
    acc = state_dtype(q.dtype)
    low = q.dtype == torch.bfloat16 and d_qk * d_v >= SMALL
    dtype = torch.bfloat16 if low else acc
    pad = -T % chunk_size
    if pad:
        q, k, v = (_pad(x, pad) for x in (q, k, v))
        i, f = _pad(i, pad, LOWEST), _pad(f, pad, PAD_FORGET)
    gates = chunk_gates(
        i.to(acc).reshape(R, -1),
        f.to(acc).reshape(R, -1),
        None if m0 is None else m0.reshape(R),
        chunk_size,
        d_qk**-0.5,
    )
    L = gates.chunk_size
    N = (T + pad) // L
    group = max(1, min(N, GROUP // (R * L * L)))
    G = group * R
    h = _empty(v, B, H, T + pad, d_v)
    past = C0 is not None

    keys, queries = torch.empty(2, G, L, d_qk, dtype=dtype).unbind()
    values, outputs = torch.empty(2, G, L, width, dtype=dtype).unbind()
    values[..., d_v:] = _unit(dtype)
    P = torch.empty(G, L, L, dtype=dtype)
    # states before each chunk, relative to the chunk's reference
    slots = N if keep else group
    if low:
        states = torch.empty(slots * R, d_qk, width, dtype=dtype)
        update = torch.empty(G, d_qk, width, dtype=dtype)
        C = torch.zeros(R, d_qk, width, dtype=acc)
    else:
        states = torch.empty((slots + 1) * R, d_qk, width, dtype=dtype)
        C = states[:R]
        if past:
            C.zero_()
    state_of = states.split(R)
    if past:
        C[..., :d_v] = C0.reshape(R, d_qk, d_v)
        C[..., d_v] = n0.reshape(R, d_qk)
        C.mul_(gates.decay[0])
    denominator, inverse = torch.empty(2, N * R, L, 1, dtype=acc).unbind()
    query_weight = gates.query.to(dtype)
    q5, k5, v5, h5 = (_tiles(x, N, L) for x in (q, k, v, h))

    for c0 in range(0, N, group):
        c1 = min(c0 + group, N)
        g, G = slice(c0, c1), (c1 - c0) * R
        rows = slice(c0 * R, c1 * R)
        if c1 - c0 < group:
            keys, queries, values, outputs, P = (x[:G] for x in (keys, queries, values, outputs, P))
        shape = (c1 - c0, B, H, L)
        torch.mul(k5[g], gates.key[g].view(*shape, 1), out=keys.view(*shape, d_qk))
        torch.mul(q5[g], query_weight[g].view(*shape, 1), out=queries.view(*shape, d_qk))
        values.view(*shape, width)[..., :d_v].copy_(v5[g])
        s0 = c0 if keep else 0
        if low:
            torch.bmm(keys.transpose(1, 2), values, out=update[:G])
            for j, dC in enumerate(update[:G].split(R)):
                state_of[s0 + j].copy_(C)
                C.add_(dC).mul_(gates.decay[c0 + j + 1])
        else:
            if c0 and not keep:
                state_of[0].copy_(C)
            torch.bmm(keys.transpose(1, 2), values, out=states[(s0 + 1) * R : (s0 + 1) * R + G])
            for c in range(c0, c1):
                new = state_of[s0 + c - c0 + 1]
                if c or past:
                    new.add_(state_of[s0 + c - c0])
                C = new.mul_(gates.decay[c + 1])
        torch.bmm(queries, keys.transpose(1, 2), out=P).tril_()
        torch.bmm(P, values, out=outputs)
        a = 0 if past or c0 else R
        den = denominator[rows]
        column = outputs[..., d_v : d_v + 1]
        if low:
            torch.sum(P, -1, keepdim=True, dtype=acc, out=den)
            column.zero_()
        if a < G:
            outputs[a:].baddbmm_(queries[a:], states[s0 * R + a : s0 * R + G])
        if low:
            den.add_(column)
        else:
            den.copy_(column)
        inv = inverse[rows]
        torch.maximum(den.abs(), gates.floor[g].view(G, L, 1), out=inv).add_(EPS).reciprocal_()
        torch.mul(outputs.view(*shape, width)[..., :d_v], inv.view(*shape, 1).to(dtype), out=h5[g])
    saved = (gates, states, denominator, inverse, query_weight, past, group) if keep else None
    n = C[..., d_v].reshape(B, H, d_qk)
    return h[:, :, :T], C[..., :d_v].reshape(B, H, d_qk, d_v), n, gates.m.view(B, H), saved


def _unit(dtype):
    unit = torch.zeros(EXTRA, dtype=dtype)
    unit[: 2 if dtype == torch.bfloat16 else 1] = 1
    return unit


def _backward(saved, q, k, v, f, h, C_last, n_last, dh, dC_last, dn_last, dm_last):
    gates, states, denominator, inverse, query_weight, past, group = saved
    B, H, T, d_qk = q.shape
    d_v = v.shape[-1]
    R, width = B * H, d_v + EXTRA
    dtype, acc = states.dtype, inverse.dtype
    low = dtype != acc
    L = gates.chunk_size
    N = len(gates.decay) - 1
    pad = N * L - T
    if dh is None:
        dh = torch.zeros_like(h)
    if pad:
        q, k, v, h, dh = (_pad(x, pad) for x in (q, k, v, h, dh))
    dq, dk, dv = (_empty(x, B, H, N * L, x.shape[-1]) for x in (q, k, v))
    future = dC_last is not None or dn_last is not None
    G = group * R

    keys, queries, dkeys, dqueries = torch.empty(4, G, L, d_qk, dtype=dtype).unbind()
    values, dout, dvalues = torch.empty(3, G, L, width, dtype=dtype).unbind()
    values[..., d_v:] = _unit(dtype)
    dout[..., d_v + 1 :] = 0
    P, dP = torch.empty(2, G, L, L, dtype=dtype).unbind()
    mass = torch.empty(G, L, L, dtype=acc)
    product = torch.empty(G, L, max(d_v, d_qk), dtype=dtype).view(-1)
    final = torch.zeros(R, d_qk, width, dtype=acc) if future or past or low else None
    dm_end = torch.zeros(R, dtype=torch.float64) if dm_last is None else dm_last.reshape(R).double()
    if dC_last is not None:
        final[..., :d_v] = dC_last.reshape(R, d_qk, d_v)
        dm_end = dm_end - (dC_last * C_last).sum((-1, -2)).view(R)
    if dn_last is not None:
        final[..., d_v] = dn_last.reshape(R, d_qk)
        dm_end = dm_end - (dn_last * n_last).sum(-1).view(R)
    if future:
        final.mul_(gates.decay[N])
    if low:
        dstates = torch.empty(G, d_qk, width, dtype=dtype)
        updates = torch.empty(G, d_qk, width, dtype=dtype)
        D = final
    else:
        dstates = torch.empty((group + 1) * R, d_qk, width, dtype=dtype)
    anchors = torch.zeros(-(-N // ANCHOR), R, dtype=acc)
    diagonal, row, row_past, column, column_future, s = torch.empty(6, N * R, L, dtype=acc).unbind()
    sign = denominator.sign().mul_(denominator.abs() > gates.floor.view(N * R, L, 1)).neg_()
    inverse_low = inverse.to(dtype)
    if low:
        sign.mul_(inverse).div_(inverse_low)
    key_weight = gates.key.to(dtype)
    q5, k5, v5, h5, dh5, dq5, dk5, dv5 = (_tiles(x, N, L) for x in (q, k, v, h, dh, dq, dk, dv))
    state_of = states.split(R)
    scratch = (keys, queries, dkeys, dqueries, values, dout, dvalues, P, dP, mass)

    for c0 in reversed(range(0, N, group)):
        c1 = min(c0 + group, N)
        n = c1 - c0
        g, G = slice(c0, c1), n * R
        rows = slice(c0 * R, c1 * R)
        keys, queries, dkeys, dqueries, values, dout, dvalues, P, dP, mass = (x[:G] for x in scratch)
        shape = (n, B, H, L)
        a = 0 if past or c0 else R
        z = G if future or c1 < N else G - R
        torch.mul(k5[g], gates.key[g].view(*shape, 1), out=keys.view(*shape, d_qk))
        torch.mul(q5[g], query_weight[g].view(*shape, 1), out=queries.view(*shape, d_qk))
        values.view(*shape, width)[..., :d_v].copy_(v5[g])
        dout5 = dout.view(*shape, width)[..., :d_v]
        torch.mul(dh5[g], inverse_low[rows].view(*shape, 1), out=dout5)
        y = product[: G * L * d_v].view(*shape, d_v)
        torch.sum(torch.mul(dout5, h5[g], out=y), -1, dtype=acc, out=s[rows].view(shape))
        dden = s[rows].unsqueeze(-1) * sign[rows]
        dout[..., d_v : d_v + 1] = dden
        if low:
            torch.sub(dden, dout[..., d_v : d_v + 1], out=dden)
            dout[..., d_v + 1 : d_v + 2] = dden

        # state gradients
        queries_t = queries.transpose(1, 2)
        if low:
            if a < G:
                torch.bmm(queries_t[a:], dout[a:], out=updates[a:G])
            for j in range(n - 1, -1, -1):
                c = c0 + j
                if future or c + 1 < N:
                    dstates[j * R : (j + 1) * R].copy_(D)
                if c or past:
                    D.add_(updates[j * R : (j + 1) * R])
                    if c % ANCHOR == 0:
                        torch.sum(D * state_of[c], (-1, -2), out=anchors[c // ANCHOR])
                    D.mul_(gates.decay[c])
            after = dstates[:z]
        else:
            slots = dstates.split(R)
            if c1 < N:
                slots[n].copy_(slots[0])
            elif future:
                slots[n].copy_(final)
            if a < G:
                torch.bmm(queries_t[a:], dout[a:], out=dstates[a:G])
            for j in range(n - 1, -1 if past or c0 else 0, -1):
                c, D = c0 + j, slots[j]
                if future or c + 1 < N:
                    D.add_(slots[j + 1])
                if c % ANCHOR == 0:
                    torch.sum(D * state_of[c], (-1, -2), out=anchors[c // ANCHOR])
                D.mul_(gates.decay[c])
            after = dstates[R : R + z]

        # weights of pairs within a chunk
        torch.bmm(queries, keys.transpose(1, 2), out=P).tril_()
        torch.bmm(dout, values.transpose(1, 2), out=dP).tril_()
        torch.mul(dP, P, out=mass)
        diag = mass.diagonal(0, 1, 2)
        diagonal[rows] = diag
        diag.zero_()
        torch.sum(mass, -1, out=row[rows])
        torch.sum(mass, -2, out=column[rows])

        # queries
        y = product[: G * L * d_qk].view(G, L, d_qk)
        if a:
            row_past[:a] = 0
            torch.bmm(dP[:a], keys[:a], out=dqueries[:a])
        if a < G:
            before = states[c0 * R + a : c0 * R + G]
            x = torch.bmm(dout[a:], before.transpose(1, 2), out=dqueries[a:])
            torch.sum(torch.mul(x, queries[a:], out=y[a:]), -1, dtype=acc, out=row_past[c0 * R + a : c1 * R])
            x.baddbmm_(dP[a:], keys[a:])
        torch.mul(dqueries.view(*shape, d_qk), query_weight[g].view(*shape, 1), out=dq5[g])
        # keys
        dP_t = dP.transpose(1, 2)
        if z < G:
            column_future[(c1 - 1) * R : c1 * R] = 0
            torch.bmm(dP_t[z:], queries[z:], out=dkeys[z:])
        if z:
            x = torch.bmm(values[:z], after.transpose(1, 2), out=dkeys[:z])
            torch.sum(torch.mul(x, keys[:z], out=y[:z]), -1, dtype=acc, out=column_future[c0 * R : c0 * R + z])
            x.baddbmm_(dP_t[:z], queries[:z])
        torch.mul(dkeys.view(*shape, d_qk), key_weight[g].view(*shape, 1), out=dk5[g])
        # values
        x = torch.bmm(P.transpose(1, 2), dout, out=dvalues)
        if z:
            x[:z].baddbmm_(keys[:z], after)
        dv5[g].copy_(dvalues.view(*shape, width)[..., :d_v])

    column += column_future
    di = diagonal.add_(column)
    net = column.sub_(row).sub_(row_past)
    di, df, dm0 = gate_gradients(gates, di, net, anchors, s, dm_end, f, ANCHOR)
    tokens = slice(0, T)
    grads = dq[:, :, tokens], dk[:, :, tokens], dv[:, :, tokens], di.view(B, H, -1)[..., :T], df.view(B, H, T)
    if not past:
        return *grads, None, None, None
    D = D if low else slots[0]
    return *grads, D[..., :d_v].reshape(B, H, d_qk, d_v), D[..., d_v].reshape(B, H, d_qk), dm0.view(B, H)
