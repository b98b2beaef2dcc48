"""Training: the loop, the schedule, checkpoints."""
