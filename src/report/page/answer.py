"""The answer of a study, law by law: a verdict in words, and the numbers and intervals that it rests on.

Everything is computed from the tables of docs/tables.md; the sentences of ``findings`` stand for what has no card here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from xlstm_scaling.accounting import label, ordered
from xlstm_scaling.figures.style import flops
from xlstm_scaling.report.comparison import VARIABLES, most_points
from xlstm_scaling.report.findings import MIN_RUNS_FOR_SLOPES, equal_loss_rows, step_time_growth

AHEAD, DIFFER, EVEN, TOLD = "ahead", "differ", "even", "told"


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (NaN: none); ``source`` is the table that it stands in."""

    label: str
    value: float
    lo: float = math.nan
    hi: float = math.nan
    source: str = ""
    form: str = ".2f"
    arch: str = ""

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known."""
        return math.isfinite(self.lo) and math.isfinite(self.hi)

    @property
    def text(self) -> str:
        """The number for people."""
        return f"{self.value:{self.form}}".replace("-", "−")

    @property
    def interval(self) -> str:
        """The interval for people; "" where there is none."""
        return f"{self.lo:{self.form}} to {self.hi:{self.form}}".replace("-", "−") if self.has_interval else ""


@dataclass(frozen=True)
class Card:
    """One law or limit: the question, the verdict, its tone (`AHEAD`, `DIFFER`, `EVEN`, `TOLD`), the numbers.

    neutral: the value of no difference; source: the table of the verdict; figure: what shows it.
    """

    key: str
    question: str
    verdict: str
    tone: str
    estimates: list[Estimate]
    source: str
    figure: str
    neutral: float | None = None
    note: str = ""
    axis: tuple[float, float] = field(default=(0.0, 1.0))


def name_of(arch: str) -> str:
    """For people; of differences both names."""
    return " minus ".join(map(label, str(arch).split(" - ")))


def cards(tables: Mapping[str, pd.DataFrame], confidence: float) -> list[Card]:
    """The cards that the tables at hand allow, in the order of the page."""
    found: list[Card] = []
    if "fits/pareto_ratio" in tables:
        found += _equal_loss(tables["fits/pareto_ratio"])
    if "fits/power_laws" in tables:
        laws = tables["fits/power_laws"]
        found += _law(laws, "num_params", "flops", "size", "How large should the best model be as the budget grows?")
        found += _law(laws, "num_tokens", "flops", "tokens", "How many tokens should it see as the budget grows?")
        found += _law(laws, "loss", "flops", "loss", "How fast does the least loss fall with the budget?")
        found += _law(laws, "num_params", "context_length", "context", "Does the best size depend on the context?")
    if "fits/overtraining" in tables:
        found += _overtraining(tables["fits/overtraining"])
    if "inference/measurements" in tables:
        found += _generation(tables["inference/measurements"])
    return [_with_axis(card) for card in found]


def _with_axis(card: Card) -> Card:
    """The range that the strips of a card share."""
    ends = [x for e in card.estimates for x in (e.value, e.lo, e.hi) if math.isfinite(x)]
    if card.neutral is not None:
        ends.append(card.neutral)
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.5
    return Card(**{**card.__dict__, "axis": (low - margin, high + margin)})


def _equal_loss(ratio: pd.DataFrame) -> Iterator[Card]:
    """A card for every pair of architectures."""
    rows = list(equal_loss_rows(ratio))
    for pair in dict.fromkeys((row.arch, row.other) for row in rows):
        yield _equal_loss_of(*pair, [row for row in rows if (row.arch, row.other) == pair])


def _equal_loss_of(first: str, other: str, rows: list[pd.Series]) -> Card:
    estimates, wins = [], {first: [], other: [], "": []}
    for row in rows:
        context = int(row.context_length)
        text = f"context {context:,}, at {row.val_loss:.2f} nat/token"
        values = (row.flop_ratio, row.flop_ratio_lo, row.flop_ratio_hi)
        estimates.append(Estimate(text, *map(float, values), "fits/pareto_ratio"))
        wins[first if row.flop_ratio_lo > 1 else other if row.flop_ratio_hi < 1 else ""].append(context)
    told = [arch for arch in (first, other) if wins[arch]]
    where = "" if len(rows) == 1 else " at every context measured"
    if not told:
        verdict, tone = f"No difference is shown{where}", EVEN
    elif len(told) == 1 and not wins[""]:
        verdict, tone = f"{label(told[0])} buys the same loss for fewer FLOPs{where}", AHEAD
    else:
        said = [f"{label(arch)} needs fewer at {_contexts(wins[arch])}" for arch in told]
        said += [f"no difference at {_contexts(wins[''])}"] if wins[""] else []
        verdict, tone = "It depends on the context: " + "; ".join(said), DIFFER
    question = f"{label(first)} or {label(other)}: which reaches the same loss with fewer FLOPs?"
    note = f"FLOPs of {label(other)} over those of {label(first)} for equal loss; above 1 {label(first)} needs fewer."
    key = "equal-loss" if (first, other) == ("xlstm", "transformer") else f"equal-loss-{first}-{other}"
    return Card(key, question, verdict, tone, estimates, "fits/pareto_ratio", "loss_vs_flops", 1.0, note)


def _contexts(contexts: list[int]) -> str:
    return ", ".join(f"{context:,}" for context in contexts)


def _law(laws: pd.DataFrame, variable: str, predictor: str, key: str, question: str) -> Iterator[Card]:
    """Exponents where most minima stand behind them (context, or budget), and how the others vote."""
    rows = laws[(laws.status == "ok") & laws.exponent.notna() & (laws.predictor == predictor)]
    rows = rows[rows.variable == variable]
    if rows.empty:
        return
    place = "context_length" if predictor == "flops" else "isoflop_tag"
    rows = rows.assign(place=pd.to_numeric(rows[place], errors="coerce"))
    chosen = most_points(rows, "place")
    mine = rows[rows.place == chosen]
    form = ".3f" if variable == "loss" else ".2f"
    place_of = {arch: index for index, arch in enumerate(ordered(mine.arch))}
    mine = mine.sort_values("arch", key=lambda archs: archs.map(place_of), kind="stable")
    alone = mine[~mine.arch.str.contains(" - ")]
    estimates = [_exponent(row, form) for row in alone.itertuples()]
    differences = [_exponent(row, form) for row in mine[mine.arch.str.contains(" - ")].itertuples()]
    told = [e for e in differences if e.has_interval and (e.lo > 0 or e.hi < 0)]
    if not differences:
        verdict, tone = _span(estimates), TOLD
    elif told:
        verdict, tone = "; ".join(_faster(e, variable, predictor) for e in told), DIFFER
    else:
        verdict, tone = "This study does not tell the architectures apart", EVEN
    where = f"context {chosen:,.0f}" if predictor == "flops" else f"{flops(chosen)} FLOPs"
    symbol = "H" if predictor == "flops" else "the context"
    what = VARIABLES[variable]
    minima = ", ".join(f"{name_of(arch)} {count}" for arch, count in zip(alone.arch, alone.num_points))
    note = f"Exponent of {what} in {symbol}, at {where}; minima: {minima}."
    others = rows[(rows.place != chosen) & rows.arch.str.contains(" - ")]
    if len(others):
        apart = int(((others.exponent_lo > 0) | (others.exponent_hi < 0)).sum())
        note += f" Elsewhere the architectures differ in {apart} of {len(others)} cases."
    figure = "compute_optimal" if predictor == "flops" else "context"
    zero = 0.0 if differences else None
    yield Card(key, question, verdict, tone, estimates + differences, "fits/power_laws", figure, zero, note)


def _faster(difference: Estimate, variable: str, predictor: str) -> str:
    """Whose exponent is the larger in size: of losses, which fall, the more negative one."""
    first, second = difference.arch.split(" - ")
    falling = variable == "loss"
    if (difference.value > 0) == falling:
        first, second = second, first
    if predictor != "flops":
        return f"They depend on it differently: the exponent of {name_of(first)} is the larger one"
    verb = "falls" if falling else "grows"
    return f"{name_of(first)}'s {verb} faster than {name_of(second)}'s"


def _exponent(row: Any, form: str) -> Estimate:
    values = (float(row.exponent), float(row.exponent_lo), float(row.exponent_hi))
    return Estimate(name_of(row.arch), *values, "fits/power_laws", form, row.arch)


def _span(estimates: list[Estimate]) -> str:
    return "; ".join(f"{e.label}: {e.text}" for e in estimates)


def _overtraining(slopes: pd.DataFrame) -> Iterator[Card]:
    rows = slopes[slopes.status == "ok"]
    if rows.empty:
        return
    estimates = []
    for row in rows.itertuples():
        values = (float(row.slope), float(row.slope_lo), float(row.slope_hi))
        label = f"{name_of(row.arch)}, {row.ratio_tag:g} tokens per parameter"
        estimates.append(Estimate(label, *values, "fits/overtraining", ".3f", row.arch))
    shared = {arch: group.slope_lo.max() <= group.slope_hi.min() for arch, group in rows.groupby("arch", sort=False)}
    parallel = [name_of(arch) for arch, same in shared.items() if same]
    crossing = [name_of(arch) for arch, same in shared.items() if not same]
    said = [f"{' and '.join(parallel)}: all intervals share a value"] if parallel else []
    said += [f"{' and '.join(crossing)}: not all intervals share a value"] if crossing else []
    fewest = int(rows.num_runs.min())
    if fewest < MIN_RUNS_FOR_SLOPES:
        said = [f"{fewest} runs a ratio are too few to tell"]
    note = f"Slope of ln loss in ln H at a fixed ratio, at least {fewest} runs a slope. Parallel lines share one slope."
    question = "Does training beyond the optimum cost the same at every scale?"
    yield Card(
        "overtraining",
        question,
        "; ".join(said),
        EVEN if fewest < MIN_RUNS_FOR_SLOPES else TOLD,
        estimates,
        "fits/overtraining",
        "overtraining",
        None,
        note,
    )


def _generation(measurements: pd.DataFrame) -> Iterator[Card]:
    """How the time of a step grows with what was read before it, for the largest model of each architecture."""
    estimates, spans = [], set()
    for first, last, growth in step_time_growth(measurements):
        label = f"{name_of(first.arch)}, {first.num_params:.2g} parameters, {1e3 * first.step_time_s:.2f} ms at first"
        estimates.append(Estimate(label, growth, source="inference/measurements", arch=first.arch))
        spans.add((int(first.prefill_length), int(last.prefill_length)))
    if not estimates:
        return
    most, least = max(estimates, key=lambda e: e.value), min(estimates, key=lambda e: e.value)
    verdict = "; ".join(f"{name_of(e.arch)}: {e.text} times" for e in estimates)
    if len(estimates) > 1 and most.value > least.value:
        verdict = (
            f"{name_of(least.arch)}'s grows the least, {least.text} times; {name_of(most.arch)}'s {most.text} times"
        )
    span = " and ".join(f"{first:,} to {last:,} tokens" for first, last in sorted(spans))
    note = f"Step time after the longest prompt over that after the shortest ({span}); one device, no interval."
    question = "Does generating a token slow down with the prompt?"
    yield Card("generation", question, verdict, TOLD, estimates, "inference/measurements", "step_time", 1.0, note)
