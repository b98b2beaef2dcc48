"""Causal attention with rotary positions in C++ for CPUs: fp32, one pass forward, one backward, no rotated copies."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from xlstm_scaling.kernels.cpp.build import library
from xlstm_scaling.kernels.registry import register
from xlstm_scaling.kernels.rotary_attention import check_rotary_attention, rotary_attention_reference


class _Problem(ctypes.Structure):
    """``Problem`` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "H", "d", "threads")),
        *((name, ctypes.c_void_p) for name in ("qkv", "cosine", "sine", "first", "out", "log_sum", "d_out", "d_qkv")),
    ]


def _call(function: str, qkv: Tensor, **tensors: Tensor | None) -> None:
    B, T, _, H, d = qkv.shape
    addresses = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
    problem = _Problem(B, T, H, d, torch.get_num_threads(), qkv=qkv.data_ptr(), **addresses)
    if getattr(library("attention"), function)(ctypes.byref(problem)):
        raise MemoryError(f"no memory for attention over {T} tokens")


class _RotaryAttention(torch.autograd.Function):
    """Keeps its input, its output and a number a query and head."""

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, cos: Tensor, sin: Tensor, first: Tensor | None) -> Tensor:
        B, T, _, H, d = qkv.shape
        qkv, out = qkv.contiguous(), qkv.new_empty(B, T, H * d)
        log_sum = qkv.new_empty(B, H, T)
        _call("attention_forward", qkv, cosine=cos, sine=sin, first=first, out=out, log_sum=log_sum)
        ctx.save_for_backward(qkv, cos, sin, out, log_sum)
        ctx.first = first
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, cos, sin, out, log_sum = ctx.saved_tensors
        grad, d_qkv = grad.contiguous(), torch.empty_like(qkv)
        _call(
            "attention_backward", qkv, cosine=cos, sine=sin, first=ctx.first, out=out, log_sum=log_sum, d_out=grad,
            d_qkv=d_qkv,
        )  # fmt: skip
        return d_qkv, None, None, None


def first_keys(document_starts: Tensor) -> Tensor:
    """document_starts (B, T) bool -> the first token of the document of each token, int64 (B, T)."""
    positions = torch.arange(document_starts.shape[1], device=document_starts.device)
    return torch.where(document_starts, positions, 0).cummax(dim=1).values


@register("rotary_attention", form="fused", backend="cpp")
def rotary_attention_cpp(qkv: Tensor, cos: Tensor, sin: Tensor, document_starts: Tensor | None = None) -> Tensor:
    """qkv (B, T, 3, H, d), cos, sin (T, d) fp32, document_starts (B, T) bool or None -> (B, T, H d).

    fp32; other dtypes go to torch's attention, which multiplies bf16 where the CPU can. ValueError on shapes that do
    not fit.
    """
    check_rotary_attention(qkv, cos, sin, document_starts)
    if qkv.dtype != torch.float32 or qkv.device.type != "cpu":
        return rotary_attention_reference(qkv, cos, sin, document_starts)
    first = None if document_starts is None else first_keys(document_starts).contiguous()
    return _RotaryAttention.apply(qkv, cos.float().contiguous(), sin.float().contiguous(), first)
