"""mLSTM, chunkwise-parallel form: quadratic inside chunks of L tokens, recurrent between them. Training and prefill."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.kernels.mlstm.parallel import causal_mask
from xlstm_scaling.kernels.mlstm.state import EPS, MLSTMState, check_inputs, initial_state, state_dtype
from xlstm_scaling.kernels.registry import register

#: forget pre-activation of padding: log sigmoid(1e4) = 0, so padding leaves the state as it is
PAD_FORGET = 1e4


@register("mlstm", form="chunkwise", backend="torch")
def mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState | None = None, chunk_size: int = 64
) -> tuple[Tensor, MLSTMState]:
    """q, k (B, H, T, d_qk), v (B, H, T, d_v), i, f (B, H, T) -> h (B, H, T, d_v), last state; any T.

    Matrix products run in the dtype of q, k, v; gates, maxima and states in fp32.
    """
    check_inputs(q, k, v, i, f)
    B, H, T, d_qk = q.shape
    d_v = v.shape[-1]
    C, n, m = initial_state(q, v) if state is None else state
    L = min(chunk_size, T)
    pad = -T % L
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        i, f = F.pad(i, (0, pad), value=-torch.inf), F.pad(f, (0, pad), value=PAD_FORGET)
    N = (T + pad) // L  # chunks
    dtype = state_dtype(q.dtype)
    q, scale = q.view(B, H, N, L, d_qk), d_qk**-0.5  # scores are scaled in fp32: q keeps its digits
    k, v = k.view(B, H, N, L, d_qk), v.view(B, H, N, L, d_v)
    b = F.logsigmoid(f.to(dtype)).view(B, H, N, L).cumsum(-1)
    source = i.to(dtype).view(B, H, N, L) - b
    g = b[..., -1]  # log decay over a whole chunk

    # what each chunk adds to the state, relative to its own maximum
    m_local = g + source.amax(-1)  # (B, H, N)
    k_weighted = k * torch.exp(g[..., None] + source - m_local[..., None])[..., None].to(k.dtype)
    kv = (k_weighted.transpose(-1, -2) @ v).to(dtype)  # (B, H, N, d_qk, d_v)
    k_sum = k_weighted.to(dtype).sum(-2)

    # recurrence over chunks; Cs[c] is the state before chunk c
    Cs, ns, ms = [], [], []
    # unbound at once: the gradient of one chunk taken by its index is as large as all of them
    for c, (kv_c, k_sum_c) in enumerate(zip(kv.unbind(2), k_sum.unbind(2))):
        Cs.append(C)
        ns.append(n)
        ms.append(m)
        m_next = torch.maximum(g[:, :, c] + m, m_local[:, :, c])
        carry, add = torch.exp(g[:, :, c] + m - m_next), torch.exp(m_local[:, :, c] - m_next)
        C = carry[..., None, None] * C + add[..., None, None] * kv_c
        n = carry[..., None] * n + add[..., None] * k_sum_c
        m = m_next
    C_in, n_in, m_in = torch.stack(Cs, 2), torch.stack(ns, 2), torch.stack(ms, 2)

    # inside the chunks
    log_weights = (b[..., :, None] + source[..., None, :]).masked_fill(causal_mask(L, q.device), -torch.inf)
    m_t = torch.maximum(log_weights.amax(-1), b + m_in[..., None])
    carried = scale * torch.exp((m_in[..., None] - m_t) + b)[..., None]
    scores = (q @ k.transpose(-1, -2)).to(dtype) * (scale * torch.exp(log_weights - m_t[..., None]))
    numerator = (scores.to(v.dtype) @ v).to(dtype) + carried * (q @ C_in.to(q.dtype)).to(dtype)
    denominator = scores.sum(-1) + carried[..., 0] * (q.to(dtype) @ n_in[..., None])[..., 0]
    h = numerator / (torch.maximum(denominator.abs(), torch.exp(-m_t)) + EPS)[..., None]
    return h.to(q.dtype).reshape(B, H, N * L, d_v)[:, :, :T], MLSTMState(C, n, m)
