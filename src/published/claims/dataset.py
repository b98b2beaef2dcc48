"""Answers to claims about the data set: how many runs there are, what they sum up to, and how FLOPs were planned."""

from __future__ import annotations

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import ModelShape, training_flops

from .evidence import Evidence, answer
from .ledger import Answer, NotAnswerable

#: architecture, context, set of the paper's tables of runs
PAPER_SETS = (
    *((arch, context, "isoflop") for arch in ("transformer", "xlstm") for context in (2048, 8192, 16384)),
    *((arch, 8192, "tokenparam") for arch in ("transformer", "xlstm")),
)


@answer
def run_count(
    evidence: Evidence,
    arch: str | None = None,
    context: int | None = None,
    experiment_set: str | None = None,
    duplicates: bool = False,
) -> Answer:
    """Number of runs; with `duplicates` as the authors' analysis counts them, and `right` counts each once."""
    _require_sets(evidence, arch, context, experiment_set)
    runs = evidence.chosen(arch, context, experiment_set)
    if not duplicates:
        return Answer(float(len(runs)), n_runs=len(runs))
    counted = evidence.multiplicity(runs)
    note = f"{int((counted > 1).sum())} runs are counted twice."
    return Answer(
        counted.sum(), n_runs=len(runs), note=note, without_duplicates=float(len(runs)), right=float(len(runs))
    )


def _require_sets(evidence: Evidence, arch: str | None, context: int | None, experiment_set: str | None) -> None:
    """A sum over sets is answered only where every set of the paper is there."""
    wanted = [
        cell
        for cell in PAPER_SETS
        if all(want in (None, have) for want, have in zip((arch, context, experiment_set), cell))
    ]
    there = {*zip(*(evidence.runs[name] for name in ("arch", "context_length", "experiment_set")))}
    missing = [f"{cell[0]} {cell[2]} at context {cell[1]}" for cell in wanted if cell not in there]
    if missing:
        raise NotAnswerable(f"the runs {', '.join(missing)}")


@answer
def run_total(evidence: Evidence, of: str, duplicates: bool = False) -> Answer:
    """Sum of a column over all runs."""
    _require_sets(evidence, None, None, None)
    values = evidence.runs[of].to_numpy(dtype=np.float64)
    if not duplicates:
        return Answer(values.sum(), n_runs=len(values))
    counted = evidence.multiplicity(evidence.runs)
    once = float(values.sum())
    return Answer(float(counted @ values), n_runs=len(values), without_duplicates=once, right=once)


@answer
def run_extreme(evidence: Evidence, of: str, which: str) -> Answer:
    """Smallest (`min`) or largest (`max`) value of a column."""
    _require_sets(evidence, None, None, None)
    values = evidence.runs[of].to_numpy(dtype=np.float64)
    return Answer(float(values.min() if which == "min" else values.max()), n_runs=len(values))


@answer
def planned_flops(evidence: Evidence, arch: str, context: int, budget: float) -> Answer:
    """Mean FLOPs of a budget's runs with a feed-forward width of 8/3 d that is not rounded, as the planner counts.

    `right` is their mean with the widths that were trained.
    """
    runs = evidence.chosen(arch, context, "isoflop")
    runs = runs[runs["isoflop_tag"] == budget]
    names = ["embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v", "vocab_size"]
    recipe = ["global_batch_size_sequences", "num_train_steps"]
    if runs.empty or runs[names + recipe].isna().to_numpy().any():
        raise NotAnswerable(f"shape and recipe of the runs of {arch} at context {context}, budget {budget:g}")
    planned = []
    for row in runs.itertuples():
        chunk = None if pd.isna(row.chunk_size) else int(row.chunk_size)
        sizes = {name: int(getattr(row, name)) for name in names}
        shape = ModelShape(arch=arch, ffn_dim=int(8 * row.embedding_dim / 3), chunk_size=chunk, **sizes)
        planned.append(training_flops(shape, context, *(int(getattr(row, name)) for name in recipe)))
    right = float(runs["num_flops"].mean())
    note = f"With the width that was trained (rounded up to a multiple of 64) they cost {right / budget:.4f} budgets."
    return Answer(float(np.mean(planned)), n_runs=len(runs), note=note, right=right)
