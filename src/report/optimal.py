"""The table of optima: what a model of a given size should cost and see, by the power laws of the IsoFLOP minima."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from xlstm_scaling.fitting.power_law import flops_bounds, minima_lines
from xlstm_scaling.fitting.resampling import percentile_interval

#: sizes that the table is made for [parameters]
SIZES = (1e8, 4e8, 1e9, 3e9, 7e9, 1.3e10, 3.3e10, 7e10, 1.75e11)
COLUMNS = [
    *("arch", "context_length", "num_params", "num_flops", "num_flops_lo", "num_flops_hi"),
    *("num_tokens", "num_tokens_lo", "num_tokens_hi", "tokens_per_param", "beyond_budgets", "num_budgets"),
]


def optimal_table(
    isoflop: pd.DataFrame, resamples: pd.DataFrame, config: Mapping[str, Any], sizes: Sequence[float] = SIZES
) -> pd.DataFrame:
    """The budget H [FLOPs] for which a size is best, and the tokens D*(H), per architecture and context.

    Args:
        isoflop, resamples: the tables of the fits.
        config: the group `fitting`: seed, confidence, power_law.flops_range and min_points.
        sizes: N [parameters].

    Returns:
        One row an architecture, context and size. N*(H) is inverted and put into D*(H), resample by resample, which
        gives the intervals. ``beyond_budgets`` is H over the largest budget with a minimum: above 1 it is extrapolated.
    """
    cells = isoflop[(isoflop["status"] == "ok") & isoflop["flops_mean"].between(*flops_bounds(config))]
    rows: list[dict[str, Any]] = []
    for (arch, context), lines in sorted(
        minima_lines(isoflop, resamples, config, ("num_params", "num_tokens")).items()
    ):
        if not {"num_params", "num_tokens"} <= set(lines):
            continue
        mine = (cells["arch"] == arch) & (cells["context_length"] == context) & (cells["variable"] == "num_params")
        largest = cells.loc[mine, "flops_mean"]
        for size in sizes:
            log_flops = (np.log10(size) - lines["num_params"][:, 0]) / lines["num_params"][:, 1]
            log_tokens = lines["num_tokens"][:, 0] + lines["num_tokens"][:, 1] * log_flops
            with np.errstate(over="ignore"):  # a resample that is nearly flat: inf is left out of the interval
                flops, tokens = 10.0**log_flops, 10.0**log_tokens
            flops_ends, tokens_ends = (percentile_interval(v[1:], config["confidence"]) for v in (flops, tokens))
            rows.append(
                {
                    **{"arch": arch, "context_length": int(context), "num_params": size},
                    **{"num_flops": flops[0], "num_flops_lo": flops_ends[0], "num_flops_hi": flops_ends[1]},
                    **{"num_tokens": tokens[0], "num_tokens_lo": tokens_ends[0], "num_tokens_hi": tokens_ends[1]},
                    "tokens_per_param": tokens[0] / size,
                    "beyond_budgets": flops[0] / largest.max(),
                    "num_budgets": len(largest),
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)
