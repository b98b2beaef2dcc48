"""Conditions that the workflow understands by their exit status."""

from __future__ import annotations

#: exit status of a run that saved a checkpoint because it was asked to stop
EXIT_PREEMPTED = 85


class Preempted(RuntimeError):
    """The run was asked to stop (SIGTERM); a checkpoint was written and the next start goes on from it."""
