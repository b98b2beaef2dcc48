"""What can be wrong with published files as a whole; readers of one file have errors of their own."""


class IngestError(ValueError):
    """Published files that give no table of runs; the message says which and what to do."""
