"""Losses of single tokens, read through a model's state in chunks: memory does not grow with the length read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.models import LanguageModel

#: logits in memory at a time [numbers]: about a cache of a CPU
MAX_LOGITS = {"cpu": 2**20}
MAX_LOGITS_ELSEWHERE = 2**26


@torch.inference_mode()
def token_losses(model: LanguageModel, tokens: Tensor, chunk: int) -> Tensor:
    """The loss of every token but the first, given all before it in its row.

    Args:
        model: a language model; its positions go on beyond those it was trained on, as they are.
        tokens: (B, T + 1) int64, each row from an empty context on.
        chunk: tokens of a row that are read in one forward pass.

    Returns:
        (B, T) fp32 (fp64 of a double model) [nat/token]; column t is the loss after t + 1 tokens were read.
    """
    if chunk < 1:
        raise ValueError(f"a chunk must have at least 1 token, got {chunk}")
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batch, length = inputs.shape
    state = model.init_state(batch, length)
    losses = []
    for start in range(0, length, chunk):
        hidden, state = model.hidden(inputs[:, start : start + chunk], None, state)
        losses.append(_losses(model, hidden, targets[:, start : start + chunk]))
    return torch.cat(losses, dim=1)


def _losses(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden (B, T, d), targets (B, T) -> losses (B, T), of a few rows of logits at a time."""
    rows = max(1, MAX_LOGITS.get(hidden.device.type, MAX_LOGITS_ELSEWHERE) // model.shape.vocab_size)
    flat = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    parts = [F.cross_entropy(model.logits(h), target, reduction="none") for h, target in flat]
    return torch.cat(parts).view(targets.shape)
