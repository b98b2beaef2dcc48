"""mLSTM, chunkwise-parallel form, on Triton kernels: forward and hand-written backward (TFLA, arXiv 2503.14376).

Tokens are cut into tiles, tiles into chunks (see ``mlstm/triton``). Forward: gates -> states (sequential over tiles,
parallel over blocks of C) -> outputs (parallel over tiles). Backward: output gradients -> state gradients (sequential)
-> gradients of q, k, v (parallel) -> gradients of the gates. Gates, max states, normalisers and sums are fp32; products
run in the inputs' dtype with fp32 accumulation (fp16 inputs in tf32, for its range); states are stored in that dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_scaling.kernels.mlstm.state import EPS, MLSTMState, check_inputs
from xlstm_scaling.kernels.mlstm.triton.gate_gradients import gate_gradients_kernel
from xlstm_scaling.kernels.mlstm.triton.gates import gate_tiles_kernel
from xlstm_scaling.kernels.mlstm.triton.key_gradients import key_gradients_kernel
from xlstm_scaling.kernels.mlstm.triton.output_gradients import output_gradients_kernel
from xlstm_scaling.kernels.mlstm.triton.outputs import outputs_kernel
from xlstm_scaling.kernels.mlstm.triton.query_gradients import query_gradients_kernel
from xlstm_scaling.kernels.mlstm.triton.state_gradients import state_gradients_kernel
from xlstm_scaling.kernels.mlstm.triton.states import states_kernel
from xlstm_scaling.kernels.mlstm.triton.value_gradients import value_gradients_kernel
from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.triton_launch import check_device, configuration, current_target, launch

#: dtype of operands on the matrix units, how fp32 operands are multiplied, and dtype of states in memory
_PRODUCTS = {
    torch.bfloat16: (tl.bfloat16, "ieee", torch.bfloat16),
    # a product with 1 / N or a state can leave fp16's range; tf32 has fp16's digits and fp32's range
    torch.float16: (tl.float32, "tf32", torch.float32),
    torch.float32: (tl.float32, None, torch.float32),
}
MAX_CHUNK_SIZE = 1024
#: what tuning tries first, as steps from the default: a narrower accumulator, and for it fewer warps, a deeper pipeline
#: or wider slices; for the sequential kernels other shapes of a program's block of C
_BLOCKS_OF_C = (
    {"BK": -1, "BV": 1},
    {"BK": 1, "BV": -1},
    {"BV": -1, "num_warps": -1},
    {"BV": -1, "num_warps": -1, "num_stages": 2},
)
CANDIDATES = {
    "mlstm_states": _BLOCKS_OF_C,
    "mlstm_state_gradients": _BLOCKS_OF_C,
    "mlstm_outputs": ({"BV": -1, "num_stages": 1}, {"BV": -1, "BC": 1}, {"BK": -1, "BC": -1, "num_stages": 1}),
    "mlstm_value_gradients": ({"BV": -1, "num_warps": -1}, {"BV": -1, "num_stages": 1}, {"BV": -1, "BC": 1}),
    "mlstm_query_gradients": ({"BK": -1, "BC": 1},),
    "mlstm_key_gradients": ({"BK": -1, "BC": 1}, {"BK": -1, "num_stages": 1}),
}


class _Problem(NamedTuple):
    """Sizes and constants that all kernels take."""

    B: int
    H: int
    T: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    BT: int
    NT: int

    @property
    def heads(self) -> int:
        return self.B * self.H

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.T, self.BT)

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.tiles, self.NT)

    @property
    def state_dtype(self) -> torch.dtype:
        return _PRODUCTS[self.dtype][2]

    def configured(self, kernel: str, default: dict[str, int]) -> dict[str, int]:
        return configuration(kernel, default, self.dtype, d_qk=self.d_qk, d_v=self.d_v)

    def matrix(self) -> dict:
        """Arguments of every kernel with matrix products."""
        mma, precision, _ = _PRODUCTS[self.dtype]
        if precision is None or current_target().backend == "hip":
            precision = current_target().fp32_precision
        return {
            "H": self.H, "T": self.T, "TILES": self.tiles, "CHUNKS": self.chunks, "D_QK": self.d_qk, "D_V": self.d_v,
            "NT": self.NT, "BT": self.BT, "MMA": mma, "PRECISION": precision,
        }  # fmt: skip


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """Strides of (B, H, T[, d]) over batch, head and token as kernel arguments; the last dimension is contiguous."""
    return {f"{name}_s{dim}": stride for dim, stride in zip("bht", x.stride()[:3], strict=True)}


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like_tokens(p: _Problem, d: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (B, H, T, d) that lies in memory as (B, T, H, d), as the layers before and after want it."""
    return torch.empty(p.B, p.T, p.H, d, dtype=dtype, device=like.device).transpose(1, 2)


def _defaults(kernel: str, p: _Problem) -> dict[str, int]:
    """Blocks, warps and stages where the device's table has no entry.

    Chosen so that nothing spills and shared memory suffices on every target (``certify --compile``). ``keep``: the
    widest operand that stays on the chip while a program multiplies it over and over (queries in ``outputs``, dh in
    ``query_gradients``); wider ones run in ``slices``. ``widest``: the accumulator.
    """
    width_k, width_v = (max(16, triton.next_power_of_2(d)) for d in (p.d_qk, p.d_v))
    shared, blackwell = current_target().shared_memory_bytes, current_target().arch in (100, 101, 103)
    if current_target().backend == "interpreter":  # every program costs
        keep, widest, slices, state_v = 512, 512, 512, 512
    elif p.dtype != torch.bfloat16:
        keep, widest, slices, state_v = 32, 32, 32, 32
    elif shared < 100 * 1024:
        keep, widest, slices, state_v = 32, 64, 32, 64
    elif shared < 200 * 1024 or blackwell:
        keep, widest, slices, state_v = 64, 128, 64, 128
    else:
        keep, widest, slices, state_v = 256, 256 if width_k <= 256 else 128, 64, 128
    reads = 32 if blackwell else slices
    stages = 2 if shared >= 100 * 1024 else 1

    masked = (width_k, width_v) != (p.d_qk, p.d_v)  # masks take registers

    def sizes(**blocks: int) -> dict[str, int]:
        return {**blocks, "num_warps": 8 if masked or max(width_k, width_v) >= 128 else 4, "num_stages": stages}

    state = sizes(BK=min(max(width_k, 32), 64), BV=min(max(width_v, 32), state_v))
    over_k = sizes(BK=width_k if width_k <= keep else slices, BC=min(width_k, reads), BV=min(width_v, widest))
    over_v = sizes(BK=min(width_k, widest), BV=width_v if width_v <= keep else slices, BC=min(width_v, 32))
    return {
        "mlstm_states": state,
        "mlstm_outputs": over_k,
        "mlstm_output_gradients": {"BV": min(width_v, 64), "num_warps": 4, "num_stages": 1},
        "mlstm_state_gradients": state,
        "mlstm_query_gradients": over_v,
        "mlstm_key_gradients": over_v,
        "mlstm_value_gradients": over_k,
    }[kernel]


def _tile_sizes(q: Tensor, v: Tensor, chunk_size: int | None) -> tuple[int, int]:
    """Tokens a tile and tiles a chunk."""
    d_qk, d_v = q.shape[-1], v.shape[-1]
    odd = triton.next_power_of_2(d_v) != d_v < 64  # masks of small odd heads spill in larger tiles
    default = {
        "BT": 64 if q.dtype == torch.bfloat16 and not odd else 32,
        "chunk_size": 256 if d_qk * d_v >= 128 * 128 else 128,
    }
    config = configuration("mlstm_chunkwise", default, q.dtype, d_qk=d_qk, d_v=d_v)
    BT = config["BT"]
    chunk_size = config["chunk_size"] if chunk_size is None else chunk_size
    if not 0 < chunk_size <= MAX_CHUNK_SIZE:
        raise ValueError(f"chunk_size must be 1 to {MAX_CHUNK_SIZE} tokens, got {chunk_size}")
    while max(16, chunk_size) < BT:
        BT //= 2
    NT = triton.cdiv(min(chunk_size, triton.cdiv(q.shape[2], BT) * BT), BT)
    return BT, NT


def _through(passing: Tensor, g: Tensor, m_tile: Tensor, chunk: int, start: int, end: int) -> Tensor:
    """Mass that passes from the state before a chunk (tiles start to end) to the state after it: (B·H)."""
    decay = torch.exp((m_tile[:, start] - m_tile[:, end]) + g[:, start:end].sum(-1))
    return passing[:, :, chunk].sum(0) * decay


def _check(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState | None) -> None:
    check_inputs(q, k, v, i, f)
    check_device(q, k, v, i, f, *(state or ()))
    if q.dtype not in _PRODUCTS or {k.dtype, v.dtype} != {q.dtype}:
        found = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise ValueError(f"the Triton mLSTM takes q, k, v of one dtype, bfloat16, float16 or float32; got {found}")
    B, H, _, d_qk = q.shape
    if state is not None:
        wanted = ((B, H, d_qk, v.shape[-1]), (B, H, d_qk), (B, H))
        if tuple(tuple(x.shape) for x in state) != wanted:
            raise ValueError(f"the state's shapes are {[tuple(x.shape) for x in state]}, expected {list(wanted)}")


class _MLSTMChunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, i, f, C0, n0, m0, chunk_size):  # noqa: ANN001, ANN205
        q, k, v = _rows(q), _rows(k), _rows(v)
        B, H, T, d_qk = q.shape
        d_v = v.shape[-1]
        p = _Problem(B, H, T, d_qk, d_v, q.dtype, *_tile_sizes(q, v, chunk_size))
        fp32 = {"dtype": torch.float32, "device": q.device}
        i_in = i
        i, b, r = (torch.empty(p.heads, p.tiles * p.BT, **fp32) for _ in range(3))
        g = torch.empty(p.heads, p.tiles, **fp32)
        rows = min(8, triton.next_power_of_2(p.tiles))
        launch(gate_tiles_kernel, (triton.cdiv(p.tiles, rows) * p.heads,), num_warps=4, num_stages=1,
               i_ptr=i_in, f_ptr=f, input_ptr=i, b_ptr=b, r_ptr=r, g_ptr=g, **_strides("i", i_in), **_strides("f", f),
               H=H, T=T, TILES=p.tiles, BT=p.BT, ROWS=rows)  # fmt: skip

        # gradients of the first state are sums over all tokens that nearly cancel: they need h and C as computed
        exact = any(ctx.needs_input_grad[5:8])
        C_dtype = torch.float32 if exact else p.state_dtype
        C = torch.empty(p.heads, p.chunks, d_qk, d_v, dtype=C_dtype, device=q.device)
        n = torch.empty(p.heads, p.chunks, d_qk, **fp32)
        m_tile = torch.empty(p.heads, p.tiles + 1, **fp32)
        C_last, n_last = torch.empty(B, H, d_qk, d_v, **fp32), torch.empty(B, H, d_qk, **fp32)
        m_last = torch.empty(B, H, **fp32)
        config = p.configured("mlstm_states", _defaults("mlstm_states", p))
        grid = triton.cdiv(d_qk, config["BK"]) * triton.cdiv(d_v, config["BV"]) * p.heads
        has_initial = C0 is not None
        initial = (C0.float().contiguous(), n0.float().contiguous(), m0.float().contiguous()) if has_initial else (
            C_last, n_last, m_last)  # fmt: skip
        launch(states_kernel, (grid,), k_ptr=k, v_ptr=v, i_ptr=i, r_ptr=r, g_ptr=g,
               C0_ptr=initial[0], n0_ptr=initial[1], m0_ptr=initial[2], C_ptr=C, n_ptr=n, m_ptr=m_tile,
               C_last_ptr=C_last, n_last_ptr=n_last, m_last_ptr=m_last, **_strides("k", k), **_strides("v", v),
               HAS_INITIAL=has_initial, **p.matrix(), **config)  # fmt: skip

        h = _like_tokens(p, d_v, q, torch.float32 if exact else q.dtype)
        den, m = (torch.empty(p.heads, p.tiles * p.BT, **fp32) for _ in range(2))
        config = p.configured("mlstm_outputs", _defaults("mlstm_outputs", p))
        launch(outputs_kernel, (triton.cdiv(d_v, config["BV"]) * p.tiles * p.heads,),
               q_ptr=q, k_ptr=k, v_ptr=v, i_ptr=i, b_ptr=b, r_ptr=r, g_ptr=g, C_ptr=C, n_ptr=n, m_tile_ptr=m_tile,
               h_ptr=h, den_ptr=den, m_ptr=m, **_strides("q", q), **_strides("k", k), **_strides("v", v),
               **_strides("h", h), scale=d_qk**-0.5, eps=EPS,
               WIDTH=triton.next_power_of_2(p.NT), **p.matrix(), **config)  # fmt: skip
        ctx.save_for_backward(q, k, v, i, f, h, b, r, g, C, n, m_tile, den, m)
        ctx.problem = p
        ctx.gate_dtypes = i_in.dtype, f.dtype
        ctx.dtypes = None if C0 is None else (C0.dtype, n0.dtype, m0.dtype)
        ctx.set_materialize_grads(False)
        return h.to(q.dtype), C_last, n_last, m_last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh, dC_last, dn_last, dm_last):  # noqa: ANN001, ANN205
        q, k, v, i, f, h, b, r, g, C, n, m_tile, den, m = ctx.saved_tensors
        p: _Problem = ctx.problem
        B, H, T, d_qk, d_v = p.B, p.H, p.T, p.d_qk, p.d_v
        fp32 = {"dtype": torch.float32, "device": q.device}
        padded = (p.heads, p.tiles * p.BT)
        dh = torch.zeros_like(h) if dh is None else _rows(dh)
        has_last = dC_last is not None or dn_last is not None
        if has_last:
            dC_last = torch.zeros(B, H, d_qk, d_v, **fp32) if dC_last is None else dC_last.float().contiguous()
            dn_last = torch.zeros(B, H, d_qk, **fp32) if dn_last is None else dn_last.float().contiguous()
        inv_n, dden, dm = (torch.empty(padded, **fp32) for _ in range(3))
        flow = torch.empty(p.heads, p.tiles, **fp32)
        carried = torch.empty(p.heads, p.tiles, dtype=torch.int32, device=q.device)
        launch(output_gradients_kernel, (p.tiles * p.heads,), h_ptr=h, dh_ptr=dh, den_ptr=den, m_ptr=m, i_ptr=i,
               inv_n_ptr=inv_n, dden_ptr=dden, dm_ptr=dm, flow_ptr=flow, carried_ptr=carried, **_strides("h", h),
               **_strides("dh", dh), H=H, T=T, TILES=p.tiles, eps=EPS, D_V=d_v, BT=p.BT,
               **p.configured("mlstm_output_gradients", _defaults("mlstm_output_gradients", p)))  # fmt: skip

        scale = d_qk**-0.5
        shared = {"q_ptr": q, "dh_ptr": dh, "b_ptr": b, "g_ptr": g, "m_ptr": m, "m_tile_ptr": m_tile,
                  "inv_n_ptr": inv_n, **_strides("q", q), **_strides("dh", dh), "scale": scale}  # fmt: skip
        config = p.configured("mlstm_state_gradients", _defaults("mlstm_state_gradients", p))
        blocks = triton.cdiv(d_qk, config["BK"]) * triton.cdiv(d_v, config["BV"])
        dC = torch.empty(C.shape, dtype=torch.float32 if has_last else C.dtype, device=C.device)
        dn = torch.empty_like(n)
        passing = torch.empty(blocks, p.heads, p.chunks, **fp32)
        dC0, dn0 = torch.empty(B, H, d_qk, d_v, **fp32), torch.empty(B, H, d_qk, **fp32)
        launch(state_gradients_kernel, (blocks * p.heads,), **shared, dden_ptr=dden, C_ptr=C, n_ptr=n,
               dC_last_ptr=dC_last if has_last else dC0, dn_last_ptr=dn_last if has_last else dn0,
               dC_ptr=dC, dn_ptr=dn, passing_ptr=passing, dC0_ptr=dC0, dn0_ptr=dn0, HAS_LAST=has_last,
               **p.matrix(), **config)  # fmt: skip

        tiles = {**p.matrix(), "WIDTH": triton.next_power_of_2(p.NT), "i_ptr": i}
        keys = {"k_ptr": k, **_strides("k", k)}
        values = {"v_ptr": v, **_strides("v", v)}
        config = p.configured("mlstm_query_gradients", _defaults("mlstm_query_gradients", p))
        blocks_k = triton.cdiv(d_qk, config["BK"])
        dq = _like_tokens(p, d_qk, q, q.dtype)
        received = torch.empty(blocks_k, p.heads, p.tiles, p.NT, **fp32)
        row = torch.empty(blocks_k, *padded, **fp32)
        tile_column, crossing = (torch.empty(padded, **fp32) for _ in range(2))
        launch(query_gradients_kernel, (blocks_k * p.tiles * p.heads,), **shared, **keys, **values, **tiles, r_ptr=r,
               dden_ptr=dden, C_ptr=C, n_ptr=n, dq_ptr=dq, received_ptr=received, row_ptr=row,
               column_ptr=tile_column, crossing_ptr=crossing, **_strides("dq", dq), **config)  # fmt: skip

        config = p.configured("mlstm_key_gradients", _defaults("mlstm_key_gradients", p))
        sent_blocks = triton.cdiv(d_qk, config["BK"])
        dk = _like_tokens(p, d_qk, k, k.dtype)
        sent = torch.empty(sent_blocks, p.heads, p.tiles, **fp32)
        column = torch.empty(sent_blocks, *padded, **fp32)
        launch(key_gradients_kernel, (sent_blocks * p.tiles * p.heads,), **shared, **keys, **values, **tiles, r_ptr=r,
               dden_ptr=dden, dC_ptr=dC, dn_ptr=dn, dk_ptr=dk, sent_ptr=sent, column_ptr=column, **_strides("dk", dk),
               **config)  # fmt: skip

        config = p.configured("mlstm_value_gradients", _defaults("mlstm_value_gradients", p))
        dv = _like_tokens(p, d_v, v, v.dtype)
        launch(value_gradients_kernel, (triton.cdiv(d_v, config["BV"]) * p.tiles * p.heads,), **shared, **keys,
               **tiles, r_ptr=r, dC_ptr=dC, dv_ptr=dv, **_strides("dv", dv), **config)  # fmt: skip

        # the last state is relative to exp(m): the gradient of m from its scale is minus the mass that it receives,
        # added up from the very numbers that the gates get, so that what cancels cancels
        dm_chain = torch.zeros(B, H, **fp32) if dm_last is None else dm_last.float()
        if has_last:
            last = (p.chunks - 1) * p.NT
            mass = sent[:, :, last:].sum((0, 2)) + _through(passing, g, m_tile, p.chunks - 1, last, p.tiles)
            dm_chain = dm_chain - mass.view(B, H)
        di = torch.empty(B, H, T, dtype=ctx.gate_dtypes[0], device=i.device)
        df = torch.empty(B, H, T, dtype=f.dtype, device=f.device)
        dm0 = torch.empty(B, H, **fp32)
        launch(gate_gradients_kernel, (p.tiles * p.heads,), num_warps=4, num_stages=1, i_ptr=i, f_ptr=f, g_ptr=g,
               m_ptr=m, m_tile_ptr=m_tile, dm_ptr=dm, flow_ptr=flow, carried_ptr=carried,
               dm_last_ptr=dm_chain.contiguous(), received_ptr=received, row_ptr=row, sent_ptr=sent, column_ptr=column,
               tile_column_ptr=tile_column, crossing_ptr=crossing, passing_ptr=passing, di_ptr=di, df_ptr=df,
               dm0_ptr=dm0, **_strides("f", f), H=H, T=T, TILES=p.tiles, CHUNKS=p.chunks, NT=p.NT,
               WIDTH=triton.next_power_of_2(p.NT), BT=p.BT, SCAN=min(1024, triton.next_power_of_2(p.tiles)),
               RECEIVED_BLOCKS=blocks_k, SENT_BLOCKS=sent_blocks, PASSING_BLOCKS=blocks)  # fmt: skip
        initial = (None, None, None)
        if ctx.dtypes is not None:
            end = min(p.NT, p.tiles)
            mass = received[:, :, :end, 0].sum((0, 2)) + _through(passing, g, m_tile, 0, 0, end)
            dm0 += mass.view(B, H)
            initial = tuple(x.to(dtype) for x, dtype in zip((dC0, dn0, dm0), ctx.dtypes, strict=True))
        return dq, dk, dv, di, df, *initial, None


@register("mlstm", form="chunkwise", backend="triton")
def mlstm_chunkwise_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, MLSTMState]:
    """q, k (B, H, T, d_qk), v (B, H, T, d_v) in bf16, fp16 or fp32, i, f (B, H, T) -> h (B, H, T, d_v), last state.

    Any T; batch, head and token strides are free. ``chunk_size``: tokens between states that are written to memory
    (at most 1,024), by default from the device's table. ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(q, k, v, i, f, state)
    C, n, m = (None, None, None) if state is None else state
    h, C, n, m = _MLSTMChunkwise.apply(q, k, v, i, f, C, n, m, chunk_size)
    return h, MLSTMState(C, n, m)
