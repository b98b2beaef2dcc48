"""mLSTM, chunkwise-parallel form in C++ for CPUs: what ``chunkwise_cpu`` computes, a head at a time in a core's caches.

The weights of the gates and the way back from masses to gradients of gates are those of ``gates``; the rest, from
reading a chunk of q, k, v to writing it, is one pass (``cpp/mlstm.cpp``), so nothing but the states and two vectors
goes to memory between the forward and the backward pass. Heads are spread over threads; bits do not depend on how many.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from xlstm_scaling.kernels.cpp.tiles import SETTING_VARIABLE, library_with_tiles
from xlstm_scaling.kernels.mlstm.chunkwise_cpu import PAD_FORGET, default_chunk_size
from xlstm_scaling.kernels.mlstm.gates import LOWEST, ChunkGates, chunk_gates, gate_gradients
from xlstm_scaling.kernels.mlstm.state import EPS, MLSTMState, check_inputs, state_dtype
from xlstm_scaling.kernels.registry import register

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


@register("mlstm", form="chunkwise", backend="cpp")
def mlstm_chunkwise_cpp(
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
    state with respect to all inputs and the initial state. bf16 inputs are widened to fp32 as they are read, products
    and states are fp32, fp64 for fp64; bf16 matrix units, where the CPU has them, make products of bf16 inputs, with
    sums in fp32 (``cpp/tiles.py``). ``chunk_size``: tokens of a chunk at most; fewer where gates close so fast that the
    weights within a chunk would leave the range of fp32.
    Raises ValueError on shapes that do not match and on chunks of less than one token, BuildError without a compiler.
    """
    check_inputs(q, k, v, i, f)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} is less than one token")
    if q.dtype == torch.float16:
        wide = mlstm_chunkwise_cpp(q.float(), k.float(), v.float(), i, f, state, chunk_size)
        return wide[0].half(), wide[1]
    T = q.shape[2]
    inputs = (q, k, v, i, f, *((None,) * 3 if state is None else state))
    L = default_chunk_size(T) if chunk_size is None else min(chunk_size, T)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        h, *last = _Chunkwise.apply(*inputs, L)
    else:
        h, *last, _ = _forward(*inputs, L, keep=False)
    return h, MLSTMState(*last)


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, chunk_size = inputs
        ctx.set_materialize_grads(False)
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
    decay: Tensor  #: (N + 1, R)
    states: Tensor | None  #: (N + 1, R, d_qk, row): C before each chunk and after the last
    normalisers: Tensor  #: (N + 1, R, d_qk)
    denominator: Tensor  #: (N, R, L)
    inverse: Tensor  #: (N, R, L)
    past: bool  #: an initial state was given


class _Tokens(ctypes.Structure):
    """(B, H, T, columns) as mlstm.cpp sees it: strides in elements, columns in one piece."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]

    @classmethod
    def of(cls, x: Tensor) -> _Tokens:
        return cls(x.data_ptr(), *x.stride()[:3])


class _Problem(ctypes.Structure):
    """``Problem`` of mlstm.cpp."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("heads", "R", "T", "L", "N", "d_qk", "d_v", "state_row", "threads")),
        *((n, ctypes.c_int64) for n in ("past", "future")),
        ("eps", ctypes.c_double),
        *((n, _Tokens) for n in ("q", "k", "v", "h")),
        *((n, ctypes.c_void_p) for n in ("query", "key", "floor", "decay", "states", "normalisers")),
        ("keep", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("denominator", "inverse")),
        *((n, _Tokens) for n in ("dh", "dq", "dk", "dv")),
        *((n, ctypes.c_void_p) for n in ("dC", "dn")),
        *((n, ctypes.c_void_p) for n in ("leaving", "crossing", "dh_h", "end")),
    ]


#: fields of _Problem that are tokens
_TOKENS = {name for name, kind in _Problem._fields_ if kind is _Tokens}


def _problem(gates: ChunkGates, q: Tensor, v: Tensor, **fields: Any) -> _Problem:
    """Sizes, and the addresses of tensors by name; the caller keeps them alive."""
    _, H, T, d_qk = q.shape
    N, R, L, _ = gates.key.shape
    tensors = {"q": q, "v": v, "query": gates.query, "key": gates.key, "floor": gates.floor} | fields
    values = {
        name: x if not isinstance(x, Tensor) else _Tokens.of(x) if name in _TOKENS else x.data_ptr()
        for name, x in tensors.items()
    }
    return _Problem(
        heads=H, R=R, T=T, L=L, N=N, d_qk=d_qk, d_v=v.shape[-1], state_row=_state_row(v.shape[-1], gates.key.dtype),
        threads=min(torch.get_num_threads(), R), eps=EPS, **values,
    )  # fmt: skip


def _run(function: str, problem: _Problem, dtype: torch.dtype) -> None:
    status = getattr(library_with_tiles("mlstm"), function)(ctypes.byref(problem), _TYPES[dtype])
    if status == 2:
        raise RuntimeError(f"the system refuses this process the CPU's matrix units: set {SETTING_VARIABLE}=off")
    if status:
        raise MemoryError("no memory for the scratch space of the mLSTM")


@functools.cache
def _state_row(d_v: int, dtype: torch.dtype) -> int:
    """Distance between the rows of a state, as ``row_stride`` of products.hpp has it."""
    lanes = library_with_tiles("mlstm").vector_bytes() // dtype.itemsize
    row = -(-d_v // lanes) * lanes
    return row if row * dtype.itemsize % 512 else row + lanes


def _columns_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(like: Tensor) -> Tensor:
    """(B, H, T, d), laid out as (B, T, H, d) unless ``like`` is contiguous."""
    B, H, T, d = like.shape
    return like.new_empty(B, H, T, d) if like.is_contiguous() else like.new_empty(B, T, H, d).transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C_0: Tensor | None, n_0: Tensor | None, m_0: Tensor | None, chunk_size: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, _Kept | None]:  # fmt: skip
    """h, C, n, m and, if ``keep``, what the backward pass needs. R = B·H heads, N chunks of L tokens."""
    B, H, T, d_qk = q.shape
    d_v, R, exact = v.shape[-1], B * H, state_dtype(q.dtype)
    pad = -T % chunk_size
    if pad:  # of the gates alone: no token is read beyond T
        i, f = F.pad(i, (0, pad), value=LOWEST), F.pad(f, (0, pad), value=PAD_FORGET)
    i, f = (x.to(exact).reshape(R, T + pad) for x in (i, f))
    gates = chunk_gates(i, f, None if m_0 is None else m_0.reshape(R), chunk_size, d_qk**-0.5)
    N, _, L, _ = gates.key.shape
    decay = torch.cat(gates.decay).view(N + 1, R)
    past = C_0 is not None
    slots = N + 1 if keep else 1
    states = torch.empty(slots, R, d_qk, _state_row(d_v, exact), dtype=exact)
    normalisers = torch.empty(slots, R, d_qk, dtype=exact)
    states[0].zero_()
    if past:
        torch.mul(C_0.reshape(R, d_qk, d_v), gates.decay[0], out=states[0, ..., :d_v])
        torch.mul(n_0.reshape(R, d_qk), gates.decay[0][..., 0], out=normalisers[0])
    else:
        normalisers[0].zero_()
    denominator, inverse = torch.empty(2, N, R, L, dtype=exact).unbind()
    q, k, v = (_columns_together(x) for x in (q, k, v))
    h = _empty(v)
    problem = _problem(
        gates, q, v, k=k, h=h, past=past, decay=decay, states=states, normalisers=normalisers, keep=keep,
        denominator=denominator, inverse=inverse,
    )  # fmt: skip
    _run("mlstm_forward", problem, q.dtype)
    C, n = states[-1, ..., :d_v].reshape(B, H, d_qk, d_v), normalisers[-1].reshape(B, H, d_qk)
    kept = _Kept(gates, decay, states, normalisers, denominator, inverse, past) if keep else None
    # views of what is kept would be saved as outputs and changed by no one; the last state is copied to be its own
    return h, C.clone() if keep else C, n.clone() if keep else n, gates.m.view(B, H), kept


def _backward(
    kept: _Kept, q: Tensor, k: Tensor, v: Tensor, f: Tensor, h: Tensor,
    dh: Tensor | None, dC_last: Tensor | None, dn_last: Tensor | None, dm_last: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, i, f and of the initial C, n, m, None where there was none (see ``chunkwise_cpu``)."""
    gates, decay, states, normalisers, denominator, inverse, past = kept
    B, H, _, d_qk = q.shape
    d_v, R, exact = v.shape[-1], B * H, inverse.dtype
    q, k, v, h, dh = (_columns_together(x) for x in (q, k, v, h, torch.zeros_like(h) if dh is None else dh))
    dq, dk, dv = (_empty(x) for x in (q, k, v))
    dC = torch.zeros(R, d_qk, states.shape[-1], dtype=exact)
    dn = torch.zeros(R, d_qk, dtype=exact)
    future = dC_last is not None or dn_last is not None
    if dC_last is not None:
        dC[..., :d_v] = dC_last.reshape(R, d_qk, d_v)
    if dn_last is not None:
        dn.copy_(dn_last.reshape(R, d_qk))
    N, _, L = inverse.shape
    leaving, crossing, dh_h = torch.zeros(3, N, R, L, dtype=exact).unbind()
    end = torch.zeros(R, dtype=exact)
    problem = _problem(
        gates, q, v, k=k, h=h, dh=dh, dq=dq, dk=dk, dv=dv, past=past, future=future, dC=dC, dn=dn, decay=decay,
        states=states, normalisers=normalisers, keep=True, denominator=denominator, inverse=inverse,
        leaving=leaving, crossing=crossing, dh_h=dh_h, end=end,
    )  # fmt: skip
    _run("mlstm_backward", problem, q.dtype)
    dm = None if dm_last is None else dm_last.reshape(R)
    di, df, dm_0 = gate_gradients(gates, f, leaving, crossing, end, dh_h, dm)
    T = q.shape[2]
    d_tokens = (dq, dk, dv, di.view(B, H, -1)[:, :, :T], df.view(B, H, -1)[:, :, :T])
    if not past:
        return *d_tokens, None, None, None
    return *d_tokens, dC[..., :d_v].reshape(B, H, d_qk, d_v), dn.view(B, H, d_qk), dm_0.view(B, H)
