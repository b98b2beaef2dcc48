"""Answers to claims about training runs: each computes its number from the table of runs, by the project's own fits.

An answer function takes the evidence and the claim's arguments and returns an `Answer`; where data are missing it
raises `NotAnswerable`. Losses are in nat/token, FLOPs in the convention of the table. Results that several claims share
(all parabolas, one loss surface) are computed once per `Evidence`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.accounting import ModelShape, training_flops
from xlstm_scaling.fitting.envelope import fit_envelope
from xlstm_scaling.fitting.isoflop import fit_isoflop
from xlstm_scaling.fitting.loss_surface import LossSurface
from xlstm_scaling.fitting.overtraining import fit_overtraining, weighted_slopes
from xlstm_scaling.fitting.pareto import convex_frontier, flops_at_loss, frontier_mask
from xlstm_scaling.fitting.power_law import difference, fit_lines, fit_power_laws
from xlstm_scaling.fitting.resampling import (
    bootstrap_counts,
    cell_generator,
    percentile_interval,
    refill,
    stratified_counts,
)
from xlstm_scaling.fitting.surface_fit import FORMS, SAMPLED, SurfaceFit, fit_surface_ladder
from xlstm_scaling.fitting.surface_tables import surface_samples
from xlstm_scaling.fitting.tables import FitError, usable_runs

from .claims import NAN, Answer, AnswerFunction, NotAnswerable

Array = NDArray[np.float64]
MULTIPLICITY = "notebook_multiplicity"
#: in the provenance of losses that were read off a figure under the condition that the printed parabola comes out
CONSTRAINED = "polyfit constraint"
#: architecture, context, set of the paper's tables of runs
PAPER_SETS = (
    *((arch, context, "isoflop") for arch in ("transformer", "xlstm") for context in (2048, 8192, 16384)),
    *((arch, 8192, "tokenparam") for arch in ("transformer", "xlstm")),
)
#: Huber thresholds of the loss surfaces, in units of ln loss
DELTAS = (1e-1, 1e-2, 1e-3, 1e-4)
FUNCTIONS: dict[str, AnswerFunction] = {}


def answer(function: AnswerFunction) -> AnswerFunction:
    """Enter an answer function under its name."""
    FUNCTIONS[function.__name__] = function
    return function


def shared(method: Callable) -> Callable:
    """Compute a function of `Evidence` and arguments once, also where it ends in `NotAnswerable`."""

    @wraps(method)
    def remembered(self: Evidence, *arguments: Any) -> Any:
        key = (method.__name__, *map(str, arguments))
        if key not in self._results:
            try:
                self._results[key] = (method(self, *arguments), None)
            except (NotAnswerable, FitError) as error:
                self._results[key] = (None, str(error))
        result, missing = self._results[key]
        if missing is not None:
            raise NotAnswerable(missing)
        return result

    return remembered


class Evidence:
    """The data that answers are computed from, and the results that several of them share.

    Args:
        runs: the table of runs (docs/tables.md, docs/published.md), the authors' selection only.
        config: the group `fitting`; `num_resamples`, `confidence` and `seed` hold for all intervals.
        curves: training curves of `ingest --curves`; None without.
        inference: measurements with the columns of docs/claims.md; None without.
        fits: tables of `fit` by name; `surface` rows of the same runs are taken over instead of fitted again.
    """

    def __init__(
        self,
        runs: pd.DataFrame,
        config: Mapping[str, Any],
        curves: pd.DataFrame | None = None,
        inference: pd.DataFrame | None = None,
        fits: Mapping[str, pd.DataFrame] | None = None,
    ) -> None:
        self.config: dict[str, Any] = copy.deepcopy(dict(config))
        self.runs, self.curves, self.inference, self.fits = usable_runs(runs), curves, inference, dict(fits or {})
        self._results: dict[tuple, Any] = {}

    def interval(self, samples: Array) -> tuple[float, float]:
        """The percentile interval of resampled values."""
        return percentile_interval(samples, float(self.config["confidence"]))

    def generator(self, *cell: Any) -> np.random.Generator:
        """The random stream of a cell."""
        return cell_generator(int(self.config["seed"]), *cell)

    @property
    def num_resamples(self) -> int:
        return int(self.config["num_resamples"])

    def chosen(
        self, arch: str | None = None, context: int | None = None, experiment_set: str | None = None
    ) -> pd.DataFrame:
        """The usable runs of an architecture, a context and a set.

        Raises:
            NotAnswerable: there are none.
        """
        runs, wanted = self.runs, {"arch": arch, "context_length": context, "experiment_set": experiment_set}
        for column, value in wanted.items():
            if value is not None:
                runs = runs[runs[column] == value]
        if runs.empty:
            names = ", ".join(f"{column} {value}" for column, value in wanted.items() if value is not None)
            raise NotAnswerable(f"runs with {names or 'a loss'}")
        return runs

    def multiplicity(self, runs: pd.DataFrame) -> Array:
        """How often the authors count each run.

        Raises:
            NotAnswerable: the table does not say.
        """
        if MULTIPLICITY not in runs.columns or runs[MULTIPLICITY].isna().any():
            raise NotAnswerable(f"the column {MULTIPLICITY} of the table of runs (runs.csv has it, logs do not)")
        return runs[MULTIPLICITY].to_numpy(dtype=np.float64)

    def has_duplicates(self, runs: pd.DataFrame) -> bool:
        return MULTIPLICITY in runs.columns and bool((runs[MULTIPLICITY].fillna(1) != 1).any())

    @shared
    def isoflop(self, duplicates: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
        """All parabolas and their resamples, with the duplicates counted as the authors count them, or once."""
        config = copy.deepcopy(self.config)
        config["isoflop"]["weight_column"] = MULTIPLICITY if duplicates else None
        if duplicates:
            self.multiplicity(self.runs)
        return fit_isoflop(self.runs, config)

    @shared
    def power_laws(self, duplicates: bool, min_flops: float, max_flops: float) -> pd.DataFrame:
        config = copy.deepcopy(self.config)
        config["power_law"]["flops_range"] = [min_flops, max_flops]
        config["power_law"]["min_points"] = 2
        return fit_power_laws(*self.isoflop(duplicates), config, self.runs)[0]

    @shared
    def overtraining(self) -> pd.DataFrame:
        return fit_overtraining(self.runs, self.config | {"overtraining": {"min_runs": 2}})

    def curve_points(self, loss: str) -> pd.DataFrame:
        """Points of the selected runs' training curves that have this loss.

        Raises:
            NotAnswerable: there are no curves.
        """
        if self.curves is None:
            raise NotAnswerable("training curves (give the logs to `ingest --curves`, and `--curves` here)")
        if loss not in self.curves.columns:
            raise NotAnswerable(f"the column {loss} of the training curves")
        curves = self.curves[self.curves["run_id"].isin(self.runs["run_id"])]
        numbers = curves[["num_params", "tokens", "flops", loss]].to_numpy(dtype=np.float64, na_value=np.nan)
        return curves[(np.isfinite(numbers) & (numbers > 0)).all(axis=1)]

    @shared
    def envelope(self, loss: str) -> pd.DataFrame:
        curves = self.curve_points(loss).rename(columns={"loss": "loss_"}).rename(columns={loss: "loss"})
        # every resample is an envelope of its own: 100 are enough for an interval of this check
        config = self.config | {"num_resamples": min(self.num_resamples, 100)}
        return fit_envelope(curves, config, self.runs)

    def surface_runs(self, arch: str, subset: str) -> pd.DataFrame:
        """Runs of a loss surface: context 8,192, a set or `all`."""
        return self.chosen(arch, 8192, None if subset == "all" else subset)

    @shared
    def surface_ladder(self, arch: str, subset: str, form: str) -> dict[float, SurfaceFit]:
        """The fit at each of `DELTAS`; they share most of the work."""
        data = self.surface_runs(arch, subset)
        values = (data[name].to_numpy(dtype=np.float64) for name in ("num_params", "num_tokens", "val_loss"))
        return dict(zip(DELTAS, fit_surface_ladder(*values, self.config["surface"], form=form, deltas=DELTAS)))

    def surface_fit(self, arch: str, subset: str, form: str, delta: float) -> SurfaceFit:
        """The fit at one threshold.

        Raises:
            NotAnswerable: it has no values, or its status is not `converged`.
        """
        if delta not in DELTAS:
            raise ValueError(f"the threshold must be one of {DELTAS}, not {delta}")
        fit = self.surface_ladder(arch, subset, form)[delta]
        if fit.surface is None or fit.status.value != "converged":
            raise NotAnswerable(f"a loss surface of {arch}, {subset}, {form}: {fit.status.value}, {fit.detail}")
        return fit

    @shared
    def surface_row(self, arch: str, subset: str, form: str, delta: float) -> dict[str, float]:
        """Parameters, exponents and objective of a loss surface: of the table of fits where it holds the same runs."""
        data = self.surface_runs(arch, subset)
        table, predictions = self.fits.get("surface"), self.fits.get("surface_predictions")
        if table is not None and predictions is not None:
            keys = {"arch": arch, "context_length": 8192, "subset": subset, "form": form}
            rows = _rows(table, keys)
            rows = rows[np.isclose(rows["huber_delta"], delta, rtol=1e-9) & (rows["status"] == "converged")]
            fitted = _rows(predictions, keys).set_index("run_id")["val_loss"]
            theirs = data.set_index("run_id")["val_loss"]
            if len(rows) and fitted.sort_index().equals(theirs.sort_index()):
                row = rows.iloc[0]
                return {name: float(row[name]) for name in (*SAMPLED, "objective")}
        fit = self.surface_fit(arch, subset, form, delta)
        return {name: float(getattr(fit.surface, name)) for name in SAMPLED} | {"objective": fit.objective}

    @shared
    def surface_intervals(self, arch: str, subset: str, form: str, delta: float) -> Array:
        """Resampled `SAMPLED` of a loss surface, shape (R, 8)."""
        fit, data = self.surface_fit(arch, subset, form, delta), self.surface_runs(arch, subset)
        # an iterative fit each: 200 resamples, or fewer where fewer are asked for
        config = self.config | {"num_resamples": min(self.num_resamples, 200)}
        return surface_samples(fit, data, config, arch, 8192, subset)[0]


def _rows(table: pd.DataFrame, keys: Mapping[str, Any]) -> pd.DataFrame:
    keep = np.ones(len(table), dtype=bool)
    for column, value in keys.items():
        keep &= (table[column] == value).to_numpy(dtype=bool)
    return table[keep]


def _cell(table: pd.DataFrame, what: str, good: str = "ok", **keys: Any) -> pd.Series:
    """The one row of a fit's table; NotAnswerable where it is absent or its status is not `good`."""
    rows = _rows(table, keys)
    names = ", ".join(f"{column} {value}" for column, value in keys.items())
    if rows.empty:
        raise NotAnswerable(f"runs for {what} of {names}")
    row = rows.iloc[0]
    if row["status"] != good:
        raise NotAnswerable(f"{what} of {names}: {row['status']}, {row['detail']}")
    return row


def _read_off(runs: pd.DataFrame) -> tuple[str, bool]:
    """A note where losses were read off figures, and whether the printed parabolas did not help in that."""
    if "val_loss_abs_err" not in runs.columns:
        return "", True
    error = pd.to_numeric(runs["val_loss_abs_err"], errors="coerce").to_numpy(dtype=np.float64, na_value=0.0)
    inexact = error > 1e-6
    if not inexact.any():
        return "", True
    note, helped = f"{inexact.sum()} losses were read off figures, to {error.max():.1g}", 0
    if "provenance" in runs.columns:
        helped = int(runs.loc[inexact, "provenance"].astype(str).str.contains(CONSTRAINED, regex=False).sum())
    if helped:
        note += f"; {helped} of them so that they agree with the printed parabola: no independent check"
    return f"{note}.", not helped


# the data set


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


# IsoFLOP


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
    row = _cell(evidence.isoflop(duplicates)[0], "a parabola", **keys)
    runs = evidence.chosen(arch, context, "isoflop")
    runs = runs[runs["isoflop_tag"] == budget]
    once = NAN
    if duplicates and evidence.has_duplicates(runs):
        once = float(_cell(evidence.isoflop(False)[0], "a parabola", **keys)[column])
    note, independent = _read_off(runs)
    value, low, high = (float(row[column + end]) for end in ("", "_lo", "_hi"))
    return Answer(value, low, high, int(row["num_runs"]), note, once, independent=independent)


def _law(
    evidence: Evidence, what: str, points: int, duplicates: bool, flops: tuple[float, float], **keys: Any
) -> tuple:
    """(value, low, high, points) of a power law's exponent or coefficient."""
    row = _cell(evidence.power_laws(duplicates, *flops), "a power law", **keys)
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
    note, independent = _read_off(runs)
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
    note, independent = _read_off(runs)
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
    note, independent = _read_off(runs)
    return Answer(value, low, high, len(runs), note, independent=independent)


@answer
def model_size_ratio(evidence: Evidence, context: int, budget: float) -> Answer:
    """xLSTM's N* over the Transformer's at one context and budget; runs counted once."""
    table, resamples = evidence.isoflop(False)
    optima, samples, number = [], [], 0
    for arch in ("xlstm", "transformer"):
        keys = {"arch": arch, "context_length": context, "isoflop_tag": budget, "variable": "num_params"}
        row = _cell(table, "a parabola", **keys)
        optima.append(float(row["x_opt"]))
        samples.append(_rows(resamples, keys).sort_values("resample")["x_opt"].to_numpy())
        number += int(row["num_runs"])
    runs = evidence.chosen(None, context, "isoflop")
    note, independent = _read_off(runs[runs["isoflop_tag"] == budget])
    interval = evidence.interval(samples[0] / samples[1])
    return Answer(optima[0] / optima[1], *interval, number, note, independent=independent)


@shared
def _law_lines(
    evidence: Evidence, arch: str, context: int, of: str, flops: tuple[float, float], points: int, duplicates: bool
) -> Array:
    """(log10 coefficient, exponent) of the fit, then of each resample, shape (1 + R, 2)."""
    table, resamples = evidence.isoflop(duplicates)
    cells = _rows(table, {"arch": arch, "context_length": context, "variable": of, "status": "ok"})
    cells = cells[cells["flops_mean"].between(*flops)].sort_values("flops_mean")
    if len(cells) != points:
        raise NotAnswerable(f"{points - len(cells)} of the {points} minima of {arch} at context {context}")
    sampled = []
    for tag in cells["isoflop_tag"]:
        keys = {"arch": arch, "context_length": context, "isoflop_tag": tag, "variable": of}
        draws = _rows(resamples, keys).sort_values("resample")[["x_opt", "loss_opt"]].to_numpy()
        sampled.append(np.log10(refill(draws, evidence.generator("refill", arch, context, tag))[:, 0]))
    y = np.vstack([np.log10(cells["x_opt"].to_numpy()), np.column_stack(sampled)])
    return fit_lines(np.log10(cells["flops_mean"].to_numpy()), y)


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
    note, independent = _read_off(runs)
    return Answer(float(values[0]), *evidence.interval(values[1:]), len(runs), note, once, independent=independent)


@answer
def envelope_law(
    evidence: Evidence, arch: str, of: str, what: str, context: int = 8192, loss: str = "val_loss"
) -> Answer:
    """Exponent or coefficient of N or D along the lower envelope of training curves, as a power of FLOPs."""
    curves = evidence.curve_points(loss)
    if not ((curves["arch"] == arch) & (curves["context_length"] == context)).any():
        raise NotAnswerable(f"training curves of {arch} at context {context}")
    row = _cell(evidence.envelope(loss), "an envelope", arch=arch, context_length=context, variable=of)
    note = str(row["detail"])
    if what == "coefficient":
        return Answer(10 ** float(row["log10_coefficient"]), n_runs=int(row["num_points"]), note=note)
    return Answer(float(row["exponent"]), row["exponent_lo"], row["exponent_hi"], int(row["num_points"]), note)


@answer
def hull_law(evidence: Evidence, arch: str, of: str, context: int = 8192, loss: str = "val_loss") -> Answer:
    """Exponent of N or D at the points of the training curves on their lower convex hull in (ln H, ln loss).

    Whole curves are resampled.
    """
    curves = evidence.curve_points(loss)
    curves = curves[(curves["arch"] == arch) & (curves["context_length"] == context)]
    names = list(curves["run_id"].unique())
    if len(names) < 3:
        raise NotAnswerable(f"training curves of {arch} at context {context}")
    y = np.log(curves[{"num_params": "num_params", "num_tokens": "tokens"}[of]].to_numpy(dtype=np.float64))
    flops, height = (curves[name].to_numpy(dtype=np.float64) for name in ("flops", loss))
    place = {pair: i for i, pair in enumerate(zip(np.log(flops).tolist(), np.log(height).tolist()))}
    owner = curves["run_id"].map({name: i for i, name in enumerate(names)}).to_numpy()

    def exponent(drawn: NDArray[np.bool_]) -> tuple[float, int]:
        x, low = convex_frontier(flops[drawn], height[drawn])
        if len(x) < 3:
            return NAN, len(x)
        at = [place[pair] for pair in zip(x.tolist(), low.tolist())]
        return float(fit_lines(x, y[at][None, :])[0, 1]), len(x)

    value, points = exponent(np.ones(len(curves), dtype=bool))
    generator = evidence.generator("hull", arch, context)
    counts = bootstrap_counts(len(names), min(evidence.num_resamples, 200), generator)
    samples = np.array([exponent((row > 0)[owner])[0] for row in counts])
    note = f"{points} points of the {loss} curves of {len(names)} runs lie on the hull."
    return Answer(value, *evidence.interval(samples), len(names), note)


# over-training and the Pareto frontier


@answer
def overtraining_slope(evidence: Evidence, arch: str, ratio: float) -> Answer:
    """Minus the slope of ln loss against ln FLOPs at a fixed token/param ratio."""
    row = _cell(evidence.overtraining(), "a slope", arch=arch, context_length=8192, ratio_tag=ratio)
    return Answer(-float(row["slope"]), -row["slope_hi"], -row["slope_lo"], int(row["num_runs"]))


def _ratio_cell(evidence: Evidence, arch: str, ratio: float) -> tuple[Array, Array]:
    runs = evidence.chosen(arch, 8192, "tokenparam")
    runs = runs[runs["ratio_tag"] == ratio]
    if len(runs) < 3:
        raise NotAnswerable(f"three runs of {arch} with {ratio:g} tokens a parameter; there are {len(runs)}")
    return tuple(np.log(runs[name].to_numpy(dtype=np.float64)) for name in ("num_flops", "val_loss"))


@answer
def overtraining_slope_variance(evidence: Evidence, arch: str, ratio: float) -> Answer:
    """Variance of a slope by least squares: s^2 / sum (x - mean x)^2; `right` is its root, the standard error."""
    x, y = _ratio_cell(evidence, arch, ratio)
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    residual = y - y.mean() - slope * centred
    variance = float(residual @ residual / (len(x) - 2) / (centred @ centred))
    note = f"The standard error is {math.sqrt(variance):.2e}, {1 / math.sqrt(variance):.0f} times what is printed."
    return Answer(variance, n_runs=len(x), note=note, right=math.sqrt(variance))


@answer
def slope_difference(evidence: Evidence, arch: str, ratio: float, other: float) -> Answer:
    """Slope at one token/param ratio minus the slope at another; runs resampled within each ratio."""
    values, samples, number = [], [], 0
    for tag in (ratio, other):
        x, y = _ratio_cell(evidence, arch, tag)
        generator = evidence.generator("overtraining", arch, 8192, tag)
        counts = bootstrap_counts(len(x), evidence.num_resamples, generator)
        values.append(weighted_slopes(x, y, np.ones((1, len(x))))[0])
        samples.append(weighted_slopes(x, y, counts))
        number += len(x)
    return Answer(float(values[0] - values[1]), *evidence.interval(samples[0] - samples[1]), number)


@answer
def pareto_loss(evidence: Evidence, arch: str, flops: float) -> Answer:
    """Loss on the Pareto frontier of the token/param runs at the run whose FLOPs are nearest to `flops`."""
    runs = evidence.chosen(arch, 8192, "tokenparam")
    x, y = (runs[name].to_numpy(dtype=np.float64) for name in ("num_flops", "val_loss"))
    on = frontier_mask(x, y)
    nearest = int(np.abs(np.log(x[on] / flops)).argmin())
    found = float(x[on][nearest])
    if abs(math.log(found / flops)) > 1e-3:
        raise NotAnswerable(f"a run of {flops:.4g} FLOPs on the frontier of {arch}")
    return Answer(float(y[on][nearest]), n_runs=len(runs), note=f"{found:.6g} FLOPs, {on.sum()} runs on the frontier.")


@answer
def flop_ratio(evidence: Evidence, context: int, loss: float) -> Answer:
    """FLOPs that the Transformer needs over those that xLSTM needs for a loss, at one context; runs counted once."""
    value, samples, number = _flop_ratio(evidence, context, loss)
    return Answer(value, *evidence.interval(samples), number)


@answer
def flop_ratio_growth(evidence: Evidence, context: int, other: int, loss: float) -> Answer:
    """`flop_ratio` at one context over that at another."""
    value, samples, number = _flop_ratio(evidence, context, loss)
    base, base_samples, base_number = _flop_ratio(evidence, other, loss)
    return Answer(value / base, *evidence.interval(samples / base_samples), number + base_number)


@shared
def _flop_ratio(evidence: Evidence, context: int, loss: float) -> tuple[float, Array, int]:
    """The ratio, its resamples (runs drawn within budgets and token/param ratios) and the number of runs."""
    needed: dict[str, Array] = {}
    number, target = 0, np.array([loss])
    for arch in ("transformer", "xlstm"):
        runs = evidence.chosen(arch, context)
        x, y = (runs[name].to_numpy(dtype=np.float64) for name in ("num_flops", "val_loss"))
        tags = [runs[name].astype(object).fillna("").astype(str) for name in ("isoflop_tag", "ratio_tag")]
        cells = list(runs["experiment_set"].astype(str) + " " + tags[0] + " " + tags[1])
        seed = int(evidence.config["seed"])
        counts = stratified_counts(cells, evidence.num_resamples, seed, "pareto", arch, context)
        found = [flops_at_loss(x, y, target)[0]]
        found += [flops_at_loss(x[drawn], y[drawn], target)[0] for drawn in counts > 0]
        needed[arch] = np.array(found)
        number += len(runs)
    ratio = needed["transformer"] / needed["xlstm"]
    if not math.isfinite(ratio[0]):
        raise NotAnswerable(f"runs of both architectures that reach a loss of {loss:g} at context {context}")
    return float(ratio[0]), ratio[1:], number


# the parametric loss surface


@answer
def surface_parameter(evidence: Evidence, arch: str, form: str, of: str, subset: str = "tokenparam") -> Answer:
    """A parameter, an exponent (`exponent_params` is beta / (alpha + beta)) or the objective of a loss surface."""
    _form(form)
    key = (arch, subset, form, 1e-3)
    row, number = evidence.surface_row(*key), len(evidence.surface_runs(arch, subset))
    if of == "objective":
        return Answer(row["objective"], n_runs=number)
    return Answer(row[of], *evidence.interval(evidence.surface_intervals(*key)[:, SAMPLED.index(of)]), number)


@answer
def surface_form_shift(evidence: Evidence, arch: str, subset: str = "tokenparam") -> Answer:
    """Exponent of N* with gamma = 1; `right` is what it becomes with gamma free. The interval is that of gamma = 1."""
    fixed = surface_parameter(evidence, arch, FORMS[0], "exponent_params", subset)
    free = surface_parameter(evidence, arch, FORMS[1], "exponent_params", subset)
    note = (
        f"gamma = 1: {fixed.value:.3f} ({fixed.low:.3f} to {fixed.high:.3f}); gamma free: {free.value:.3f} "
        f"({free.low:.3f} to {free.high:.3f})."
    )
    return Answer(fixed.value, fixed.low, fixed.high, fixed.n_runs, note, right=free.value)


@answer
def surface_exponent_extreme(evidence: Evidence, arch: str, subset: str, form: str, deltas: list, which: str) -> Answer:
    """Least (`min`) or largest (`max`) exponent of N* over Huber thresholds."""
    _form(form)
    found = [evidence.surface_row(arch, subset, form, float(delta))["exponent_params"] for delta in deltas]
    note = ", ".join(f"{value:.3f} at {float(delta):g}" for value, delta in zip(found, deltas))
    number = len(evidence.surface_runs(arch, subset))
    return Answer(min(found) if which == "min" else max(found), n_runs=number, note=f"Exponent by threshold: {note}.")


@answer
def surface_objective_at(
    evidence: Evidence, arch: str, at: list, delta: float = 1e-3, subset: str = "tokenparam"
) -> Answer:
    """Objective, sum of Huber losses of ln L, at given parameters (ln A, ln B, ln E, alpha, beta, gamma)."""
    data = evidence.surface_runs(arch, subset)
    residual = np.log(data["val_loss"].to_numpy()) - np.log(_predicted(data, at))
    size = np.minimum(np.abs(residual), delta)
    return Answer(float((size * (np.abs(residual) - 0.5 * size)).sum()), n_runs=len(data))


@answer
def surface_optimality(evidence: Evidence, arch: str, form: str, at: list, subset: str = "tokenparam") -> Answer:
    """Objective at given parameters over the least that our fit finds; 1 at an optimum."""
    _form(form)
    row = evidence.surface_row(arch, subset, form, 1e-3)
    given = surface_objective_at(evidence, arch, at, 1e-3, subset)
    return Answer(given.value / row["objective"], n_runs=given.n_runs, note=f"Least objective: {row['objective']:.9g}.")


@answer
def surface_quality(
    evidence: Evidence, arch: str, at: list, of: str, subset: str = "tokenparam", broadcast: bool = False
) -> Answer:
    """Mean squared error (`mse`) [(nat/token)^2] or R^2 (`r2`) of given parameters on a set of runs.

    With `broadcast` the (n, 1) predictions are subtracted from the (n,) losses, which gives all n x n differences; for
    `r2` their squares are summed over the n squares about the mean. `right` is the value without that.
    """
    data = evidence.surface_runs(arch, subset)
    y, predicted = data["val_loss"].to_numpy(dtype=np.float64), _predicted(data, at)
    spread = float(((y - y.mean()) ** 2).sum())

    def quality(squares: Array) -> float:
        return float(squares.mean()) if of == "mse" else 1.0 - float(squares.sum()) / spread

    right = quality((y - predicted) ** 2)
    if not broadcast:
        return Answer(right, n_runs=len(y))
    return Answer(quality((y - predicted[:, None]) ** 2), n_runs=len(y), note=f"Without it: {right:.6g}.", right=right)


def _predicted(data: pd.DataFrame, at: list) -> Array:
    a, b, e, alpha, beta, gamma = (float(value) for value in at)
    surface = LossSurface(math.exp(a), math.exp(b), math.exp(e), alpha, beta, gamma)
    return surface.predict(*(data[name].to_numpy(dtype=np.float64) for name in ("num_params", "num_tokens")))


def _form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
