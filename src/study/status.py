"""Where a study stands: done, running, failed, diverged; how fast, and how long still."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from xlstm_scaling.study.amounts import duration_text
from xlstm_scaling.study.files import read_json
from xlstm_scaling.study.locks import lock_state
from xlstm_scaling.study.run_spec import RunSpec

#: what a run can be: finished (ok, diverged), at work, stopped with an error, interrupted, not begun
STATES = ("ok", "running", "diverged", "failed", "stopped", "pending")
#: lines of a failed run's log that are shown
LOG_LINES = 8


@dataclass(frozen=True)
class StudyStatus:
    """``runs``: run_id, state, step, steps, loss, tokens_per_s, where (who trains it), detail, seconds_left; the rest
    over all runs."""

    runs: pd.DataFrame
    flops_done: float
    flops_planned: float
    seconds_left: float

    def summary(self) -> str:
        """The study at a glance."""
        counts = self.runs["state"].value_counts()
        states = ", ".join(f"{counts[state]} {state}" for state in STATES if state in counts)
        share = self.flops_done / self.flops_planned if self.flops_planned else 1.0
        lines = [f"{len(self.runs)} runs: {states}", f"{share:.1%} of {self.flops_planned:.3g} FLOPs done"]
        running = self.runs[self.runs["state"] == "running"]
        if len(running):
            lines.append(f"{len(running)} running at {running['tokens_per_s'].sum():,.0f} tokens/s together")
        if share < 1 and math.isfinite(self.seconds_left):
            side = max(1, len(running))
            lines.append(f"about {duration_text(self.seconds_left)} left with {side} at a time")
        return "\n".join(lines)


def study_status(specs: Sequence[RunSpec], runs_folder: Path, flops_per_s: float) -> StudyStatus:
    """State of every run of a plan. ``flops_per_s``: assumed speed of a run where none has been measured yet."""
    rows, done, speeds = [], 0.0, []
    for spec in specs:
        row = _run_status(spec, Path(runs_folder) / spec.run_id)
        steps = spec.num_train_steps if row["state"] in ("ok", "diverged") else row["step"]
        done += steps * spec.flops_per_step
        if row["tokens_per_s"] and math.isfinite(row["tokens_per_s"]):
            speeds.append((row["tokens_per_s"] * spec.flops_per_token, steps * spec.flops_per_step))
        rows.append(row)
    # FLOP/s so far, each run counted by what it has done
    spent = sum(flops / speed for speed, flops in speeds if speed)
    speed = sum(flops for _, flops in speeds) / spent if spent else flops_per_s
    planned = sum(spec.num_flops for spec in specs)
    table = pd.DataFrame(rows)
    left = [spec.num_flops - row["step"] * spec.flops_per_step for spec, row in zip(specs, rows)]
    unfinished = ~table["state"].isin(["ok", "diverged"])
    table["seconds_left"] = [seconds / speed for seconds in left] * unfinished
    running = max(1, int((table["state"] == "running").sum()))
    return StudyStatus(table, done, planned, float(table["seconds_left"].sum()) / running)


def _run_status(spec: RunSpec, folder: Path) -> dict:
    row = {
        "run_id": spec.run_id, "state": "pending", "step": 0, "steps": spec.num_train_steps, "loss": None,
        "tokens_per_s": None, "where": "", "detail": "",
    }  # fmt: skip
    if (folder / "result.json").is_file():
        result = read_json(folder / "result.json")
        named = {"loss": "val_loss", "tokens_per_s": "tokens_per_s", "detail": "detail", "step": "steps_done"}
        return row | {"state": result["status"]} | {name: result[key] for name, key in named.items()}
    entry = _last_entry(folder / "history.jsonl")
    if entry is not None:
        row |= {"step": entry["step"], "loss": entry["train_loss"], "tokens_per_s": entry["tokens_per_s"]}
    held = lock_state(folder)
    if held is not None and not held.dead:
        return row | {"state": "running", "where": str(held.owner or "")}
    failure = folder / "failure.json"
    if failure.is_file():
        failed = read_json(failure)
        return row | {"state": "failed", "detail": failed["error"], "where": failed.get("process", "")}
    if held is not None:
        detail = f"its process ended or has been silent for {duration_text(held.silent_s)}"
        row |= {"where": str(held.owner or ""), "detail": detail}
        return row | {"state": "stopped"}
    return row | {"state": "stopped"} if entry is not None else row


def _last_entry(history: Path) -> Mapping | None:
    """The last whole line of a training curve."""
    if not history.is_file():
        return None
    for line in reversed(history.read_text().splitlines()):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None


def unfinished_lines(status: StudyStatus, results: Path, states: Sequence[str], most: int | None = None) -> list[str]:
    """What ended the runs of these states, and how the logs of those that did not diverge end; ``most``: runs shown."""
    found = status.runs[status.runs["state"].isin(states)]
    lines = []
    for row in found.head(len(found) if most is None else most).itertuples():
        lines += ["", f"{row.run_id} {row.state}: {row.detail or 'it goes on when it is started again'}"]
        path = Path(results) / "logs" / "runs" / f"{row.run_id}.log"
        if row.state != "diverged" and path.is_file():
            lines += [f"  {path} ends with", *(f"    {line}" for line in log_tail(path))]
    more = len(found) - (len(found) if most is None else most)
    return [*lines, "", f"and {more} more"] if more > 0 else lines


def log_tail(path: Path, lines: int = LOG_LINES) -> list[str]:
    """The last lines of a log, without progress bars and empty lines; [] where there is none."""
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return []
    kept = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return [line for line in kept if line.strip()][-lines:]
