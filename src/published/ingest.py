"""Published runs, from log files and tables of several sources, as one validated table of runs with provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from xlstm_scaling.accounting import training_flops
from xlstm_scaling.published.checks import check_accounting, shape_of_run
from xlstm_scaling.published.errors import IngestError
from xlstm_scaling.published.logs import read_log
from xlstm_scaling.published.merge import SAME_RUN, merge_tables
from xlstm_scaling.published.pickle_objects import PickleError
from xlstm_scaling.published.reader import read_regular_file
from xlstm_scaling.published.selection import add_labels, select
from xlstm_scaling.published.tables import (
    MappingError,
    TableMapping,
    choose_mapping,
    load_mapping,
    read_frame,
    read_table,
    schema_columns,
)
from xlstm_scaling.published.upstream import Upstream, blob_id
from xlstm_scaling.study.config import conf_dir
from xlstm_scaling.study.runs import CURVE_KEYS, CURVE_VALUES, validate_runs

LOG_SUFFIXES, TABLE_SUFFIXES = (".pkl", ".pickle"), (".csv", ".parquet")


@dataclass
class Source:
    """One file that was read. ``blob``: git's id of its content; ``upstream_blob``: of the published one, if known."""

    name: str
    kind: str
    blob: str
    upstream_blob: str | None
    num_rows: int
    num_merged: int = 0
    num_duplicates: int = 0
    ignored_columns: list[str] = field(default_factory=list)

    @property
    def is_upstream(self) -> bool | None:
        """Whether the content is the published one, byte for byte; None where that is not known."""
        return None if self.upstream_blob is None else self.blob == self.upstream_blob


@dataclass
class Ingested:
    """The table of runs, the training curves (columns of `study.runs.curves_table`), and what was found."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    sources: list[Source]
    skipped: dict[str, str]
    missing: list[str]
    num_duplicates: int
    conflicts: list[str]
    mismatches: list[str]

    def summary(self) -> dict[str, Any]:
        """Everything but the tables, as JSON: counts of runs by status, set and selection, and every list above."""
        runs = self.runs
        keys = ["arch", "context_length", "experiment_set"]
        cells = runs.groupby(keys, sort=True).agg(runs=("run_id", "size"), selected=("selected", "sum"))
        reasons = runs["exclusion"].dropna().str.split(",").explode().value_counts()
        return {
            "num_runs": len(runs),
            "num_selected": int(runs["selected"].sum()),
            "status": _counts(runs["status"]),
            "cells": [dict(zip(keys, key, strict=True)) | _plain(row) for key, row in cells.iterrows()],
            "excluded_by": {str(key): int(value) for key, value in reasons.items()},
            "num_curve_points": len(self.curves),
            "num_merged": sum(source.num_merged for source in self.sources),
            "num_duplicates": self.num_duplicates,
            "sources": [asdict(source) | {"is_upstream": source.is_upstream} for source in self.sources],
            "skipped": self.skipped,
            "missing": self.missing,
            "conflicts": self.conflicts,
            "mismatches": self.mismatches,
        }


def ingest(
    paths: Sequence[Path],
    mapping: TableMapping | None = None,
    experiment_set: str | None = None,
    upstream: Upstream | None = None,
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Ingested:
    """Read published runs.

    Args:
        paths: log files, tables, and folders of them (and of a folder ``logs`` inside). In a folder, files that hold no
            runs are skipped; a file given by name must hold some.
        mapping: of the tables that are not recognised by themselves.
        experiment_set: isoflop, tokenparam or other, for log files under a name of their own.
        upstream: settings of the paper's logs; default: ``conf/published/paper.yaml``.
        progress: bars on stderr.
        tell: called with a line for everything that a reader should know: missing, skipped, doubtful.

    Returns:
        `Ingested`. Runs read from logs come before those of tables; a run that several sources have is kept once, as
        its log has it, with what only a table knows added.

    Raises:
        IngestError, MappingError, PickleError, LogError, FileNotFoundError: see each. TableError: the result breaks the
        schema of the table of runs.
    """
    upstream = upstream or Upstream.load()
    tell = tell or _silent
    files, skipped = _find(paths)
    sources, tables, curves = [], [], []
    known = [load_mapping(path) for path in sorted((conf_dir() / "published").glob("*_runs.yaml"))]
    for path, named in tqdm(files, desc="reading", unit="file", disable=None if progress else True, leave=False):
        try:
            if path.suffix.lower() in LOG_SUFFIXES:
                source, table, curve = _read_log_file(path, upstream, experiment_set)
                curves.append(curve)
            else:
                source, table = _read_table_file(path, mapping, known)
        except (IngestError, MappingError) as error:
            if named:
                raise
            skipped[path.name] = str(error)
            continue
        sources.append(source)
        tables.append(table)
    if not tables:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "the folders are empty"
        raise IngestError(f"no published runs in {', '.join(map(str, paths))}: {reasons}")
    runs, duplicates, conflicts = merge_tables(tables)
    for source, count in zip(sources, duplicates, strict=True):
        source.num_duplicates = count
    papers = runs["dataset"].isin([_dataset(name) for name in upstream.logs])
    runs = _finished(runs, papers, upstream.diverged_above)
    mismatches = check_accounting(runs)
    runs = validate_runs(runs)
    missing = _missing_logs(upstream, sources, runs)
    result = Ingested(runs, _curves(curves, runs), sources, skipped, missing, sum(duplicates), conflicts, mismatches)
    for line in _remarks(result):
        tell(line)
    return result


def _find(paths: Sequence[Path]) -> tuple[list[tuple[Path, bool]], dict[str, str]]:
    """Files in order, logs first, each with whether it was named itself; and what folders hold beside."""
    found: dict[Path, bool] = {}
    skipped: dict[str, str] = {}
    for path in map(Path, paths):
        if path.is_dir():
            root = path.resolve()
            for file in sorted([*path.iterdir(), *((path / "logs").iterdir() if (path / "logs").is_dir() else ())]):
                if file.is_dir():
                    continue
                if file.suffix.lower() not in LOG_SUFFIXES + TABLE_SUFFIXES:
                    skipped[file.name] = "neither a pickle nor a table"
                elif not file.resolve().is_relative_to(root):
                    skipped[file.name] = "a link that leaves the folder: name the file itself"
                else:
                    found.setdefault(file, False)
        elif not path.exists():
            raise FileNotFoundError(f"no file or folder {path}: check the path")
        elif path.suffix.lower() not in LOG_SUFFIXES + TABLE_SUFFIXES:
            kinds = ", ".join(LOG_SUFFIXES + TABLE_SUFFIXES)
            raise IngestError(f"{path} is of an unknown kind; {kinds} are read")
        else:
            found[path] = True
    order = sorted(found, key=lambda file: file.suffix.lower() not in LOG_SUFFIXES)
    return [(file, found[file]) for file in order], skipped


def _read_log_file(
    path: Path, upstream: Upstream, experiment_set: str | None
) -> tuple[Source, pd.DataFrame, pd.DataFrame]:
    if (holds := upstream.holds(path.name)) is not None:
        raise IngestError(f"{path.name} holds {holds}, no training runs")
    settings = upstream.settings(path.name, experiment_set)
    if settings is None:
        raise IngestError(
            f"{path.name} is none of the paper's logs ({', '.join(upstream.logs)}): give it one of these names, or say "
            "with --experiment-set what it holds (isoflop, tokenparam, other)"
        )
    content = read_regular_file(path)
    try:
        log = read_log(content, settings, path.name)
    except PickleError as error:
        raise PickleError(f"{path.name}: {error}") from None
    blob, published = blob_id(content), upstream.blob(path.name)
    state = "" if published is None else (", as published" if blob == published else f", differs from {published[:10]}")
    table = log.runs.assign(
        source="published",
        dataset=_dataset(path.name),
        corpus=upstream.content["corpus"],
        provenance=f"{path.name} (blob {blob[:10]}{state})",
        flops_convention="paper",
        val_loss_abs_err=0.0,
    )
    source = Source(path.name, "log", blob, published, log.num_logged, log.num_merged)
    return source, table, log.curves


def _read_table_file(
    path: Path, mapping: TableMapping | None, known: Iterable[TableMapping]
) -> tuple[Source, pd.DataFrame]:
    content = read_regular_file(path)
    frame = read_frame(content, path.suffix.lower(), path.name)
    chosen = choose_mapping(frame, known)
    if chosen is None:
        chosen = mapping or TableMapping()
    table, ignored = read_table(frame, chosen, path.name)
    if table.empty:
        raise MappingError(f"{path.name} has no rows")
    blob = blob_id(content)
    origin = f"{path.name} (blob {blob[:10]})"
    if "provenance" in table:
        origin = origin + ": " + table["provenance"].fillna("")
    return Source(path.name, "table", blob, None, len(table), ignored_columns=ignored), table.assign(provenance=origin)


def _finished(runs: pd.DataFrame, papers: pd.Series, diverged_above: float) -> pd.DataFrame:
    """Every column of the schema with its type, run ids, FLOPs; labels and selection of the paper's runs (a mask)."""
    types = {name: _dtype(entry["dtype"]) for name, entry in schema_columns().items()}
    runs = runs.astype(types)
    runs["tokens_per_param"] = (runs["num_tokens"].astype("float64") / runs["num_params"].astype("float64")).astype(
        float
    )
    uncounted = runs["num_flops"].isna()
    runs.loc[~uncounted & runs["flops_convention"].isna(), "flops_convention"] = "as published"
    for place in runs.index[uncounted]:
        shape, row = shape_of_run(runs.loc[place]), runs.loc[place]
        sizes = row[["num_params", "num_tokens"]]
        if sizes.isna().any():
            continue
        if shape is not None and not row[["global_batch_size_sequences", "num_train_steps"]].isna().any():
            batch, steps = int(row["global_batch_size_sequences"]), int(row["num_train_steps"])
            flops, convention = training_flops(shape, int(row["context_length"]), batch, steps), "paper"
        else:
            flops, convention = 6.0 * float(sizes.iloc[0]) * float(sizes.iloc[1]), "6nd"
        runs.loc[place, ["num_flops", "flops_convention"]] = [float(flops), convention]
    runs["notebook_multiplicity"] = runs["notebook_multiplicity"].fillna(1)
    unnamed = runs.index[runs["run_id"].isna()]
    runs.loc[unnamed, "run_id"] = [_run_id(runs.loc[place]) for place in unnamed]
    runaway = papers & (runs["status"] == "ok") & (runs["val_loss"] > diverged_above)
    runs.loc[runaway, ["status", "detail"]] = ["diverged", f"validation loss above {diverged_above} nat/token"]
    labelled = add_labels(runs)
    for column in ("isoflop_tag", "ratio_tag"):
        runs[column] = labelled[column].where(papers, runs[column])
    chosen = select(runs)
    runs["selected"] = chosen["selected"].where(papers, runs["status"] == "ok").astype("boolean")
    runs["exclusion"] = chosen["exclusion"].where(papers, None).astype("str")
    return runs


def _run_id(row: pd.Series) -> str:
    """Readable name and digest of what is published of a run that has no id."""
    facts = [str(row[key]) for key in (*SAME_RUN, "num_flops", "val_loss", "learning_rate", "name", "provenance")]
    digest = hashlib.sha256("|".join([*facts, str(row.name)]).encode()).hexdigest()[:10]
    size = "unknown" if pd.isna(row["num_params"]) else f"{row['num_params'] / 1e6:.0f}M"
    return f"{row['arch']}-c{row['context_length']}-{size}-{digest}"


def _missing_logs(upstream: Upstream, sources: Sequence[Source], runs: pd.DataFrame) -> list[str]:
    """The paper's logs that are neither here nor covered by a table; none where nothing here is the paper's."""
    here = {source.name for source in sources}
    datasets = {name: _dataset(name) for name in upstream.logs}
    covered = set(runs["dataset"].dropna()) & set(datasets.values())
    return [name for name in upstream.logs if covered and name not in here and datasets[name] not in covered]


def _curves(curves: list[pd.DataFrame], runs: pd.DataFrame) -> pd.DataFrame:
    """The curves of the runs that were kept, with their labels."""
    filled = [curve for curve in curves if len(curve)]
    if not filled:
        return pd.DataFrame(columns=CURVE_KEYS + CURVE_VALUES)
    table = pd.concat(filled, ignore_index=True)
    table = table.drop_duplicates(["run_id", "step"])
    labels = runs.set_index("run_id")["isoflop_tag"]
    table = table[table["run_id"].isin(labels.index)]
    table["isoflop_tag"] = table["run_id"].map(labels).astype("float64")
    return (
        table[CURVE_KEYS + CURVE_VALUES]
        .astype({"context_length": "int64", "num_params": "int64"})
        .reset_index(drop=True)
    )


def _remarks(result: Ingested) -> Iterable[str]:
    for name, reason in result.skipped.items():
        yield f"skipped {name}: {reason}"
    if result.missing:
        yield f"missing logs of the paper: {', '.join(result.missing)} (--download FOLDER fetches them)"
    for source in result.sources:
        if source.is_upstream is False:
            blobs = f"blob {source.blob}, not {source.upstream_blob}"
            yield f"{source.name} is not the published file byte for byte: {blobs}"
    for text in result.conflicts:
        yield f"sources disagree: {text}"
    for text in result.mismatches:
        yield f"accounting: {text}"


def _dataset(name: str) -> str:
    """What the authors call the runs of a log file: its name without `_wandb_data.pkl`."""
    return Path(name).stem.removesuffix("_wandb_data")


def _dtype(name: str) -> str:
    return "Int64" if name == "int64" else name


def _counts(column: pd.Series) -> dict[str, int]:
    return {str(key): int(value) for key, value in column.value_counts().items()}


def _plain(row: pd.Series) -> dict[str, int]:
    return {str(key): int(value) for key, value in row.items()}


def _silent(_: str) -> None:
    return None
