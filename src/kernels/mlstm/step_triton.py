"""mLSTM, one token at a time on GPUs: decoding, in one launch.

A program owns columns of one head's memory C (all d_qk rows of them), so that C is read once and written once, in
place, and small batches still fill the device. Every program needs all of n and m for the normaliser, whatever columns
it owns, and none can know when the others have read them: the new n and m go to new tensors, which the returned state
holds, written by the programs of the first columns. There are no atomic operations and nothing is read that the same
launch writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_scaling.kernels.mlstm.state import EPS, MLSTMState
from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.triton_launch import check_device, configuration, launch
from xlstm_scaling.kernels.triton_math import cast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: what tuning tries first, as steps from the default: programs of more or fewer columns at the same elements a thread,
#: or of fewer rows at a time
CANDIDATES = {
    "mlstm_step_kernel": (
        {"BLOCK_V": 1, "num_warps": 1},
        {"BLOCK_V": -1, "num_warps": -1},
        {"BLOCK_K": -1, "BLOCK_V": 1},
        {"BLOCK_K": -1, "num_warps": -1},
    )
}


@triton.jit
def _log1p(x):  # noqa: ANN001, ANN202
    """log(1 + x) to fp32's digits also for tiny x, as of a forget gate that is all but open."""
    rounded = 1.0 + x
    return tl.log(rounded) + (x - (rounded - 1.0)) / rounded


@triton.jit
def mlstm_step_kernel(  # noqa: ANN201
    q,  # noqa: ANN001
    k,  # noqa: ANN001
    v,  # noqa: ANN001
    i,  # noqa: ANN001
    f,  # noqa: ANN001
    C,  # noqa: ANN001
    n,  # noqa: ANN001
    m,  # noqa: ANN001
    n_new,  # noqa: ANN001
    m_new,  # noqa: ANN001
    h,  # noqa: ANN001
    stride_q_b,  # noqa: ANN001
    stride_q_h,  # noqa: ANN001
    stride_k_b,  # noqa: ANN001
    stride_k_h,  # noqa: ANN001
    stride_v_b,  # noqa: ANN001
    stride_v_h,  # noqa: ANN001
    stride_i_b,  # noqa: ANN001
    stride_i_h,  # noqa: ANN001
    stride_f_b,  # noqa: ANN001
    stride_f_h,  # noqa: ANN001
    H,  # noqa: ANN001
    SCALE: tl.constexpr,  # of the query
    EPS: tl.constexpr,
    D_QK: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows of C at a time
    BLOCK_V: tl.constexpr,  # columns of C that a program owns
):
    """Columns of the new C (BLOCK_V of them, all rows), the same columns of h, and of the first columns n and m."""
    COLUMN_TILES: tl.constexpr = (D_V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    tile = program % COLUMN_TILES
    head = program // COLUMN_TILES  # of B · H
    b, h_of_b = (head // H).to(tl.int64), (head % H).to(tl.int64)
    head = head.to(tl.int64)
    q += b * stride_q_b + h_of_b * stride_q_h
    k += b * stride_k_b + h_of_b * stride_k_h
    v += b * stride_v_b + h_of_b * stride_v_h
    C += head * D_QK * D_V
    n += head * D_QK
    n_new += head * D_QK
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    columns_in = columns < D_V

    gate_i = tl.load(i + b * stride_i_b + h_of_b * stride_i_h).to(tl.float32)
    gate_f = tl.load(f + b * stride_f_b + h_of_b * stride_f_h).to(tl.float32)
    log_f = tl.minimum(gate_f, 0.0) - _log1p(tl.exp(-tl.abs(gate_f)))
    kept = log_f + tl.load(m + head)
    largest = tl.maximum(kept, gate_i)
    forget = tl.exp(kept - largest)
    inputs = tl.exp(gate_i - largest)

    value = tl.load(v + columns, columns_in, 0.0).to(tl.float32)
    numerator = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)  # summed over rows at the end
    along_n = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, D_QK, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        rows_in = rows < D_QK
        inside = rows_in[:, None] & columns_in[None, :]
        memory = C + rows[:, None] * D_V + columns[None, :]
        new = tl.load(memory, inside, 0.0)
        query = tl.load(q + rows, rows_in, 0.0).to(tl.float32)
        key = inputs * tl.load(k + rows, rows_in, 0.0).to(tl.float32)
        new_n = forget * tl.load(n + rows, rows_in, 0.0) + key
        new = forget * new + key[:, None] * value[None, :]
        tl.store(memory, new, inside)
        numerator += query[:, None] * new
        along_n += query * new_n
        tl.store(n_new + rows, new_n, rows_in & (tile == 0))
    tl.store(m_new + head, largest, tile == 0)
    normaliser = tl.maximum(tl.abs(SCALE * tl.sum(along_n, 0)), tl.exp(-largest)) + EPS
    output = SCALE * tl.sum(numerator, 0) / normaliser
    tl.store(h + head * D_V + columns, cast(output, h.dtype.element_ty), columns_in)


def _check(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState) -> None:
    tensors = (q, k, v, i, f, *state)
    C, n, m = state
    if (
        (q.dim(), v.dim()) != (3, 3)
        or 0 in (*q.shape, v.shape[2])
        or not q.shape == k.shape == n.shape
        or not q.shape[:2] == v.shape[:2] == i.shape == f.shape == m.shape
        or C.shape != (*q.shape, v.shape[2])
    ):
        shapes = {name: tuple(x.shape) for name, x in zip("qkvifCnm", tensors)}
        raise ValueError(f"mLSTM shapes do not match: {shapes}; expected q, k (B, H, d_qk), v (B, H, d_v), i, f (B, H) "
                         "and a state C (B, H, d_qk, d_v), n (B, H, d_qk), m (B, H), none empty")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES or any(x.dtype != torch.float32 for x in state):
        dtypes = {name: x.dtype for name, x in zip("qkvifCnm", tensors)}
        raise ValueError(f"the mLSTM step takes q, k, v in fp32, bf16 or fp16 and a state in fp32, got {dtypes}")
    if not C.is_contiguous():
        raise ValueError(f"C is updated in place and must be contiguous, got strides {C.stride()}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("the mLSTM step on GPUs has no gradient: decode under torch.no_grad(), or use the form "
                           "'chunkwise' of backend 'triton' (backend 'torch' has a step with gradients)")  # fmt: skip
    check_device(*tensors)


@register("mlstm", form="step", backend="triton")
def mlstm_step_triton(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState
) -> tuple[Tensor, MLSTMState]:
    """One token, in one launch; ``state`` is used up.

    The arithmetic of ``mlstm_step`` in fp32 (Beck et al., xLSTM, eqs. 19-27). Bytes moved with s bytes an element of
    q, k, v and h: B H (8 d_qk d_v + 8 d_qk + 8 + 2 s (d_qk + d_v) + gates), of which C, read and written once, is all
    but 1-2 %: 268 MB at B = 32, H = 8, d_qk = 256, d_v = 512, at 4.8 TB/s 56 µs. 5 FLOPs per element of C.

    Args:
        q, k: (B, H, d_qk), v: (B, H, d_v), bf16, fp16 or fp32; views with any strides of batch and head.
        i, f: (B, H) pre-activations of input and forget gate, any float dtype and strides.
        state: C (B, H, d_qk, d_v) contiguous, n (B, H, d_qk), m (B, H), fp32. C is updated in place; n and m are left
            as they were, so that the old state is of no more use.

    Returns:
        h (B, H, d_v) in the dtype of ``q``, and the new state: the same C, new n and m.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or C not contiguous.
        RuntimeError: a gradient is asked for.
    """
    _check(q, k, v, i, f, state)
    B, H, d_qk = q.shape
    d_v = v.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    n, m = state.n.contiguous(), state.m.contiguous()
    n_new, m_new = torch.empty_like(n), torch.empty_like(m)
    h = torch.empty(B, H, d_v, dtype=q.dtype, device=q.device)
    # every element of a program's C is on its way at once, 64 a thread (a warp of 32); rows of 128 bytes
    block_k, block_v = min(triton.next_power_of_2(d_qk), 512), min(triton.next_power_of_2(d_v), 32)
    default = {"BLOCK_K": block_k, "BLOCK_V": block_v, "num_warps": max(1, block_k * block_v // 2048), "num_stages": 1}
    tiles = configuration("mlstm_step_kernel", default, q.dtype, d_qk=d_qk, d_v=d_v)
    launch(
        mlstm_step_kernel,
        (B * H * triton.cdiv(d_v, tiles["BLOCK_V"]),),
        q=q,
        k=k,
        v=v,
        i=i,
        f=f,
        C=state.C,
        n=n,
        m=m,
        n_new=n_new,
        m_new=m_new,
        h=h,
        stride_q_b=q.stride(0),
        stride_q_h=q.stride(1),
        stride_k_b=k.stride(0),
        stride_k_h=k.stride(1),
        stride_v_b=v.stride(0),
        stride_v_h=v.stride(1),
        stride_i_b=i.stride(0),
        stride_i_h=i.stride(1),
        stride_f_b=f.stride(0),
        stride_f_h=f.stride(1),
        H=H,
        SCALE=d_qk**-0.5,
        EPS=EPS,
        D_QK=d_qk,
        D_V=d_v,
        **tiles,
    )
    return h, MLSTMState(state.C, n_new, m_new)
