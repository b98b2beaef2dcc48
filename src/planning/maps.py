"""Which architecture wins where: best losses over budgets, contexts and limits, as tidy tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import ARCHITECTURES, ModelShape, count_params
from xlstm_scaling.planning.choose import Candidates, Choice, choose, interval, probability_less, resampled
from xlstm_scaling.planning.laws import TABLES, Laws, laws_of_tables
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.runtime import Runtime
from xlstm_scaling.planning.shapes import buildable_shapes, family_of_runs

#: sizes of a map: from the least fitted over this, to the largest fitted times that
SIZE_MARGINS = (10.0, 30.0)
STEP = 1.07
COLUMNS = (
    *("arch", "context_length", "flops", "max_ttft_s", "num_params", "num_tokens", "loss", "loss_lo", "loss_hi"),
    *("ttft_s", "beyond_flops", "beyond_context", "probability_best"),
)


def study_laws(tables: Mapping[str, pd.DataFrame], confidence: float) -> Laws:
    """The laws in a study's tables (``runs``, ``fits/…``). PlanningError where no surface converged."""
    named = {name: tables[f"fits/{name}"] for name in TABLES}
    settings = {"seed": 0, "confidence": confidence, "power_law": {"flops_range": [None, None], "min_points": 2}}
    return laws_of_tables(named, settings, tables["runs"])


def swept_budget(laws: Laws, isoflop: pd.DataFrame) -> float:
    """The largest budget whose minimum every architecture has, at the context of the surfaces [FLOPs]."""
    largest = []
    for law in (law for arch, law in laws.archs.items() if arch in ARCHITECTURES):
        mine = (isoflop["arch"] == law.arch) & (isoflop["context_length"] == law.base_context)
        budgets = isoflop.loc[mine & (isoflop["status"] == "ok"), "flops_mean"]
        largest.append(float(budgets.max()) if len(budgets) else law.ranges["num_flops"][1])
    return min(largest)


def ladders(laws: Laws) -> dict[str, list[ModelShape]]:
    """Shapes of every architecture that can be counted, each at least `STEP` times as large as the one before: maps are
    drawn from many searches, and need no finer steps."""
    found: dict[str, list[ModelShape]] = {}
    for arch in (arch for arch in laws.archs if arch in ARCHITECTURES):
        low, high = laws.archs[arch].ranges["num_params"]
        shapes = buildable_shapes(family_of_runs(arch, laws.runs), low / SIZE_MARGINS[0], high * SIZE_MARGINS[1])
        size, kept = 0.0, found.setdefault(arch, [])
        for shape in sorted(shapes, key=count_params):
            if count_params(shape) >= STEP * size:
                size = count_params(shape)
                kept.append(shape)
    return found


def best_losses(
    laws: Laws,
    shapes: Mapping[str, Sequence[ModelShape]],
    contexts: Sequence[int],
    budgets: Sequence[float],
    limits: Sequence[float | None] = (None,),
    runtime: Runtime | None = None,
    batch_size: int = 1,
) -> pd.DataFrame:
    """The best of the shapes of every architecture for every context, budget and limit of the time to first token.

    Returns:
        `COLUMNS`, a row each; loss NaN where no model keeps the limit. ``max_ttft_s`` is NaN without a limit, prompts
        fill the context. ``beyond_flops``, ``beyond_context``: over the largest that the law has seen; above 1 it is
        extrapolated. ``probability_best``: share of paired resamples in which this architecture has the least loss; an
        architecture without a model loses.
    """
    rows: list[dict[str, Any]] = []
    for context in contexts:
        asked = Question(int(context), flops=1.0, batch_size=batch_size)
        pools = {arch: Candidates.of(mine, int(context), asked.load, runtime) for arch, mine in shapes.items()}
        for flops, limit in product(budgets, limits):
            question = replace(asked, flops=float(flops), max_ttft_s=limit)
            rows += _rows(question, laws, pools)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(question: Question, laws: Laws, pools: dict[str, Candidates]) -> Iterator[dict[str, Any]]:
    choices = {arch: choose(question, laws.archs[arch], pool) for arch, pool in pools.items()}
    drawn = {arch: _losses(question, laws, arch, choice) for arch, choice in choices.items() if choice.best is not None}
    for arch, choice in choices.items():
        seen = laws.archs[arch].ranges
        row: dict[str, Any] = {"arch": arch, "context_length": question.context_length, "flops": question.flops}
        row["max_ttft_s"] = np.nan if question.max_ttft_s is None else question.max_ttft_s
        row["beyond_flops"] = question.flops / seen["num_flops"][1] if "num_flops" in seen else np.nan
        row["beyond_context"] = question.context_length / seen["context_length"][1]
        row["probability_best"] = 0.0
        if choice.best is not None:
            spent, at = choice.allocation, choice.best
            low, high = interval(drawn[arch], laws.confidence)
            row |= {"loss": float(spent.loss[0, at]), "loss_lo": low, "loss_hi": high}
            row |= {"num_params": choice.candidates.num_params[at], "num_tokens": float(spent.num_tokens[0, at])}
            row["ttft_s"] = float(choice.candidates.quantities["ttft_s"][at])
            row["probability_best"] = _probability(arch, drawn)
        yield row


def _losses(question: Question, laws: Laws, arch: str, choice: Choice) -> np.ndarray:
    losses = resampled(question, laws.archs[arch], choice.candidates, choice.best).loss[:, 0]
    return np.where(np.isfinite(losses), losses, np.nan)


def _probability(arch: str, drawn: dict[str, np.ndarray]) -> float:
    others = [losses for name, losses in drawn.items() if name != arch]
    return probability_less(drawn[arch], others)[0] if others else 1.0


def advantages(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Loss of ``second`` minus loss of ``first`` in every cell [nat/token]; inf or -inf where one has no model at all,
    NaN where neither has; and ``probability_first``."""
    keys = ["context_length", "flops", "max_ttft_s"]
    losses = table.pivot_table(index=keys, columns="arch", values="loss", dropna=False, aggfunc="first")
    chances = table.pivot_table(index=keys, columns="arch", values="probability_best", dropna=False, aggfunc="first")
    a, b = (losses.get(arch, pd.Series(np.nan, index=losses.index)) for arch in (first, second))
    gap = (b - a).where(a.notna() & b.notna(), np.nan)
    gap = gap.mask(a.notna() & b.isna(), np.inf).mask(a.isna() & b.notna(), -np.inf)
    return pd.DataFrame({"advantage": gap, "probability_first": chances.get(first)}).reset_index()


def round_contexts(low: float, high: float) -> list[int]:
    """Powers of two that cover a range of contexts [tokens]."""
    ends = int(np.floor(np.log2(low))), int(np.ceil(np.log2(high)))
    return [2**power for power in range(ends[0], ends[1] + 1)]


def limits_of(times: Iterable[float], points: int) -> list[float]:
    """Limits from the least time to the largest, evenly in their logarithms [s]."""
    values = np.array([time for time in times if np.isfinite(time) and time > 0])
    return [float(value) for value in np.geomspace(values.min(), values.max(), points)]
