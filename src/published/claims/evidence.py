"""The data that claims are answered from, what their answers share, and the register of answers.

An answer function takes the evidence and the claim's arguments and returns a `ledger.Answer`; where data are missing it
raises `NotAnswerable`. Losses are in nat/token, FLOPs in the convention of the table. Results that several claims share
(all parabolas, one loss surface) are computed once per `Evidence`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.fitting.envelope import fit_envelope
from xlstm_scaling.fitting.isoflop import fit_isoflop
from xlstm_scaling.fitting.overtraining import fit_overtraining
from xlstm_scaling.fitting.power_law import fit_power_laws, minima_lines
from xlstm_scaling.fitting.resampling import cell_generator, percentile_interval
from xlstm_scaling.fitting.sensitivity import MULTIPLICITY
from xlstm_scaling.fitting.surface_fit import fit_surface_ladder
from xlstm_scaling.fitting.surface_result import SAMPLED, SurfaceFit
from xlstm_scaling.fitting.surface_tables import surface_samples
from xlstm_scaling.fitting.tables import FitError, usable_runs

from .ledger import AnswerFunction, NotAnswerable

Array = NDArray[np.float64]
#: context of the paper's loss surfaces, over-training runs and frontier [tokens]
BASE_CONTEXT = 8192
#: Huber thresholds of the loss surfaces, in units of ln loss
DELTAS = (1e-1, 1e-2, 1e-3, 1e-4)
#: in the provenance of losses that were read off a figure under the condition that the printed parabola comes out
CONSTRAINED = "polyfit constraint"
#: answer functions by name; complete where ``answers`` was imported
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
        """Whether the authors count some of the runs more than once."""
        return MULTIPLICITY in runs.columns and bool((runs[MULTIPLICITY].fillna(1) != 1).any())

    @shared
    def isoflop(self, duplicates: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
        """All parabolas and their resamples, with the duplicates counted as the authors count them, or once."""
        config = copy.deepcopy(self.config)
        config["isoflop"]["weight_column"] = MULTIPLICITY if duplicates else None
        if duplicates:
            self.multiplicity(self.runs)
        return fit_isoflop(self.runs, config)

    def _law_config(self, min_flops: float, max_flops: float) -> dict[str, Any]:
        law = self.config["power_law"] | {"flops_range": [min_flops, max_flops], "min_points": 2}
        return self.config | {"power_law": law}

    @shared
    def power_laws(self, duplicates: bool, min_flops: float, max_flops: float) -> pd.DataFrame:
        """The table `power_laws` over the minima of a range of budgets [FLOPs]."""
        return fit_power_laws(*self.isoflop(duplicates), self._law_config(min_flops, max_flops), self.runs)[0]

    @shared
    def minima_lines(self, duplicates: bool, min_flops: float, max_flops: float) -> dict:
        """Those laws as lines, with their resamples (`power_law.minima_lines`)."""
        return minima_lines(*self.isoflop(duplicates), self._law_config(min_flops, max_flops))

    @shared
    def overtraining(self) -> pd.DataFrame:
        """The table `overtraining`."""
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
        """The table `envelope` of the curves of a loss."""
        curves = self.curve_points(loss).rename(columns={"loss": "loss_"}).rename(columns={loss: "loss"})
        # every resample is an envelope of its own: 100 are enough for an interval of this check
        config = self.config | {"num_resamples": min(self.num_resamples, 100)}
        return fit_envelope(curves, config, self.runs)

    def surface_runs(self, arch: str, subset: str) -> pd.DataFrame:
        """Runs of a loss surface: at `BASE_CONTEXT`, of a set or `all`."""
        return self.chosen(arch, BASE_CONTEXT, None if subset == "all" else subset)

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
            keys = {"arch": arch, "context_length": BASE_CONTEXT, "subset": subset, "form": form}
            rows = rows_with(table, keys)
            rows = rows[np.isclose(rows["huber_delta"], delta, rtol=1e-9) & (rows["status"] == "converged")]
            fitted = rows_with(predictions, keys).set_index("run_id")["val_loss"]
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
        return surface_samples(fit, data, config, arch, BASE_CONTEXT, subset)[0]


def rows_with(table: pd.DataFrame, keys: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that have these values."""
    keep = np.ones(len(table), dtype=bool)
    for column, value in keys.items():
        keep &= (table[column] == value).to_numpy(dtype=bool)
    return table[keep]


def fitted_row(table: pd.DataFrame, what: str, good: str = "ok", **keys: Any) -> pd.Series:
    """The one row of a fit's table; NotAnswerable where it is absent or its status is not `good`."""
    rows = rows_with(table, keys)
    names = ", ".join(f"{column} {value}" for column, value in keys.items())
    if rows.empty:
        raise NotAnswerable(f"runs for {what} of {names}")
    row = rows.iloc[0]
    if row["status"] != good:
        raise NotAnswerable(f"{what} of {names}: {row['status']}, {row['detail']}")
    return row


def read_off_figures(runs: pd.DataFrame) -> tuple[str, bool]:
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
