"""Runs that several sources have, or one source twice: kept once, with what only the others know."""

from __future__ import annotations

from typing import Any

import pandas as pd

from xlstm_scaling.published.errors import IngestError
from xlstm_scaling.published.tables import schema_columns

#: two losses of one run may differ by as much, beside what a table says of its error [nat/token]
LOSS_TOLERANCE = 1e-9
#: a run is another one where any of these differs
SAME_RUN = ["arch", "context_length", "num_params", "num_tokens", "global_batch_size_sequences"]


def merge_tables(tables: list[pd.DataFrame]) -> tuple[pd.DataFrame, list[int], list[str]]:
    """All rows of tables with the columns of the schema, each run once, as the first table has it.

    Returns:
        The rows; how many of each table were dropped; a sentence on each run whose sources disagree in loss.

    Raises:
        IngestError: a run id stands for two runs of different size, context or batch.
    """
    columns = list(schema_columns())
    frames = [table.reindex(columns=columns).assign(order=place) for place, table in enumerate(tables)]
    frames = [frame.astype(object).where(frame.notna(), None) for frame in frames]
    table = pd.concat(frames, ignore_index=True)
    rows: list[dict[str, Any] | None] = table.to_dict("records")
    duplicates = [0] * len(tables)
    conflicts: list[str] = []
    by_id: dict[str, int] = {}
    by_size: dict[tuple, list[int]] = {}
    for place, row in enumerate(rows):
        size = tuple(row[column] for column in SAME_RUN) if row["num_params"] and row["num_tokens"] else None
        twin = by_id.get(row["run_id"]) if row["run_id"] else None
        if twin is None and size is not None:
            twin = next((other for other in by_size.get(size, ()) if _same_loss(rows[other], row)), None)
        elif twin is not None and (text := _disagreement(rows[twin], row)):
            conflicts.append(text)
        if twin is None:
            if row["run_id"]:
                by_id[row["run_id"]] = place
            if size is not None:
                by_size.setdefault(size, []).append(place)
            continue
        _absorb(rows[twin], row)
        duplicates[row["order"]] += 1
        rows[place] = None
    kept = pd.DataFrame([row for row in rows if row is not None], columns=[*columns, "order"])
    return kept.drop(columns="order"), duplicates, conflicts


def _same_loss(one: dict, other: dict) -> bool:
    """Whether two rows of equal size are one run: equal losses, and within a source equal recipes and names too."""
    if one["val_loss"] is None or other["val_loss"] is None:
        return False
    if one["order"] == other["order"]:
        same = ("val_loss", "train_loss", "name", "learning_rate", "num_train_steps", "experiment_set")
        return all(one[key] == other[key] for key in same)
    allowed = LOSS_TOLERANCE + (one["val_loss_abs_err"] or 0.0) + (other["val_loss_abs_err"] or 0.0)
    return abs(one["val_loss"] - other["val_loss"]) <= allowed


def _disagreement(one: dict, other: dict) -> str | None:
    """A sentence where two rows of one run id differ in loss; IngestError where they cannot be the same run."""
    where = f"{one['provenance']} and {other['provenance']}"
    wrong = [c for c in SAME_RUN if None not in (one[c], other[c]) and one[c] != other[c]]
    if wrong:
        pairs = ", ".join(f"{c} {one[c]} and {other[c]}" for c in wrong)
        raise IngestError(
            f"run id {one['run_id']} stands for two runs, of {pairs}, in {where}: give them ids of their own"
        )
    if None in (one["val_loss"], other["val_loss"]) or _same_loss({**one, "order": -1}, other):
        return None
    return f"run {one['run_id']}: val_loss {one['val_loss']} and {other['val_loss']} in {where}; the first is kept"


def _absorb(kept: dict, other: dict) -> None:
    """Add to a run what only its duplicate says. Within one file a duplicate counts the run once more."""
    counts = [int(row["notebook_multiplicity"] or 1) for row in (kept, other)]
    kept["notebook_multiplicity"] = sum(counts) if kept["order"] == other["order"] else max(counts)
    for column, value in other.items():
        if kept[column] is None and column not in ("detail", "tag"):
            kept[column] = value
