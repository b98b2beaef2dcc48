"""The learning rate: linear warm-up, cosine decay (the paper's) or none, linear cool-down to zero."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    num_steps: int,
    peak: float,
    warmup_steps: int,
    cooldown_steps: int,
    final_fraction: float,
    decay: str = "cosine",
) -> float:
    """Learning rate of update ``step`` (0 … num_steps − 1).

    Warm-up reaches ``peak`` at its last step; the cosine goes down to ``final_fraction`` · peak at the step before the
    cool-down; the cool-down goes linearly towards 0, which it would reach one step after the last. With ``decay``
    constant the rate stays at its peak until the cool-down (warmup-stable-decay: Hu et al., 2024, section 4), so that
    it does not depend on ``num_steps`` before that.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    cosine_steps = num_steps - warmup_steps - cooldown_steps
    if step < num_steps - cooldown_steps:
        if decay == "constant":
            return peak
        progress = (step - warmup_steps + 1) / cosine_steps
        return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
    floor = peak * (final_fraction if cosine_steps > 0 and decay == "cosine" else 1.0)
    return floor * (num_steps - step) / (cooldown_steps + 1)
