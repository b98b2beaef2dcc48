"""Columns and types of the fits' tables (docs/tables.md), and what they share: usable runs, errors, settings."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

_INTEGERS = {"num_held_out", "num_runs", "resamples_ok", "resample", "num_points", "num_starts", "num_starts_agree"}
_STRINGS = {"arch", "other", "variable", "predictor", "status", "detail", "subset", "form", "run_id"}
_STRINGS |= {"variant", "law", "quantity"}
_LABELS = {"isoflop_tag", "ratio_tag"}
_TEXT = pd.StringDtype(na_value=np.nan)


def _columns(*parts: str) -> list[str]:
    """Return the columns; `name±` stands for name, name_lo, name_hi."""
    names = " ".join(parts).split()
    return [
        n for name in names for n in ((f"{name[:-1]}{end}" for end in ("", "_lo", "_hi")) if "±" in name else (name,))
    ]


COLUMNS: dict[str, list[str]] = {
    "isoflop": _columns(
        "arch context_length isoflop_tag flops_mean variable num_runs a b c x_opt± loss_opt±",
        "x_min x_max r2 resamples_ok status detail",
    ),
    "isoflop_resamples": _columns("arch context_length isoflop_tag flops_mean variable resample x_opt loss_opt"),
    "power_laws": _columns(
        "arch context_length variable predictor isoflop_tag log10_coefficient± exponent±",
        "num_points predictor_min predictor_max status detail",
    ),
    "power_law_bands": _columns("arch context_length variable predictor isoflop_tag predictor_value value±"),
    "surface": _columns(
        "arch context_length subset form huber_delta A± B± E± alpha± beta± gamma± exponent_params± exponent_tokens±",
        "objective rmse_log r2_log log_likelihood aic bic num_runs num_starts num_starts_agree condition_number",
        "status detail",
    ),
    "surface_resamples": _columns("arch context_length subset form huber_delta resample A B E alpha beta gamma"),
    "surface_predictions": _columns(
        "arch context_length subset form run_id num_params num_tokens val_loss predicted_loss"
    ),
    "overtraining": _columns("arch context_length ratio_tag slope± intercept num_runs status detail"),
    "pareto": _columns("arch context_length run_id num_flops num_params num_tokens val_loss"),
    "pareto_ratio": _columns("arch other context_length val_loss flops flops_other flop_ratio± status"),
    "envelope": _columns("arch context_length variable log10_coefficient exponent± num_points status detail"),
    "sensitivity": _columns("arch context_length variable variant exponent± num_points status detail"),
    "forecasts": _columns(
        "arch context_length law quantity isoflop_tag flops_mean num_points num_held_out predicted± observed± error",
        "coverage status detail",
    ),
}
_CONTEXT_MAY_BE_MISSING = {"power_laws", "power_law_bands"}
REQUIRED_RUN_COLUMNS = (
    *("run_id", "status", "experiment_set", "isoflop_tag", "ratio_tag", "arch", "context_length"),
    *("num_params", "num_tokens", "num_flops", "val_loss"),
)


class FitError(ValueError):
    """No part of the study gives a valid fit; the message names what was missing."""


def make_table(name: str, rows: Iterable[Mapping[str, Any]] | pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as the table `name` of docs/tables.md, with every column and its type, also if empty.

    Args:
        name: a key of `COLUMNS`.
        rows: mappings or a frame; a number that is left out becomes NaN.
        labels: the table of runs; tags keep its type (numbers stay numbers, otherwise strings).

    Raises:
        KeyError: a row holds a column that the contract does not know.
    """
    columns = COLUMNS[name]
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    unknown = set(frame.columns) - set(columns)
    if unknown:
        raise KeyError(f"table {name!r} has no columns {sorted(unknown)}")
    frame = frame.reindex(columns=columns)
    for column in columns:
        if column in _LABELS:
            kind = "float64" if pd.api.types.is_numeric_dtype(labels[column].dtype) else _TEXT
        elif column in _STRINGS:
            kind = _TEXT
        elif column in _INTEGERS or (column == "context_length" and name not in _CONTEXT_MAY_BE_MISSING):
            kind = "int64"
        else:
            kind = "float64"
        frame[column] = frame[column].astype(kind)
    return frame.reset_index(drop=True)


def budget_cells(runs: pd.DataFrame) -> list[str]:
    """Return the cell that each run is drawn from where loss surfaces are resampled: its FLOP budget, or its set."""
    return list(runs["experiment_set"].astype(str) + runs["isoflop_tag"].astype(object).fillna("").astype(str))


def usable_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that ended well and have a finite positive loss, N, D and H, in an order of their own.

    The order depends on the runs only, never on the order of the input's rows.

    Raises:
        FitError: a needed column is absent.
    """
    missing = [column for column in REQUIRED_RUN_COLUMNS if column not in runs.columns]
    if missing:
        raise FitError(f"the table of runs lacks the columns {missing}")
    numbers = runs[["num_params", "num_tokens", "num_flops", "val_loss"]].to_numpy(dtype=np.float64, na_value=np.nan)
    good = (runs["status"] == "ok").to_numpy(dtype=bool) & (np.isfinite(numbers) & (numbers > 0)).all(axis=1)
    keys = ["arch", "context_length", "num_flops", "num_params", "num_tokens", "val_loss", "run_id"]
    return runs[good].sort_values(keys, kind="stable").reset_index(drop=True)
