"""Which of two versions of measured times to first token physics supports.

The FLOPs of a Transformer's prefill go as a T + b T²: doubling the prompt multiplies them by a number that rises
steadily from 2 to 4. A time that is bound by them has to do the same once overheads are small.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]


def doubling_growth(measurements: pd.DataFrame, column: str, shortest: int = 1024) -> pd.Series:
    """Median over models and batches of value(2 T) / value(T), by prefill length T.

    Args:
        measurements: columns ``model``, ``batch_size``, ``prefill_length`` and ``column``.
        column: times [s] or FLOPs; what is not positive counts as missing.
        shortest: smallest T, so that overheads do not count [tokens].
    """
    rows = measurements[(measurements[column] > 0) & (measurements["prefill_length"] >= shortest)]
    keys = ["model", "batch_size", "prefill_length"]
    later = rows[[*keys, column]].assign(prefill_length=rows["prefill_length"] / 2)
    pairs = rows[[*keys, column]].merge(later, on=keys, suffixes=("", "_later"))
    return (pairs[f"{column}_later"] / pairs[column]).groupby(pairs["prefill_length"]).median()


def is_steady(growth: pd.Series, slack: float = 0.02) -> bool:
    """Whether the growth never falls from one length to the next, but for a share ``slack`` of it."""
    values = growth.sort_index().to_numpy(dtype=np.float64)
    return bool(len(values) > 1 and (values[1:] >= values[:-1] * (1 - slack)).all())
