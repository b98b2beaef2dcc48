"""The state of the mLSTM cell and what every form of it shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: added to the normaliser (models: cell)
EPS = 1e-6
#: forget pre-activation at the first token of a document: log sigmoid(-25) closes the gate
RESET_FORGET = -25.0


class MLSTMState(NamedTuple):
    """Memory of one layer, float32 (float64 in references): C (B, H, d_qk, d_v), n (B, H, d_qk), m (B, H)."""

    C: Tensor
    n: Tensor
    m: Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and gates are kept in fp32, in fp64 where the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def initial_state(q: Tensor, v: Tensor) -> MLSTMState:
    """The empty memory for queries (B, H, T, d_qk) and values (B, H, T, d_v)."""
    B, H, _, d_qk = q.shape
    kwargs = {"dtype": state_dtype(q.dtype), "device": q.device}
    return MLSTMState(
        torch.zeros(B, H, d_qk, v.shape[-1], **kwargs), torch.zeros(B, H, d_qk, **kwargs), torch.zeros(B, H, **kwargs)
    )


def check_inputs(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> None:
    """Raise ValueError on shapes that do not belong together."""
    B, H, T, _ = q.shape
    if k.shape != q.shape or v.shape[:3] != (B, H, T) or i.shape != (B, H, T) or f.shape != (B, H, T):
        shapes = {name: tuple(x.shape) for name, x in {"q": q, "k": k, "v": v, "i": i, "f": f}.items()}
        raise ValueError(
            f"mLSTM shapes do not match: {shapes}; expected q, k (B, H, T, d_qk), v (B, H, T, d_v), i, f (B, H, T)"
        )
    if T < 1:
        raise ValueError("mLSTM needs at least one token")
