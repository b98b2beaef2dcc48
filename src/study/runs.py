"""The table of runs: results of all runs of a plan as one validated table, and their training curves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from xlstm_scaling.study.files import read_json
from xlstm_scaling.study.run_spec import RunSpec

SCHEMA_PATH = Path(__file__).resolve().parents[2] / "workflow" / "schemas" / "runs.schema.yaml"

#: what each curve row carries beside the entries of ``history.jsonl``
CURVE_KEYS = ["run_id", "arch", "context_length", "num_params", "experiment_set", "isoflop_tag"]
CURVE_VALUES = [
    "step",
    "tokens",
    "flops",
    "train_loss",
    "val_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "mfu",
]

#: what the table takes from ``result.json`` as it is
RESULT_KEYS = (
    *("epochs", "val_loss", "train_loss", "val_bits_per_byte"),
    *("tokens_per_s", "mfu", "train_time_s", "tokens_digest"),
)


#: what it takes where a result has it: older ones do not, nor do published runs
OPTIONAL_RESULT_KEYS = ("kernel_certificate", "skipped_steps")


#: counts that a published run may lack and a run trained here never does (docs/published.md)
OPTIONAL_COUNTS = (
    *("embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v", "ffn_dim", "vocab_size"),
    *("num_params", "num_tokens", "global_batch_size_sequences", "num_train_steps"),
)
OPTIONAL_NUMBERS = ("num_flops", "tokens_per_param", "learning_rate")


#: how often, and how long each time, a result is waited for whose run has finished [s]
REWRITE_LOOKS, REWRITE_LOOK_S = 30, 2.0

log = logging.getLogger(__name__)


class TableError(ValueError):
    """A table of runs that breaks its schema; the message says which column and rows."""


def validate_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Check a table of runs against ``workflow/schemas/runs.schema.yaml``; returns it with the schema's types.

    Raises TableError. Runs with status ok must have a loss, N, D and FLOPs; runs trained here all of
    ``OPTIONAL_COUNTS`` and ``OPTIONAL_NUMBERS``. Counts that no run lacks are int64.
    """
    import pandera.pandas as pa

    schema = pa.DataFrameSchema.from_yaml(SCHEMA_PATH)
    try:
        table = schema.validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases[["column", "check", "failure_case"]].head(10)
        raise TableError(f"the table of runs breaks its schema:\n{cases.to_string(index=False)}") from None
    for column in ("val_loss", "num_params", "num_tokens", "num_flops"):
        _require(table, table.status == "ok", column, "with status ok")
    for column in (*OPTIONAL_COUNTS, *OPTIONAL_NUMBERS):
        _require(table, table.source == "trained", column, "trained here")
    complete = [column for column in (*OPTIONAL_COUNTS, "seed") if table[column].notna().all()]
    return table.astype(dict.fromkeys(complete, "int64"))


def _require(table: pd.DataFrame, rows: pd.Series, column: str, which: str) -> None:
    lacking = table.loc[rows & table[column].isna(), "run_id"]
    if len(lacking):
        raise TableError(f"runs {which} but without {column}: {', '.join(lacking[:5])}")


def read_runs(path: Path) -> pd.DataFrame:
    """Read and validate a table of runs (Parquet, or CSV)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table of runs at {path}: run the stage `runs` first")
    return validate_runs(pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path))


def runs_table(specs: Sequence[RunSpec], results: Sequence[dict], study: str, corpus: str) -> pd.DataFrame:
    """Join the plan and the results, in the plan's order -> the validated table of runs."""
    rows = []
    for spec, result in zip(specs, results, strict=True):
        if result["run_id"] != spec.run_id:
            raise TableError(f"result of {result['run_id']} where {spec.run_id} belongs")
        rows.append(
            {
                "run_id": spec.run_id,
                "source": "trained",
                "study": study,
                "status": result["status"],
                "detail": result["detail"],
                "experiment_set": spec.experiment_set,
                "isoflop_tag": spec.isoflop_tag if spec.isoflop_tag is not None else math.nan,
                "ratio_tag": spec.ratio_tag if spec.ratio_tag is not None else math.nan,
                "size": spec.size,
                "context_length": spec.context_length,
                **spec.shape,
                "num_params": spec.num_params,
                "num_tokens": spec.num_tokens,
                "num_flops": spec.num_flops,
                "tokens_per_param": spec.num_tokens / spec.num_params,
                "global_batch_size_sequences": spec.batch_sequences,
                "num_train_steps": spec.num_train_steps,
                "learning_rate": spec.learning_rate,
                "seed": spec.seed,
                "compute_dtype": spec.compute_dtype,
                "corpus": corpus,
                **{key: result[key] for key in RESULT_KEYS},
                **{key: result.get(key) for key in OPTIONAL_RESULT_KEYS},
            }
        )
    return validate_runs(pd.DataFrame(rows))


def curves_table(specs: Sequence[RunSpec], runs_folder: Path) -> pd.DataFrame:
    """Training curves of all runs as one table, one row a logged step."""
    frames = []
    for spec in specs:
        path = Path(runs_folder) / spec.run_id / "history.jsonl"
        if not path.is_file():
            continue
        curve = pd.read_json(path, lines=True)
        if curve.empty:
            continue
        curve = curve.reindex(columns=CURVE_VALUES).astype("float64").dropna(subset="train_loss")
        keys = {
            "run_id": spec.run_id,
            "arch": spec.arch,
            "context_length": spec.context_length,
            "num_params": spec.num_params,
            "experiment_set": spec.experiment_set,
            "isoflop_tag": spec.isoflop_tag if spec.isoflop_tag is not None else math.nan,
        }
        frames.append(curve.assign(**keys)[CURVE_KEYS + CURVE_VALUES])
    if not frames:
        return pd.DataFrame(columns=CURVE_KEYS + CURVE_VALUES)
    return pd.concat(frames, ignore_index=True)


def _missing(paths: Sequence[Path]) -> list[str]:
    """Names of the runs without a result."""
    return [path.parent.name for path in paths if not path.is_file()]


def load_results(specs: Sequence[RunSpec], runs_folder: Path) -> list[dict]:
    """``result.json`` of every run, in order. FileNotFoundError names the runs that are missing.

    Another study's workflow that wants a run removes its result before it asks for it, and has it again from the
    trained model within seconds: this is waited for.
    """
    paths = [Path(runs_folder) / spec.run_id / "result.json" for spec in specs]
    missing = _missing(paths)
    for _ in range(REWRITE_LOOKS):
        if not missing or not all((Path(runs_folder) / name / "final.ckpt").is_file() for name in missing):
            break
        log.info("%d results are being written again by another study; waiting for them", len(missing))
        time.sleep(REWRITE_LOOK_S)
        missing = _missing(paths)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(specs)} runs have no result yet, e.g. {missing[0]}: run the stage `train` first"
        )
    return [read_json(path) for path in paths]
