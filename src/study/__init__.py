"""A study: its configuration, its plan of runs, what identifies a run, and the table of runs."""
