"""Sizes of numbers."""

from __future__ import annotations

#: bytes of a number of a dtype
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BF16_BYTES, FP32_BYTES = DTYPE_BYTES["bfloat16"], DTYPE_BYTES["float32"]


def dtype_bytes(dtype: str) -> int:
    """Bytes of a number of a dtype; ValueError names the known ones."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"no size known for dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
