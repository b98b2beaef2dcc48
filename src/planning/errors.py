"""What can be wrong with a question; an answer of "infeasible" is a result, not an error."""


class PlanningError(ValueError):
    """Laws, a runtime model or options that give no answer; the message says what to change."""
