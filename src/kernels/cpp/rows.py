"""Calling ``rows.cpp``: addresses, types, scratch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from xlstm_scaling.kernels.cpp.build import library

_DTYPES = (torch.float32, torch.bfloat16)


class Heads(ctypes.Structure):
    """``Heads`` of rows.cpp: sizes, and strides in elements."""

    _fields_ = [(n, ctypes.c_int64) for n in ("tokens", "heads", "d", "batch_stride", "token_stride", "head_stride")]


def takes(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether rows of x, with an fp32 weight, are what rows.cpp works on."""
    return x.dtype in _DTYPES and x.device.type == "cpu" and (weight is None or weight.dtype == torch.float32)


def parts(rows: int, width: int) -> Tensor:
    """Scratch for the sums over each block of rows."""
    return torch.empty(-(-rows // library("rows").block_rows()), width)


def call(function: str, x: Tensor, rows: int, *arguments: Any) -> None:
    """Run a function of rows.cpp on rows of the dtype of x; tensors are passed by address, None as null."""
    words = [_word(value) for value in arguments]
    low, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    getattr(library("rows"), function)(int(low), ctypes.c_int64(rows), *words, threads)


def _word(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, Heads):
        return ctypes.byref(value)
    return ctypes.c_double(value) if isinstance(value, float) else value
