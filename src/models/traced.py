"""FLOPs as torch's own counter sees them on the real model: the cross-check of the formulas."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from xlstm_scaling.accounting import Flops, ModelShape
from xlstm_scaling.models import build_model
from xlstm_scaling.models.layers import Linear


def traced_flops(shape: ModelShape, context_length: int) -> Flops:
    """Forward FLOPs of one sequence, counted by ``torch.utils.flop_counter`` on meta tensors.

    The counter sees matrix products and attention only, attention without causality; element-wise work counts as 0.
    ``linear`` is what the linear layers and the head cost, ``sequence_mixing`` the rest.
    """
    options = {"kernel_chunk_size": shape.chunk_size, "kernel_backend": "torch"} if shape.chunk_size else {}
    with torch.device("meta"):
        model = build_model(shape, **options)
        tokens = torch.zeros(1, context_length, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(tokens)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    linear = 2 * weights * context_length
    return Flops(linear=linear, sequence_mixing=counter.get_total_flops() - linear, other=0)
