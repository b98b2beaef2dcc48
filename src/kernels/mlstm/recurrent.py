"""mLSTM, recurrent form: the definition, one token at a time. The reference for every other form, and decoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.kernels.mlstm.state import EPS, MLSTMState, check_inputs, initial_state, state_dtype
from xlstm_scaling.kernels.registry import register


@register("mlstm", form="step", backend="torch")
def mlstm_step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState) -> tuple[Tensor, MLSTMState]:
    """One token: q, k (B, H, d_qk), v (B, H, d_v), gate pre-activations i, f (B, H) -> h (B, H, d_v), state.

    m' = max(log σ(f) + m, i); C' = f' C + i' k vᵀ; n' = f' n + i' k; h = C'ᵀq / (max(|n'ᵀq|, exp(−m')) + eps)
    with f' = exp(log σ(f) + m − m'), i' = exp(i − m') and q scaled by d_qk^-1/2 (Beck et al., xLSTM, eqs. 19-27).
    """
    C, n, m = state
    dtype = state_dtype(q.dtype)
    log_f = F.logsigmoid(f.to(dtype))
    i = i.to(dtype)
    m_new = torch.maximum(log_f + m, i)
    forget = torch.exp(log_f + m - m_new)[..., None]
    inputs = torch.exp(i - m_new)[..., None]
    q_scaled, k_state, v_state = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype), v.to(dtype)
    C = forget[..., None] * C + (inputs * k_state)[..., None] * v_state[..., None, :]
    n = forget * n + inputs * k_state
    numerator = (q_scaled[..., None, :] @ C).squeeze(-2)
    normaliser = torch.maximum((q_scaled * n).sum(-1).abs(), torch.exp(-m_new)) + EPS
    return (numerator / normaliser[..., None]).to(q.dtype), MLSTMState(C, n, m_new)


@register("mlstm", form="recurrent", backend="torch")
def mlstm_recurrent(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState | None = None
) -> tuple[Tensor, MLSTMState]:
    """All T tokens in order: q, k (B, H, T, d_qk), v (B, H, T, d_v), i, f (B, H, T) -> h (B, H, T, d_v), last state."""
    check_inputs(q, k, v, i, f)
    state = initial_state(q, v) if state is None else state
    outputs = []
    # unbound at once: the gradient of one token taken by its index is as large as all of them
    for token in zip(*(x.unbind(2) for x in (q, k, v, i, f))):
        h, state = mlstm_step(*token, state)
        outputs.append(h)
    return torch.stack(outputs, dim=2), state
