"""The command ``xlstm-scaling runtime``: the constants of a study's runtime model, and where it misses."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

DESCRIPTION = "the runtime model of a study: its constants with intervals, and its errors by model size"
MODEL, PREDICTIONS = "runtime_model.parquet", "runtime_predictions.parquet"


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling runtime``."""
    parser.add_argument("study", type=Path, help="results folder of a study, e.g. results/laptop, or its inference/")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _tables(study: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    import pandas as pd

    for folder in (study, study / "inference"):
        if (folder / MODEL).is_file() and (folder / PREDICTIONS).is_file():
            return pd.read_parquet(folder / MODEL), pd.read_parquet(folder / PREDICTIONS)
    raise FileNotFoundError(
        f"no {MODEL} and {PREDICTIONS} in {study}: run the stage `inference`, or name a results folder"
    )


def errors_by_size(predictions: pd.DataFrame) -> pd.DataFrame:
    """Mean absolute relative errors: ``arch, quantity, device, num_params, num_measurements, mape_fit, mape_held_out``.

    ``mape_held_out`` is that of fits that did not see the size.
    """
    keys = ["arch", "quantity", "device", "num_params"]
    error = (predictions["predicted_s"] / predictions["measured_s"] - 1.0).abs()
    rows = predictions[keys].assign(error=error, held_out=predictions["held_out"].astype(bool))
    means = rows.pivot_table("error", keys, "held_out").reindex(columns=[False, True])
    counts = rows[~rows["held_out"]].groupby(keys).size().rename("num_measurements")
    table = means.rename(columns={False: "mape_fit", True: "mape_held_out"}).join(counts).reset_index()
    return table[[*keys, "num_measurements", "mape_fit", "mape_held_out"]]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _lines(row: dict[str, Any], errors: pd.DataFrame) -> Iterator[str]:
    from .runtime_tables import PARAMETERS, RATES, TERMS

    yield f"{row['arch']}, {row['quantity']}, {row['device']}: {row['status']}, {row['num_measurements']} measurements"
    if row["status"] == "ok":
        for term in TERMS:
            name = PARAMETERS[term]
            absent = math.isnan(row[name]) if term in RATES else row[name] == 0
            if not absent:
                interval = f"{_number(row[f'{name}_lo'])} to {_number(row[f'{name}_hi'])}"
                yield f"  {name:30s} {_number(row[name]):>9s}   {interval}"
        yield f"  mean absolute relative error: {row['mape_fit']:.1%}, on sizes held out {row['mape_held_out']:.1%}"
        if not math.isnan(row.get("mape_noise", math.nan)):
            yield f"  the spread of the repeats alone makes {row['mape_noise']:.1%}"
        for size in errors.itertuples():
            yield f"    {size.num_params:14,.0f} parameters  {size.mape_fit:6.1%}  held out {size.mape_held_out:6.1%}"
    if row["detail"]:
        yield f"  {row['detail']}"


def run_runtime(args: argparse.Namespace) -> int:
    """Print the runtime model. Raises FileNotFoundError where the study has none."""
    models, predictions = _tables(args.study)
    errors = errors_by_size(predictions)
    if args.json:
        tables = {"models": models, "errors": errors}
        parts = {name: table.to_json(orient="records", double_precision=15) for name, table in tables.items()}
        print(json.dumps({name: json.loads(part) for name, part in parts.items()}))
        return 0
    for row in models.to_dict("records"):
        own = errors[["arch", "quantity", "device"]].eq([row["arch"], row["quantity"], row["device"]]).all(axis=1)
        print("\n".join(_lines(row, errors[own])))
    return 0
