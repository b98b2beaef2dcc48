"""The findings of a study: sentences with intervals, each computed from a table and naming it.

Tables in (docs/tables.md), one table out: topic, statement, value, lo, hi, source.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import label, ordered
from xlstm_scaling.fitting.runtime_versions import doubling_growth, is_steady
from xlstm_scaling.report.choice import choice_findings
from xlstm_scaling.report.comparison import VARIABLES
from xlstm_scaling.study.files import write_table, write_text_atomic

QUANTITIES = {"ttft": "time to first token", "step_time": "step time"}
QUANTITIES["ttft_raw"] = f"{QUANTITIES['ttft']}, in the second version of its times,"
#: smallest training budget of the paper's IsoFLOP sets [FLOPs] (arXiv 2510.02228)
PAPER_SMALLEST_BUDGET = 6e18

#: fewer runs a ratio than this, and the bootstrap of a slope says too little for a verdict
MIN_RUNS_FOR_SLOPES = 5

#: a difference of loss by position below this is none [nat/token]
SMALLEST_EXCESS = 0.01

NO_INFERENCE = "There are no inference measurements: time to first token and step time are left out."

Finding = tuple[str, str, float, float, float, str]


def _interval(value: float, lo: float, hi: float, form: str = ".2f") -> str:
    if not (math.isfinite(lo) and math.isfinite(hi)):
        return f"{value:{form}} (no interval)"
    return f"{value:{form}} ({lo:{form}} to {hi:{form}})"


def _scope(runs: pd.DataFrame) -> Iterator[Finding]:
    ok = runs[runs.status == "ok"]
    contexts = ", ".join(f"{c:,}" for c in sorted(runs.context_length.unique()))
    most = pd.to_numeric(runs.epochs, errors="coerce").max()
    epochs = f"; at most {most:.2g} epochs over the text" if math.isfinite(most) else ""
    yield (
        "scope",
        f"{len(runs)} training runs: N from {ok.num_params.min():,.0f} to {ok.num_params.max():,.0f} parameters, "
        f"D from {ok.num_tokens.min():.2g} to {ok.num_tokens.max():.2g} tokens, H from {ok.num_flops.min():.2g} to "
        f"{ok.num_flops.max():.2g} FLOPs, contexts {contexts}{epochs}.",
        len(runs), math.nan, math.nan, "runs",
    )  # fmt: skip
    lost = runs[runs.status != "ok"]
    text = "No run diverged or failed."
    if len(lost):
        text = f"{len(lost)} runs diverged or failed and are left out of every fit: {', '.join(lost.run_id.head(5))}."
    yield "scope", text, len(lost), math.nan, math.nan, "runs"
    orders = math.log10(PAPER_SMALLEST_BUDGET / ok.num_flops.max())
    if orders > 0.5:
        yield (
            "scope",
            f"The largest run here costs {orders:.1f} orders of magnitude less than the smallest budget of the "
            "paper: exponents need not carry over; one seed and one learning rate a size; the intervals hold the noise "
            "of runs around a fit, not that of seeds or of tuning.",
            orders, math.nan, math.nan, "runs",
        )  # fmt: skip


def _isoflop(isoflop: pd.DataFrame) -> Iterator[Finding]:
    if isoflop.empty:
        return
    share = float((isoflop.status == "ok").mean())
    ok = int((isoflop.status == "ok").sum())
    text = f"{ok} of {len(isoflop)} IsoFLOP parabolas have their minimum inside the sizes trained."
    yield "isoflop", text, share, math.nan, math.nan, "fits/isoflop"


def _where(row: Any) -> str:
    """The context or the budget that a power law holds at."""
    if math.isfinite(row.context_length):
        return f" at context {row.context_length:,.0f}"
    budget = pd.to_numeric(getattr(row, "isoflop_tag", math.nan), errors="coerce")
    return f" at {budget:.3g} FLOPs" if math.isfinite(budget) else ""


def _power_laws(laws: pd.DataFrame) -> Iterator[Finding]:
    usable = laws[(laws.status == "ok") & laws.exponent.notna()]
    for predictor, symbol in (("flops", "H"), ("context_length", "context length")):
        for variable in ("num_params", "num_tokens", "loss"):
            rows = usable[(usable.predictor == predictor) & (usable.variable == variable)]
            form = ".3f" if variable == "loss" else ".2f"
            for row in rows[~rows.arch.str.contains(" - ")].itertuples():
                text = (
                    f"{label(row.arch)}: {VARIABLES[variable]} goes as {symbol} to the power "
                    f"{_interval(row.exponent, row.exponent_lo, row.exponent_hi, form)}{_where(row)}, from "
                    f"{row.num_points} minima."
                )
                yield f"{predictor} law", text, row.exponent, row.exponent_lo, row.exponent_hi, "fits/power_laws"
            for row in rows[rows.arch.str.contains(" - ")].itertuples():
                known = math.isfinite(row.exponent_lo) and math.isfinite(row.exponent_hi)
                told = known and (row.exponent_lo > 0 or row.exponent_hi < 0)
                verdict = "the architectures differ" if told else "this study does not tell them apart"
                first, second = (label(name) for name in row.arch.split(" - "))
                text = (
                    f"{first} minus {second}, exponent of {VARIABLES[variable]} in {symbol}{_where(row)}: "
                    f"{_interval(row.exponent, row.exponent_lo, row.exponent_hi, form)}; {verdict}."
                )
                yield f"{predictor} law", text, row.exponent, row.exponent_lo, row.exponent_hi, "fits/power_laws"


def equal_loss_rows(ratio: pd.DataFrame) -> Iterator[pd.Series]:
    """Of every pair and context the row in the middle of the losses that have an interval."""
    known = ratio[ratio.flop_ratio_lo.notna() & ratio.flop_ratio_hi.notna()].sort_values("val_loss")
    place = {arch: index for index, arch in enumerate(ordered([*known.arch, *known.other]))}
    groups = known.groupby(["arch", "other", "context_length"])
    for _, rows in sorted(groups, key=lambda group: (place[group[0][0]], place[group[0][1]], group[0][2])):
        yield rows.iloc[len(rows) // 2]


def _equal_loss(ratio: pd.DataFrame) -> Iterator[Finding]:
    for row in equal_loss_rows(ratio):
        yield _equal_loss_at(row)


def _equal_loss_at(row: pd.Series) -> Finding:
    first, other = label(row.arch), label(row.other)
    better = "no difference is shown"
    if row.flop_ratio_lo > 1:
        better = f"{first} buys the same loss for fewer FLOPs"
    elif row.flop_ratio_hi < 1:
        better = f"{other} buys the same loss for fewer FLOPs"
    text = (
        f"At context {row.context_length:,} and a loss of {row.val_loss:.2f} nat/token {other} needs "
        f"{_interval(row.flop_ratio, row.flop_ratio_lo, row.flop_ratio_hi)} times the FLOPs of {first}: {better}."
    )
    return "equal loss", text, row.flop_ratio, row.flop_ratio_lo, row.flop_ratio_hi, "fits/pareto_ratio"


def _overtraining(slopes: pd.DataFrame) -> Iterator[Finding]:
    for arch, rows in slopes[slopes.status == "ok"].groupby("arch", sort=False):
        low, high = rows.slope.min(), rows.slope.max()
        overlap = rows.slope_lo.max() <= rows.slope_hi.min()
        verdict = "all intervals share a value, the lines may be parallel" if overlap else "the lines are not parallel"
        if rows.num_runs.min() < MIN_RUNS_FOR_SLOPES:
            verdict = f"{rows.num_runs.min()} runs a ratio are too few to say whether the lines are parallel"
        text = (
            f"{label(arch)}: over-training slopes of ln loss in ln H lie between {low:.3f} and {high:.3f} over "
            f"{len(rows)} token/param ratios; {verdict}."
        )
        yield "over-training", text, float(rows.slope.mean()), low, high, "fits/overtraining"


def _surface(surface: pd.DataFrame) -> Iterator[Finding]:
    main = surface[surface.status == "converged"]
    for arch, rows in main.groupby("arch", sort=False):
        low, high = rows.exponent_params.min(), rows.exponent_params.max()
        text = (
            f"{label(arch)}: the exponent of N* by the loss surface goes from {low:.2f} to {high:.2f} with the form, "
            f"the subset and the Huber threshold ({len(rows)} of {(surface.arch == arch).sum()} fits converged)."
        )
        yield "model form", text, float(rows.exponent_params.median()), low, high, "fits/surface"


def step_time_growth(measurements: pd.DataFrame) -> Iterator[tuple[pd.Series, pd.Series, float]]:
    """Of each architecture's largest model at the smallest batch: the rows of the shortest and the longest prompt, and
    the step time after this over that after the other."""
    ok = measurements[(measurements.status == "ok") & (measurements.batch_size == measurements.batch_size.min())]
    for _, rows in ok.groupby("arch", sort=False):
        largest = rows[rows.num_params == rows.num_params.max()].sort_values("prefill_length")
        if len(largest) > 1:
            first, last = largest.iloc[0], largest.iloc[-1]
            yield first, last, float(last.step_time_s / first.step_time_s)


def _inference(measurements: pd.DataFrame, models: pd.DataFrame) -> Iterator[Finding]:
    for first, last, growth in step_time_growth(measurements):
        text = (
            f"{label(first.arch)}, {first.num_params:.2g} parameters: the step time after {last.prefill_length:,} "
            f"tokens is {growth:.2f} times that after {first.prefill_length:,} ({1e3 * first.step_time_s:.2f} ms)."
        )
        yield "inference", text, growth, math.nan, math.nan, "inference/measurements"
    for row in models.itertuples():
        if np.isfinite(row.mape_held_out):
            quantity = QUANTITIES[row.quantity]
            error = f"{row.mape_held_out:.0%}"
            text = f"{label(row.arch)}: the runtime model misses the {quantity} of a size it has not seen by {error}."
            yield "runtime model", text, row.mape_held_out, math.nan, math.nan, "inference/runtime_model"
    yield from _versions(measurements, models)


def _versions(measurements: pd.DataFrame, models: pd.DataFrame) -> Iterator[Finding]:
    """Which of two versions of the times to first token physics supports."""
    for row in models[models.quantity == "ttft_raw"].itertuples():
        mine = measurements[(measurements.arch == row.arch) & measurements.ttft_raw_s.notna()]
        growth = {name: doubling_growth(mine, f"{name}_s") for name in ("ttft", "ttft_raw")}
        texts = {name: ", ".join(f"{value:.2f}" for value in values) for name, values in growth.items()}
        steady = {name: is_steady(values) for name, values in growth.items()}
        verdict = {
            (False, True): "physics supports the second version",
            (True, False): "physics supports the first version",
        }.get((steady["ttft"], steady["ttft_raw"]), "this does not tell the versions apart")
        text = (
            f"{label(row.arch)}: of two versions of the times to first token, the first grows {texts['ttft']} times "
            f"when the prompt doubles from {growth['ttft'].index.min():,.0f}, … tokens, the second {texts['ttft_raw']} "
            f"times. FLOPs that go as a T + b T² make this number rise steadily towards 4: {verdict}."
        )
        yield "runtime model", text, float(growth["ttft_raw"].iloc[-1]), math.nan, math.nan, "inference/measurements"


def _length(table: pd.DataFrame) -> Iterator[Finding]:
    """How far back a model draws on, and what it loses or gains beyond its training context."""
    if table.empty:
        text = "No held-out document is longer than a training context: the loss beyond it is not evaluated."
        yield "length", text, math.nan, math.nan, math.nan, "evaluation/length"
        return
    known = table[(table.status == "ok") & table.excess.notna()]  # by context, architecture, run, position
    for (context, arch, _), rows in known.groupby(["context_length", "arch", "run_id"], sort=False):
        within, beyond = rows[rows.position_max <= context], rows[rows.position_min > context]
        if beyond.empty:
            continue
        last = beyond.iloc[-1]
        if not (math.isfinite(last.excess_lo) and math.isfinite(last.excess_hi)):
            verdict = "there is no interval to tell by"
        elif last.excess_lo > 0 and last.excess >= SMALLEST_EXCESS:
            verdict = "it loses by reading on"
        elif last.excess_hi < 0 and last.excess <= -SMALLEST_EXCESS:
            verdict = "it gains by reading on"
        else:
            verdict = "it neither loses nor gains by reading on"
        excess = _interval(*(round(x, 3) + 0.0 for x in (last.excess, last.excess_lo, last.excess_hi)), "+.3f")
        text = (
            f"{label(arch)} of {last.num_params:,} parameters, trained at context {context:,}: after "
            f"{last.position_min / context:.2g} to {last.position_max / context:.2g} times as many tokens its loss, "
            f"minus that of the same tokens after half a context to a whole one, is {excess} nat/token; {verdict}."
        )
        needed = within[within.excess >= SMALLEST_EXCESS]
        if len(within):
            reach = int(needed.position_max.max()) if len(needed) else int(within.position_min.min()) - 1
            text += f" Within the context it draws on about {reach:,} tokens (more of them lower the loss by less than "
            text += f"{SMALLEST_EXCESS:g})."
        yield "length", text, last.excess, last.excess_lo, last.excess_hi, "evaluation/length"


def _published(provenance: Mapping[str, Any]) -> Iterator[Finding]:
    """What published runs were read from, and what was not there."""
    read = {kind: [s["name"] for s in provenance["sources"] if s["kind"] == kind] for kind in ("log", "table")}
    files = f"{len(read['log'])} run logs" + (f" and {', '.join(read['table'])}" if read["table"] else "")
    text = (
        f"The runs are published ones, read from {files}: {provenance['num_runs']} runs, of which "
        f"{provenance['num_selected']} pass their authors' selection rules and {provenance['num_written']} are used."
    )
    yield "scope", text, provenance["num_written"], math.nan, math.nan, "runs"
    if missing := provenance["missing"]:
        text = f"Not at hand, so their runs are absent: {', '.join(missing)}."
        yield "scope", text, len(missing), math.nan, math.nan, "runs"
    if conflicts := provenance["conflicts"]:
        text = f"The sources disagree on the loss of {len(conflicts)} runs; the logs' values are used."
        yield "scope", text, len(conflicts), math.nan, math.nan, "runs"


def _forecasts(forecasts: pd.DataFrame) -> Iterator[Finding]:
    laws = forecasts[(forecasts.law == "power_law") & forecasts.coverage.notna()]
    for quantity, group in laws.groupby("quantity", sort=False):
        covered, largest = int(group.coverage.sum()), group.loc[group.flops_mean.idxmax()]
        what = VARIABLES[quantity].capitalize()
        yield (
            "forecasts",
            f"{what} of a budget lies in the interval that a power law through the smaller ones gives "
            f"in {covered} of {len(group)} cases; at {largest.flops_mean:.1e} FLOPs ({label(largest.arch)}, context "
            f"{largest.context_length:,}) it is missed by {100 * largest.error:+.1f}%.",
            covered / len(group), math.nan, math.nan, "fits/forecasts",
        )  # fmt: skip
    for row in forecasts[forecasts.law.str.startswith("surface") & forecasts.coverage.notna()].itertuples():
        form = "gamma = 1" if row.law == "surface_gamma_fixed" else "gamma free"
        yield (
            "forecasts",
            f"{label(row.arch)}: a loss surface ({form}) fitted to runs with less compute misses the losses at "
            f"{row.flops_mean:.1e} FLOPs by {100 * row.error:.1f}% in the mean; {100 * row.coverage:.0f}% of "
            f"{row.num_held_out} runs lie in its intervals.",
            row.error, math.nan, math.nan, "fits/forecasts",
        )  # fmt: skip


def findings(
    tables: Mapping[str, pd.DataFrame], inference: bool = True, provenance: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The findings of a study from its tables (``runs``, ``fits/…``, ``inference/…``), in the order of the report.

    ``evaluation/length`` is used where it is there. ``inference``: whether there are tables of inference;
    ``provenance``: of published runs, as ``ingest`` writes it.
    """
    timed: Iterable[Finding] = (
        _inference(tables["inference/measurements"], tables["inference/runtime_model"])
        if inference
        else [("inference", NO_INFERENCE, math.nan, math.nan, math.nan, "runs")]
    )
    found: list[Finding] = [
        *_equal_loss(tables["fits/pareto_ratio"]),
        *_power_laws(tables["fits/power_laws"]),
        *_surface(tables["fits/surface"]),
        *(choice_findings(tables) if "fits/surface_resamples" in tables else ()),
        *_overtraining(tables["fits/overtraining"]),
        *_forecasts(tables["fits/forecasts"]),
        *(_length(tables["evaluation/length"]) if "evaluation/length" in tables else ()),
        *timed,
        *_isoflop(tables["fits/isoflop"]),
        *_scope(tables["runs"]),
        *(_published(provenance) if provenance is not None else ()),
    ]
    return pd.DataFrame(found, columns=["topic", "statement", "value", "lo", "hi", "source"])


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.05rem; margin: 1.4rem 0 .3rem }}
li {{ margin: .35rem 0 }} small {{ opacity: .65 }}
</style></head><body><h1>{title}</h1>
<p>Every sentence is computed from a table of this study; numbers in brackets are {level:.0%} bootstrap intervals.</p>
{body}
</body></html>
"""


def write_findings(table: pd.DataFrame, stem: Path, title: str, confidence: float) -> None:
    """``stem``.csv and .parquet (the table), ``stem``.md and ``stem``.html (for people)."""
    write_table(table, stem)
    markdown, body = [f"# {title}", ""], []
    for topic, rows in table.groupby("topic", sort=False):
        markdown += [f"## {topic}", "", *(f"- {s}" for s in rows.statement), ""]
        items = "".join(
            f"<li>{html.escape(row.statement)} <small>{row.source}</small></li>" for row in rows.itertuples()
        )
        body.append(f"<h2>{html.escape(topic)}</h2><ul>{items}</ul>")
    write_text_atomic(stem.with_suffix(".md"), "\n".join(markdown))
    page = PAGE.format(title=html.escape(title), level=confidence, body="\n".join(body))
    write_text_atomic(stem.with_suffix(".html"), page)
