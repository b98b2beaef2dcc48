"""Runs that differ in length alone share their updates before the cool-down: trained once, kept where runs branch off.

With a constant learning rate (``training.schedule.decay=constant``) nothing before a run's cool-down depends on its
length (warmup-stable-decay: Hu et al., 2024, section 4; Hägele et al., 2024). A run that branches off ends with the
bits of a run that was trained on its own; without its trunk it is trained from the start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from xlstm_scaling.study.run_spec import TrunkSpec
from xlstm_scaling.training.branch import branch_path, load_branch, trunk_identity
from xlstm_scaling.training.checkpoint import CheckpointError, load_file, save_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.run import Run


class Trunk(Run):
    """The shared part of some runs: ``branch-<step>.ckpt`` where each branches off, ``history.jsonl``."""

    outcome = "trunk.json"

    def __init__(self, trunk: TrunkSpec, tokens_folder: Path, folder: Path, execution: Execution) -> None:
        super().__init__(trunk.spec, tokens_folder, folder, replace(execution, trunk=None))
        self.trunk = trunk
        self.identity = trunk_identity(trunk.spec, self.dataset)
        self.keep_steps = frozenset(trunk.steps)

    def missing(self) -> list[int]:
        """Branch steps whose state is not there, or not intact."""
        return [step for step in self.trunk.steps if not self._intact(step)]

    def _intact(self, step: int) -> bool:
        try:
            return load_file(branch_path(self.folder, step))["identity"] == self.identity
        except (CheckpointError, OSError):
            return False

    def finished_result(self) -> dict | None:
        """What a finished trunk says of itself, if all its branches are there, else None."""
        return None if self.missing() else self._result("ok", "")

    def latest(self) -> dict | None:
        """The last checkpoint before the first branch that is missing, of the trunk's own and of its branches."""
        first = min(self.missing())
        own = super().latest()
        if own is not None and own["step"] <= first:
            return own
        return load_branch(self.folder, self.spec, self.dataset, first)

    def keep(self) -> None:
        content = self.content()
        self.require_lock()
        if self.parallel.leader:
            save_file(branch_path(self.folder, self.trainer.step), content, self.lock.require)

    def finish(self, status: str, detail: str, certified: dict) -> dict:
        self.require_lock()
        self.checkpoints.clear()
        return self._result(status, detail)

    def _result(self, status: str, detail: str) -> dict:
        runs = [run.run_id for run in self.trunk.runs]
        return {"trunk_id": self.trunk.trunk_id, "status": status, "detail": detail, "steps": self.trunk.steps} | {
            "runs": runs
        }


def train_trunk(trunk: TrunkSpec, tokens_folder: Path, folder: Path, execution: Execution | None = None) -> dict:
    """Train the shared part of some runs in ``folder`` (or find it trained) and write ``trunk.json``."""
    return Trunk(trunk, tokens_folder, folder, execution or Execution()).execute()
