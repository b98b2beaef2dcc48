"""What a run does about a bad step: skip it, count it, and end the run where bad steps are the rule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

#: weight of the past in the running mean of the loss
SMOOTHING = 0.9


class Diverged(RuntimeError):
    """The run cannot go on: its loss ran away, or too many of its steps had to be skipped."""


@dataclass(frozen=True)
class GuardRule:
    """When a step is skipped, and when a run has diverged.

    A step is skipped if its loss or gradient norm is not finite, or if its loss is above ``spike_factor`` times the
    running mean: an isolated bad batch. After ``max_consecutive`` spikes in a row the loss is where the model now is,
    and training goes on. A run has diverged after more than ``max_consecutive`` steps in a row that were not finite,
    after more than ``max_skipped`` skipped steps that are also more than ``max_skipped_share`` of all so far, or once
    the running mean is above ``loss_factor`` times the first loss.
    """

    spike_factor: float = 1.5
    max_consecutive: int = 5
    max_skipped: int = 20
    max_skipped_share: float = 0.01
    loss_factor: float = 1.5


@dataclass
class LossGuard:
    """The rule at work; ``state`` goes into checkpoints, so that a resumed run decides as an uninterrupted one."""

    rule: GuardRule
    first_loss: float | None = None
    smooth_loss: float | None = None
    skipped_steps: int = 0
    spikes_in_a_row: int = 0
    non_finite_in_a_row: int = 0
    last_reason: str = field(default="", compare=False)

    def accept(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Whether step's update is to be made. Raises Diverged."""
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        if not finite:
            self.non_finite_in_a_row += 1
            return self._skip(step, f"loss {loss}, gradient norm {gradient_norm} at step {step}")
        self.non_finite_in_a_row = 0
        if self.first_loss is None:
            self.first_loss = loss
        if self.smooth_loss is not None and loss > self.rule.spike_factor * self.smooth_loss:
            self.spikes_in_a_row += 1
            if self.spikes_in_a_row <= self.rule.max_consecutive:
                return self._skip(step, f"loss {loss:.3g} at step {step} after a mean of {self.smooth_loss:.3g}")
        else:
            self.spikes_in_a_row = 0
        mean = loss if self.smooth_loss is None else SMOOTHING * self.smooth_loss + (1 - SMOOTHING) * loss
        self.smooth_loss = mean
        if mean > self.rule.loss_factor * self.first_loss:
            raise Diverged(
                f"smoothed loss {mean:.3g} at step {step} is above {self.rule.loss_factor:g} times its start "
                f"{self.first_loss:.3g}"
            )
        return True

    def _skip(self, step: int, reason: str) -> bool:
        self.skipped_steps += 1
        self.last_reason = reason
        if self.non_finite_in_a_row > self.rule.max_consecutive:
            raise Diverged(f"{self.non_finite_in_a_row} steps in a row were not finite; the last: {reason}")
        if self.skipped_steps > max(self.rule.max_skipped, self.rule.max_skipped_share * step):
            raise Diverged(f"{self.skipped_steps} steps were skipped; the last: {reason}")
        return False

    def state(self) -> dict:
        """Plain values for a checkpoint."""
        state = asdict(self)
        del state["rule"], state["last_reason"]
        return state

    def restore(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
