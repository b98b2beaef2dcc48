"""Answers to claims about the IsoFLOP minima and the power laws through them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.fitting.power_law import difference

from .evidence import Evidence, answer, fitted_row, read_off_figures, rows_with
from .ledger import NAN, Answer, NotAnswerable

Array = NDArray[np.float64]


@answer
def isoflop_minimum(
    evidence: Evidence,
    arch: str,
    context: int,
    budget: float,
    of: str,
    duplicates: bool = True,
    along: str = "num_params",
) -> Answer:
    """Vertex of a parabola: N* (`num_params`), D* (`num_tokens`), or the least loss (`loss`, along N or D)."""
    variable, column = (along, "loss_opt") if of == "loss" else (of, "x_opt")
    keys = {"arch": arch, "context_length": context, "isoflop_tag": budget, "variable": variable}
    row = fitted_row(evidence.isoflop(duplicates)[0], "a parabola", **keys)
    runs = evidence.chosen(arch, context, "isoflop")
    runs = runs[runs["isoflop_tag"] == budget]
    once = NAN
    if duplicates and evidence.has_duplicates(runs):
        once = float(fitted_row(evidence.isoflop(False)[0], "a parabola", **keys)[column])
    note, independent = read_off_figures(runs)
    value, low, high = (float(row[column + end]) for end in ("", "_lo", "_hi"))
    return Answer(value, low, high, int(row["num_runs"]), note, once, independent=independent)


def _law(
    evidence: Evidence, what: str, points: int, duplicates: bool, flops: tuple[float, float], **keys: Any
) -> tuple:
    """(value, low, high, points) of a power law's exponent or coefficient."""
    row = fitted_row(evidence.power_laws(duplicates, *flops), "a power law", **keys)
    if int(row["num_points"]) != points:
        raise NotAnswerable(f"{points - int(row['num_points'])} of the {points} minima of this power law")
    name = {"exponent": "exponent", "coefficient": "log10_coefficient"}[what]
    values = [float(row[name + end]) for end in ("", "_lo", "_hi")]
    return *([10**value for value in values] if what == "coefficient" else values), int(row["num_points"])


def _law_runs(evidence: Evidence, arch: str, context: int | None, flops: tuple[float, float]) -> pd.DataFrame:
    runs = evidence.chosen(arch, context, "isoflop")
    return runs[runs["isoflop_tag"].between(*flops)]


@answer
def power_law(
    evidence: Evidence,
    arch: str,
    context: int,
    of: str,
    what: str,
    min_flops: float,
    max_flops: float,
    points: int,
    duplicates: bool = True,
) -> Answer:
    """Exponent or coefficient of N* or D* as a power of FLOPs, over the minima of the budgets in a range."""
    flops = (min_flops, max_flops)
    keys = {"arch": arch, "context_length": float(context), "variable": of, "predictor": "flops"}
    value, low, high, _ = _law(evidence, what, points, duplicates, flops, **keys)
    runs, once = _law_runs(evidence, arch, context, flops), NAN
    if duplicates and evidence.has_duplicates(runs):
        once = _law(evidence, what, points, False, flops, **keys)[0]
    note, independent = read_off_figures(runs)
    return Answer(value, low, high, len(runs), note, once, independent=independent)


@answer
def context_power_law(
    evidence: Evidence, arch: str, budget: float, of: str, what: str, duplicates: bool = True
) -> Answer:
    """Exponent or coefficient of N* or D* as a power of the context (2,048, 8,192, 16,384) at a budget."""
    flops = (0.9 * budget, 1.1 * budget)
    keys = {"arch": arch, "isoflop_tag": budget, "variable": of, "predictor": "context_length"}
    value, low, high, _ = _law(evidence, what, 3, duplicates, flops, **keys)
    runs, once = _law_runs(evidence, arch, None, flops), NAN
    if duplicates and evidence.has_duplicates(runs):
        once = _law(evidence, what, 3, False, flops, **keys)[0]
    note, independent = read_off_figures(runs)
    if what == "exponent":
        lengths = runs["context_length"]
        change = 100 * ((lengths.max() / lengths.min()) ** value - 1)
        note = f"{change:+.1f} % from context {lengths.min()} to {lengths.max()}. {note}".strip()
    return Answer(value, low, high, len(runs), note, once, independent=independent)


@answer
def context_exponent_difference(evidence: Evidence, budget: float, of: str) -> Answer:
    """Exponent of xLSTM's N* or D* in the context minus the Transformer's, at a budget; runs counted once."""
    pair = difference("xlstm", "transformer")
    keys = {"arch": pair, "isoflop_tag": budget, "variable": of, "predictor": "context_length"}
    value, low, high, _ = _law(evidence, "exponent", 3, False, (0.9 * budget, 1.1 * budget), **keys)
    runs = evidence.runs[evidence.runs["isoflop_tag"] == budget]
    note, independent = read_off_figures(runs)
    return Answer(value, low, high, len(runs), note, independent=independent)


@answer
def model_size_ratio(evidence: Evidence, context: int, budget: float) -> Answer:
    """xLSTM's N* over the Transformer's at one context and budget; runs counted once."""
    table, resamples = evidence.isoflop(False)
    optima, samples, number = [], [], 0
    for arch in ("xlstm", "transformer"):
        keys = {"arch": arch, "context_length": context, "isoflop_tag": budget, "variable": "num_params"}
        row = fitted_row(table, "a parabola", **keys)
        optima.append(float(row["x_opt"]))
        samples.append(rows_with(resamples, keys).sort_values("resample")["x_opt"].to_numpy())
        number += int(row["num_runs"])
    runs = evidence.chosen(None, context, "isoflop")
    note, independent = read_off_figures(runs[runs["isoflop_tag"] == budget])
    interval = evidence.interval(samples[0] / samples[1])
    return Answer(optima[0] / optima[1], *interval, number, note, independent=independent)


def _law_lines(
    evidence: Evidence, arch: str, context: int, of: str, flops: tuple[float, float], points: int, duplicates: bool
) -> Array:
    """(log10 coefficient, exponent) of the fit, then of each resample, shape (1 + R, 2)."""
    table, _ = evidence.isoflop(duplicates)
    cells = rows_with(table, {"arch": arch, "context_length": context, "variable": of, "status": "ok"})
    number = int(cells["flops_mean"].between(*flops).sum())
    if number != points:
        raise NotAnswerable(f"{points - number} of the {points} minima of {arch} at context {context}")
    return evidence.minima_lines(duplicates, *flops)[arch, context][of]


@answer
def compute_optimal(
    evidence: Evidence,
    arch: str,
    context: int,
    params: float,
    of: str,
    max_flops: float,
    points: int,
    duplicates: bool = True,
) -> Answer:
    """FLOPs (`flops`) at which a model of `params` is compute-optimal, its tokens (`tokens`) or tokens/parameter
    (`tokens_per_param`) there: N*(H) solved for H, then D*(H), over the minima from 5e18 to `max_flops`."""

    def table(counted: bool) -> Array:
        scope = ((5e18, max_flops), points, counted)
        size, tokens = (_law_lines(evidence, arch, context, name, *scope) for name in ("num_params", "num_tokens"))
        log_flops = (math.log10(params) - size[:, 0]) / size[:, 1]
        if of == "flops":
            return 10**log_flops
        found = 10 ** (tokens[:, 0] + tokens[:, 1] * log_flops)
        return found / params if of == "tokens_per_param" else found

    values = table(duplicates)
    runs = _law_runs(evidence, arch, context, (5e18, max_flops))
    once = float(table(False)[0]) if duplicates and evidence.has_duplicates(runs) else NAN
    note, independent = read_off_figures(runs)
    return Answer(float(values[0]), *evidence.interval(values[1:]), len(runs), note, once, independent=independent)
