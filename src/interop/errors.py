"""What cannot be carried over."""

from __future__ import annotations


class InteropError(ValueError):
    """A model that the other side cannot hold, or a folder that cannot be read; the message names the field."""


def refuse(field: str, value: object, reason: str) -> InteropError:
    """The error for a field whose value the other side cannot represent."""
    return InteropError(f"{field} = {value!r} cannot be represented: {reason}")
