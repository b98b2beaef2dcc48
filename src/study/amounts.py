"""Durations and sizes as people read them."""

from __future__ import annotations


def duration_text(seconds: float) -> str:
    """Two to three digits in the unit that fits: ``45.0 s``, ``12.5 min``, ``3.2 h``, ``4.0 days``."""
    for unit, length_s in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:,.1f} {unit}"
    return f"{seconds:.1f} s"


def size_text(num_bytes: float) -> str:
    """Three digits in decimal units: ``512 kB``, ``1.23 GB``; nothing for 0."""
    for unit, size_bytes in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size_bytes:
            return f"{num_bytes / size_bytes:,.3g} {unit}"
    return f"{num_bytes / 1e3:,.3g} kB" if num_bytes else ""
