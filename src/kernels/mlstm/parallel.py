"""mLSTM, parallel (quadratic) form: all T tokens at once. For tests and for short sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.kernels.mlstm.state import EPS, MLSTMState, check_inputs, initial_state, state_dtype
from xlstm_scaling.kernels.registry import register


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(L, L) bool, True above the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


@register("mlstm", form="parallel", backend="torch")
def mlstm_parallel(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState | None = None
) -> tuple[Tensor, MLSTMState]:
    """q, k (B, H, T, d_qk), v (B, H, T, d_v), i, f (B, H, T) -> h (B, H, T, d_v), last state.

    With b_t = Σ_{s ≤ t} log σ(f_s): log-weights D_ts = b_t − b_s + i_s (s ≤ t) and b_t + m_0 for the initial state;
    m_t is their maximum (Beck et al., xLSTM, appendix, eqs. of the parallel form).
    """
    check_inputs(q, k, v, i, f)
    C, n, m = initial_state(q, v) if state is None else state
    dtype = state_dtype(q.dtype)
    T = q.shape[2]
    q_scaled, k, v_ = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype), v.to(dtype)
    b = F.logsigmoid(f.to(dtype)).cumsum(-1)  # (B, H, T)
    source = i.to(dtype) - b
    log_weights = (b[..., :, None] + source[..., None, :]).masked_fill(causal_mask(T, q.device), -torch.inf)
    m_t = torch.maximum(log_weights.amax(-1), b + m[..., None])
    carried = torch.exp(b + m[..., None] - m_t)[..., None]  # (B, H, T, 1)
    scores = (q_scaled @ k.transpose(-1, -2)) * torch.exp(log_weights - m_t[..., None])
    numerator = scores @ v_ + carried * (q_scaled @ C)
    denominator = scores.sum(-1) + carried[..., 0] * (q_scaled @ n[..., None])[..., 0]
    h = numerator / (torch.maximum(denominator.abs(), torch.exp(-m_t)) + EPS)[..., None]

    m_last = m_t[..., -1]
    k_weighted = k * torch.exp(b[..., -1:] + source - m_last[..., None])[..., None]
    carry = torch.exp(b[..., -1] + m - m_last)
    C_last = carry[..., None, None] * C + k_weighted.transpose(-1, -2) @ v_
    return h.to(q.dtype), MLSTMState(C_last, carry[..., None] * n + k_weighted.sum(-2), m_last)
