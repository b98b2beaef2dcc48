"""Times that a fitted runtime model predicts for a model of any shape, batch and length.

All of it is `_times`: the counts of `Work` (accounting/work.py: ``prefill_work``, ``step_work``), the number of blocks
and the batch size, and of the row of ``runtime_model`` its ``norm_p`` and the constants of
``runtime_tables.PARAMETERS``, of which NaN or nothing means that the term costs nothing. The formula is that of
`runtime_model`'s docstring, with `memory_share` (accounting/caches.py) for what the cache spares; its terms are
computed in ``runtime_solver._forward``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xlstm_scaling.accounting import ModelShape, Work, dtype_bytes, prefill_work, step_work

from .runtime_solver import predict
from .runtime_tables import COUNTS, costs_of, counted_as, term_counts

Array = NDArray[np.float64]


def _times(row: Mapping[str, Any], work: Work, shape: ModelShape, batch_size: Array) -> Array:
    counts = term_counts({name: getattr(work, name) for name in COUNTS}, shape.num_blocks, batch_size)
    return predict(counts.reshape(-1, counts.shape[-1]), costs_of(row), float(row["norm_p"])).reshape(counts.shape[:-1])


def _checked(row: Mapping[str, Any], shape: ModelShape, kind: str, *positive: Array) -> None:
    found = f"{row['arch']}, {row['quantity']}, {row['status']}"
    if row["arch"] != shape.arch or counted_as(row["quantity"]) != kind or row["status"] != "ok":
        raise ValueError(f"needs a row of runtime_model of {shape.arch}, {kind}, with status ok, not one of {found}")
    if any((values < 1).any() for values in positive):
        raise ValueError("batch_size and prefill_length must be at least 1")


def predict_ttft_s(
    row: Mapping[str, Any],
    shape: ModelShape,
    batch_size: ArrayLike,
    prefill_length: ArrayLike,
    dtype: str | None = None,
    logits: str | None = None,
) -> Array:
    """Time to first token [s] of prompts of ``prefill_length`` tokens each, ``batch_size`` side by side.

    Args:
        row: of the table ``runtime_model``, with the quantity ``ttft`` and the shape's architecture.
        shape: of the model.
        batch_size, prefill_length: numbers or arrays that broadcast; at least 1.
        dtype: of weights and activations; None: as measured.
        logits: ``last`` or ``all``, as in `prefill_work`; None: as measured.

    Raises:
        ValueError: a row of another architecture, quantity or status, or a number below 1.
    """
    batch, length = (np.asarray(value, dtype=np.float64) for value in (batch_size, prefill_length))
    _checked(row, shape, "ttft", batch, length)
    size = dtype_bytes(str(dtype or row["dtype"]))
    return _times(
        row, prefill_work(shape, length, batch, size, size, logits=logits or row["prefill_logits"]), shape, batch
    )


def predict_step_time_s(
    row: Mapping[str, Any],
    shape: ModelShape,
    batch_size: ArrayLike,
    position: ArrayLike,
    dtype: str | None = None,
) -> Array:
    """Time [s] of generating one token of each of ``batch_size`` sequences that have ``position`` tokens by now.

    Args, Raises: as `predict_ttft_s`, of a row with the quantity ``step_time``. The mean over G tokens generated after
    a prompt of P is the time at P + (G − 1) / 2.
    """
    batch, position = (np.asarray(value, dtype=np.float64) for value in (batch_size, position))
    _checked(row, shape, "step_time", batch)
    size = dtype_bytes(str(dtype or row["dtype"]))
    return _times(row, step_work(shape, position, batch, size, size), shape, batch)
