"""The finding of which architecture to take, by the loss surfaces and shapes that can be built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pandas as pd

from xlstm_scaling.accounting import label
from xlstm_scaling.planning import PlanningError
from xlstm_scaling.planning.maps import best_losses, ladders, study_laws, swept_budget

#: budgets of the sentence, over the largest that was swept
MULTIPLES = (1.0, 10.0, 100.0)


def choice_findings(tables: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, str, float, float, float, str]]:
    """One sentence: whose best model has the lower loss at the largest budget swept, and at larger ones."""
    try:
        laws = study_laws(tables, 0.95)
    except PlanningError:
        return
    shapes = ladders(laws)
    if len(shapes) < 2 or any("num_flops" not in laws.archs[arch].ranges for arch in shapes):
        return
    swept = swept_budget(laws, tables["fits/isoflop"])
    context = laws.archs[next(iter(shapes))].base_context
    table = best_losses(laws, shapes, [context], [swept * multiple for multiple in MULTIPLES]).dropna(subset="loss")
    parts, first = [], math.nan
    for flops, rows in table.groupby("flops"):
        ranked = rows.sort_values("loss")
        if len(ranked) < 2:
            return
        best, second = ranked.iloc[0], ranked.iloc[1]
        gap = float(second["loss"] - best["loss"])
        first = gap if math.isnan(first) else first
        name, other = (label(row["arch"]) for row in (best, second))
        parts.append(
            f"{name} over {other} by {gap:.3f} nat/token at {flops:.1e} FLOPs (the better one in "
            f"{best['probability_best']:.0%} of the resamples)"
        )
    text = f"Of the best models by the loss surfaces at context {context:,}: {'; '.join(parts)}."
    yield "choice", text, first, math.nan, math.nan, "fits/surface"
