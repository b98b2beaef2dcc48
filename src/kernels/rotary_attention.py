"""Causal attention with rotary positions (Su et al., 2021), from the product of a layer to the input of the next.

The halves of queries and keys are rotated against each other; query t sees the keys of its document up to t, weighted
by softmax(qᵀk / sqrt(d)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.kernels.registry import register


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, d) with its halves rotated against each other by angles of cos and sin (T, d)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


def document_mask(document_starts: Tensor) -> Tensor | None:
    """(B, 1, T, T) bool, True where a query may see a key: causal and in one document. None if no start is inside."""
    if not bool(document_starts[:, 1:].any()):
        return None
    document = document_starts.long().cumsum(-1)
    T = document.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=document.device).tril()
    return (causal & (document[:, :, None] == document[:, None, :]))[:, None]


def check_rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, document_starts: Tensor | None) -> None:
    """Raise ValueError on shapes that do not belong together."""
    shape = tuple(qkv.shape)
    if len(shape) != 5 or shape[2] != 3 or shape[4] % 2 or cos.shape != (shape[1], shape[4]) or sin.shape != cos.shape:
        raise ValueError(
            "rotary_attention takes qkv (B, T, 3, H, d), d even, and cos, sin (T, d), "
            f"got {shape}, {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if document_starts is not None and document_starts.shape != shape[:2]:
        raise ValueError(f"document_starts are (B, T) = {shape[:2]}, got {tuple(document_starts.shape)}")


@register("rotary_attention", form="reference", backend="torch")
def rotary_attention_reference(qkv: Tensor, cos: Tensor, sin: Tensor, document_starts: Tensor | None = None) -> Tensor:
    """qkv (B, T, 3, H, d), cos, sin (T, d), document_starts (B, T) bool or None -> (B, T, H d), by torch's
    scaled_dot_product_attention. ValueError on shapes that do not fit."""
    check_rotary_attention(qkv, cos, sin, document_starts)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    mask = None if document_starts is None else document_mask(document_starts)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and qkv.shape[1] > 1)
    return y.transpose(1, 2).flatten(2)
