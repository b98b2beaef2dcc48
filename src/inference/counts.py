"""FLOPs and bytes of every measurement, so that the runtime model is fitted from a table alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import pandas as pd

from xlstm_scaling.accounting import DTYPE_BYTES, Work, dtype_bytes, prefill_work, shape_of_row, step_work

__all__ = ["COUNTS", "COUNT_COLUMNS", "DTYPE_BYTES", "add_counts"]

COUNTS = (*(field.name for field in fields(Work)), "flops", "bytes")
COUNT_COLUMNS = tuple(f"{quantity}_{name}" for quantity in ("ttft", "step_time") for name in COUNTS)
#: whether a prefill computes the logits of its ``last`` token or of ``all``
LOGITS_COLUMN = "prefill_logits"


def _counts(row: pd.Series, steps: int, logits: str) -> dict[str, float]:
    shape, batch, length = shape_of_row(row), int(row["batch_size"]), int(row["prefill_length"])
    size = dtype_bytes(str(row["dtype"]))
    works = {
        "ttft": prefill_work(shape, length, batch, size, size, logits=logits),
        "step_time": step_work(shape, length + (steps - 1) / 2, batch, size, size),  # linear in the position
    }
    return {f"{quantity}_{name}": float(getattr(work, name)) for quantity, work in works.items() for name in COUNTS}


def add_counts(
    measurements: pd.DataFrame, generate_steps: int = 1, logits: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """The table ``measurements`` with FLOPs and bytes of both quantities.

    Args:
        measurements: as in docs/tables.md; rows of any status.
        generate_steps: decode steps that ``step_time_s`` is taken over; a step is counted at their mean position.
        logits: architecture -> ``last`` or ``all`` (`prefill_work`); ``last`` where it is not named.

    Returns:
        A copy with the columns `COUNT_COLUMNS`: the parts of `Work` and their sums, for ``ttft_`` of a whole prefill of
        the batch, for ``step_time_`` of one token of every sequence [FLOPs, bytes]; weights and activations in the
        row's dtype, mLSTM states in fp32; and with ``prefill_logits``. Source: ``accounting``, inference part.

    Raises:
        ValueError: an unknown dtype or architecture, or a shape that is not positive.
    """
    if generate_steps < 1:
        raise ValueError(f"generate_steps must be at least 1, got {generate_steps}")
    chosen = [(logits or {}).get(str(arch), "last") for arch in measurements["arch"]]
    rows = [_counts(row, generate_steps, which) for (_, row), which in zip(measurements.iterrows(), chosen)]
    columns = {name: [row[name] for row in rows] for name in COUNT_COLUMNS}
    kept = measurements.drop(columns=[*COUNT_COLUMNS, LOGITS_COLUMN], errors="ignore")
    counts = pd.DataFrame(columns, dtype="float64").assign(**{LOGITS_COLUMN: pd.Series(chosen, dtype="str")})
    return pd.concat([kept, counts.set_axis(kept.index)], axis=1)
