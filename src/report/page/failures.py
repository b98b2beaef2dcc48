"""What a study lost: runs that failed or diverged, fits without a result, cells not measured, stages not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pandas as pd

from xlstm_scaling.figures.tables import fine
from xlstm_scaling.fitting.tables import COLUMNS
from xlstm_scaling.study.files import read_json
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.status import log_tail

#: last lines of a log that are shown
LOG_LINES = 15
#: reasons of one table that are shown
MAX_REASONS = 4
#: table -> what its rows are
NOUNS = {
    **{f"fits/{name}": "fits" for name in COLUMNS},
    "fits/pareto_ratio": "losses",
    "inference/measurements": "cells of the inference benchmark",
    "inference/runtime_model": "runtime models",
    "evaluation/length": "bins of positions",
}


@dataclass(frozen=True)
class LostRun:
    """A run without a usable loss; ``log`` is relative to the study's folder, ``tail`` its last lines."""

    run_id: str
    state: str
    detail: str
    log: str = ""
    tail: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LostRows:
    """Rows of a table without a result: how many of how many, by status, with the commonest reasons."""

    table: str
    noun: str
    lost: int
    total: int
    statuses: dict[str, int]
    reasons: list[str]


@dataclass(frozen=True)
class MissingStage:
    """A stage whose files are not there, and the end of its log."""

    stage: str
    files: list[str]
    log: str = ""
    tail: list[str] = field(default_factory=list)


def lost_runs(paths: StudyPaths, runs: pd.DataFrame | None) -> list[LostRun]:
    """Runs of the table that are not ok, and runs of the plan that left no result."""
    found = []
    if runs is not None:
        for row in runs[runs["status"] != "ok"].itertuples():
            detail = getattr(row, "detail", "")
            found.append(_lost(paths, row.run_id, row.status, "" if pd.isna(detail) else str(detail)))
    known = set() if runs is None else set(runs["run_id"])
    plan = paths.plan / "plan.parquet"
    for run_id in pd.read_parquet(plan, columns=["run_id"])["run_id"] if plan.is_file() else []:
        folder = paths.runs / run_id
        if run_id in known or (folder / "result.json").is_file():
            continue
        failure = folder / "failure.json"
        if failure.is_file():
            found.append(_lost(paths, run_id, "failed", str(read_json(failure).get("error", ""))))
        elif (folder / "history.jsonl").is_file():
            found.append(_lost(paths, run_id, "unfinished", "it goes on from its checkpoint"))
        else:
            found.append(LostRun(run_id, "not begun", ""))
    return found


def _lost(paths: StudyPaths, run_id: str, state: str, detail: str) -> LostRun:
    log = paths.results / "logs" / "runs" / f"{run_id}.log"
    if not log.is_file():
        return LostRun(run_id, state, detail)
    return LostRun(run_id, state, detail, f"../logs/runs/{run_id}.log", log_tail(log, LOG_LINES))


def lost_rows(tables: Mapping[str, pd.DataFrame]) -> Iterator[LostRows]:
    """Tables with rows that have no usable result."""
    for name, noun in NOUNS.items():
        if name not in tables or "status" not in tables[name]:
            continue
        table = tables[name]
        lost = table[~fine(table["status"])]
        if lost.empty:
            continue
        statuses = {str(key): int(count) for key, count in lost["status"].value_counts().sort_index().items()}
        reasons: list[str] = []
        if "detail" in lost:
            said = lost["detail"].dropna().astype(str)
            counts = said[said.str.strip() != ""].value_counts()
            ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            reasons = [f"{text} ({count}×)" if count > 1 else text for text, count in ranked[:MAX_REASONS]]
            if len(ranked) > MAX_REASONS:
                reasons.append(f"and {len(ranked) - MAX_REASONS} more reasons, in the column detail")
        yield LostRows(name, noun, len(lost), len(table), statuses, reasons)


def skipped_steps(runs: pd.DataFrame | None) -> tuple[int, int]:
    """(runs that skipped updates, updates skipped in all)."""
    if runs is None or "skipped_steps" not in runs:
        return 0, 0
    skipped = pd.to_numeric(runs["skipped_steps"], errors="coerce").fillna(0)
    return int((skipped > 0).sum()), int(skipped.sum())


def expected_files(published: bool, inference: bool) -> dict[str, list[str]]:
    """Stage -> the tables it leaves in a study's folder."""
    stages = {} if published else {"plan": ["plan/plan.json"]}
    stages |= {"ingest" if published else "runs": ["runs.parquet"], "fit": [f"fits/{name}.parquet" for name in COLUMNS]}
    if inference:
        names = ("measurements", "runtime_model", "runtime_predictions")
        stages["inference"] = [f"inference/{name}.parquet" for name in names]
    if not published:
        stages["evaluate"] = ["evaluation/length.parquet"]
    return stages | {"findings": ["findings.parquet", "optimal.parquet"]}


def missing_stages(paths: StudyPaths, published: bool, inference: bool) -> list[MissingStage]:
    """Stages that have left less than they should."""
    found = []
    for stage, files in expected_files(published, inference).items():
        absent = [name for name in files if not (paths.study / name).is_file()]
        if absent:
            log = paths.results / "logs" / paths.study.name / f"{stage}.log"
            tail = log_tail(log, LOG_LINES)
            found.append(MissingStage(stage, absent, f"../logs/{paths.study.name}/{log.name}" if tail else "", tail))
    return found
