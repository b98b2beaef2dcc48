"""The best model for a budget, a context and a latency limit: from tables of laws and of the runtime model alone."""

from xlstm_scaling.planning.errors import PlanningError

__all__ = ["PlanningError"]
