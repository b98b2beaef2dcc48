"""What a study found: sentences computed from its tables, the table of optima, and studies side by side."""
