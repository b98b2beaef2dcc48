"""FLOPs and bytes of every measurement, so that the runtime model is fitted from a table alone."""

from __future__ import annotations

import pandas as pd

from xlstm_scaling.accounting import ModelShape, prefill_bytes, prefill_flops, step_bytes, step_flops

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
COUNT_COLUMNS = ("ttft_flops", "ttft_bytes", "step_time_flops", "step_time_bytes")


def row_shape(row: pd.Series) -> ModelShape:
    """The shape of the model of one row of ``measurements``; ``chunk_size`` may be NaN where there are no chunks."""
    names = ("embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v", "ffn_dim", "vocab_size")
    chunk = None if pd.isna(row["chunk_size"]) else int(row["chunk_size"])
    return ModelShape(arch=str(row["arch"]), chunk_size=chunk, **{name: int(row[name]) for name in names})


def _counts(row: pd.Series, steps: int) -> dict[str, float]:
    dtype = str(row["dtype"])
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"no size known for dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    shape, batch, length = row_shape(row), int(row["batch_size"]), int(row["prefill_length"])
    width = {"weight": DTYPE_BYTES[dtype], "act": DTYPE_BYTES[dtype]}
    ends = (length, length + steps - 1)  # the counts are linear in the position: the mean of both ends is the mean
    return {
        "ttft_flops": float(prefill_flops(shape, length, batch)),
        "ttft_bytes": float(prefill_bytes(shape, length, batch, **width)),
        "step_time_flops": sum(float(step_flops(shape, end, batch)) for end in ends) / 2,
        "step_time_bytes": sum(float(step_bytes(shape, end, batch, **width)) for end in ends) / 2,
    }


def add_counts(measurements: pd.DataFrame, generate_steps: int = 1) -> pd.DataFrame:
    """The table ``measurements`` with FLOPs and bytes of both quantities.

    Args:
        measurements: as in docs/tables.md; rows of any status.
        generate_steps: decode steps that ``step_time_s`` is taken over; a step is counted at their mean position.

    Returns:
        A copy with the columns ``ttft_flops``, ``ttft_bytes`` (a whole prefill of the batch, logits of the last token),
        ``step_time_flops`` and ``step_time_bytes`` (one token of every sequence) [FLOPs, bytes]; weights and
        activations in the row's dtype, mLSTM states in fp32. Source: ``accounting``, inference part.

    Raises:
        ValueError: an unknown dtype or architecture, or a shape that is not positive.
    """
    if generate_steps < 1:
        raise ValueError(f"generate_steps must be at least 1, got {generate_steps}")
    rows = [_counts(row, generate_steps) for _, row in measurements.iterrows()]
    counts = pd.DataFrame(rows, index=measurements.index, columns=list(COUNT_COLUMNS), dtype="float64")
    return measurements.drop(columns=list(COUNT_COLUMNS), errors="ignore").join(counts)
