"""Two contexts, the same token budget: which runs show what the context does to the loss, all else equal.

A run of the study and a run that differs from it in its context alone: same shape, tokens, tokens a step, learning rate
and schedule. Where an IsoFLOP run of the study is that very run, it serves; else it is planned beside the study.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from xlstm_scaling.study.plan import PlanError, Planner
from xlstm_scaling.study.run_spec import RunSpec

#: sizes that are taken where the study names none, spread over those of a cell
NUM_SIZES = 3
#: relative difference in parameters and in tokens up to which a published run stands in for the other context
TOLERANCE = 0.1

COLUMNS = (
    *("arch", "size", "num_params", "context_length", "run_id", "num_tokens", "num_flops", "val_loss"),
    *("reference_context", "reference_loss", "loss_difference", "params_ratio", "tokens_ratio", "source"),
    *("status", "detail"),
)


def at_context(run: RunSpec, context_length: int) -> RunSpec:
    """The run with another context: as many tokens a step and steps, to the nearest whole sequence.

    PlanError where not one sequence fits a step.
    """
    tokens = run.batch_sequences * run.context_length
    batch = round(tokens / context_length)
    if batch < 1:
        raise PlanError(f"{run.run_id}: a step of {tokens} tokens holds no sequence of {context_length}")
    steps = max(1, round(run.num_tokens / (batch * context_length)))
    scale = steps / run.num_train_steps
    return replace(
        run,
        context_length=context_length,
        batch_sequences=batch,
        num_train_steps=steps,
        warmup_steps=round(run.warmup_steps * scale),
        cooldown_steps=round(run.cooldown_steps * scale),
        experiment_set="other",
        isoflop_tag=None,
    )


def compared_contexts(config: DictConfig) -> list[int]:
    """``study.context_scaling.context_lengths``, else the base context and the longest of the IsoFLOP cells; twice the
    base where there is no other."""
    given = [int(length) for length in config.study.context_scaling.context_lengths]
    base = int(config.study.base_context)
    longest = max((int(cell.context_length) for cell in config.study.isoflop.values()), default=base)
    contexts = sorted(set(given or [base, longest if longest > base else 2 * base]))
    if len(contexts) < 2:
        raise PlanError(f"study.context_scaling.context_lengths must hold two contexts or more, got {given}")
    return contexts


def reference_runs(config: DictConfig) -> list[RunSpec]:
    """IsoFLOP runs at the shortest compared context, else at the base context: of each architecture those of the
    largest budget that other compared contexts have too, else of the largest; of ``study.context_scaling.sizes``, else
    `NUM_SIZES` of them. None where the study has no such cell."""
    planner, contexts = Planner(config), compared_contexts(config)
    wanted = list(config.study.context_scaling.sizes)
    chosen = []
    for arch in planner.study.architectures:
        cells = {name: cell for name, cell in planner.study.isoflop.items() if arch in planner.architectures(cell)}
        for reference in (contexts[0], int(config.study.base_context)):
            here = {name: cell for name, cell in cells.items() if cell.context_length == reference}
            if here:
                break
        else:
            continue
        elsewhere = {cell.budget_flops for cell in cells.values() if cell.context_length in contexts[1:]}
        name, cell = max(here.items(), key=lambda item: (item[1].budget_flops in elsewhere, item[1].budget_flops))
        runs = [run for run in planner.isoflop_runs(name, cell) if run.arch == arch]
        if wanted:
            chosen += [run for run in runs if run.size in wanted]
            continue
        places = np.linspace(0, len(runs) - 1, min(NUM_SIZES, len(runs))).round().astype(int)
        chosen += [sorted(runs, key=lambda run: run.num_params)[place] for place in places]
    if wanted and (missing := sorted(set(wanted) - {run.size for run in chosen})):
        raise PlanError(f"study.context_scaling.sizes: no IsoFLOP run to compare has the size {', '.join(missing)}")
    return chosen


def context_scaling_runs(config: DictConfig) -> list[tuple[RunSpec, RunSpec]]:
    """Each reference run with itself and with its twin at every other compared context: (reference, run), …"""
    contexts = compared_contexts(config)
    return [
        (run, run if context == run.context_length else at_context(run, context))
        for run in reference_runs(config)
        for context in sorted({run.context_length, *contexts})
    ]


def extra_runs(pairs: Iterable[tuple[RunSpec, RunSpec]], plan: Iterable[RunSpec]) -> list[RunSpec]:
    """Runs of the comparison that are not in the plan of the study."""
    known = {run.run_id for run in plan}
    return list({run.run_id: run for _, run in pairs if run.run_id not in known}.values())


def _row(run: pd.Series, reference: pd.Series, source: str, tolerance: float) -> dict[str, object]:
    keys = ("arch", "size", "num_params", "context_length", "run_id", "num_tokens", "num_flops", "val_loss")
    row = {name: run.get(name) for name in keys}
    params, tokens = (float(run[n]) / float(reference[n]) for n in ("num_params", "num_tokens"))
    row |= {"reference_context": reference["context_length"], "reference_loss": reference["val_loss"]}
    row |= {"loss_difference": run["val_loss"] - reference["val_loss"], "params_ratio": params, "tokens_ratio": tokens}
    bad = [part["run_id"] for part in (run, reference) if part["status"] != "ok"]
    row |= {"source": source, "status": "ok", "detail": ""}
    if bad:
        row |= {"status": "no_loss", "detail": f"{bad[0]} has no loss", "loss_difference": np.nan}
    elif max(abs(params - 1), abs(tokens - 1)) > tolerance:
        row |= {"status": "unequal", "detail": f"{params:.3g} times the parameters, {tokens:.3g} times the tokens"}
    return row


def context_table(runs: pd.DataFrame, pairs: Sequence[tuple[RunSpec, RunSpec]], planned: Sequence[str]) -> pd.DataFrame:
    """Loss by context of runs trained here: the table ``context_scaling`` of docs/tables.md.

    Args:
        runs: the table of the runs of ``pairs``.
        pairs: of `context_scaling_runs`.
        planned: ids of runs in the study's own plan; the others are ``extra``.
    """
    by_id = runs.set_index("run_id", drop=False)
    rows = []
    for reference, run in pairs:
        source = "study" if run.run_id in planned else "extra"
        rows.append(_row(by_id.loc[run.run_id], by_id.loc[reference.run_id], source, TOLERANCE))
    return _table(rows)


def published_context_table(runs: pd.DataFrame, contexts: Sequence[int] | None = None) -> pd.DataFrame:
    """Loss by context of published runs, which were not made for it: each run at the shortest context beside that at
    each other which is nearest in parameters and tokens (the sum of both logarithms' differences).

    Pairs further apart than `TOLERANCE` in either are left out. ``contexts``: default all.
    """
    rows = []
    usable = runs[(runs["status"] == "ok") & (runs["experiment_set"] == "isoflop") & runs["val_loss"].notna()]
    for _, of_arch in usable.groupby("arch", sort=False):
        there = sorted(of_arch["context_length"].unique())
        chosen = [context for context in there if context in contexts] if contexts else there
        if len(chosen) < 2:
            continue
        references = of_arch[of_arch["context_length"] == chosen[0]].sort_values(["num_flops", "num_params"])
        for _, reference in references.iterrows():
            twins = []
            for context in chosen[1:]:
                others = of_arch[of_arch["context_length"] == context]
                gaps = [np.log(others[n].astype(float) / float(reference[n])) for n in ("num_params", "num_tokens")]
                near = others.loc[(gaps[0].abs() + gaps[1].abs()).idxmin()]
                row = _row(near, reference, "stands in", TOLERANCE)
                twins += [row] if row["status"] == "ok" else []
            rows += [_row(reference, reference, "published", TOLERANCE), *twins] if twins else []
    return _table(rows)


def _table(rows: list[dict[str, object]]) -> pd.DataFrame:
    text = ("arch", "size", "run_id", "source", "status", "detail")
    whole = ("context_length", "reference_context")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["size"] = table["size"].fillna("")
    return table.astype({n: "str" if n in text else "int64" if n in whole else "float64" for n in COLUMNS})
