"""Loss surfaces of a study: subsets, forms, sensitivity to the Huber threshold, and bootstrap intervals as tables."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .loss_surface import SURFACE_FIELDS
from .resampling import percentile_interval, stratified_counts
from .surface_fit import bootstrap_surface, fit_surface_ladder
from .surface_result import SAMPLED, SurfaceFit
from .tables import budget_cells, make_table

Samples = NDArray[np.float64]
_TABLES = ("surface", "surface_resamples", "surface_predictions")


def base_context(runs: pd.DataFrame, config: Mapping[str, Any]) -> int:
    """Return the context of the surfaces: `surface.context_length`, or the one with most usable runs [tokens]."""
    chosen = config["surface"].get("context_length")
    if chosen is not None:
        return int(chosen)
    counts = runs["context_length"].value_counts()
    return int(min(counts[counts == counts.max()].index))


def fit_surfaces(
    runs: pd.DataFrame, config: Mapping[str, Any], progress: Callable[[str], None] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Fit every architecture, subset and form at the base context.

    The main Huber delta gets bootstrap intervals; the sensitivity deltas are point fits.
    Resamples keep the number of runs of each FLOP budget, and of the token/param set as a whole.

    Args:
        runs: usable runs (`tables.usable_runs`).
        config: the group `fitting`.
        progress: called with a line before each fit.

    Returns:
        The tables `surface`, `surface_resamples` and `surface_predictions` of docs/tables.md.
    """
    rows: list[dict[str, Any]] = []
    resamples: list[pd.DataFrame] = []
    predictions: list[pd.DataFrame] = []
    if runs.empty:
        return tuple(make_table(name, [], runs) for name in _TABLES)
    context, surface = base_context(runs, config), config["surface"]
    main = float(surface["huber_delta"])
    here = runs[runs["context_length"] == context]
    for arch in sorted(runs["arch"].unique()):
        for subset in surface["subsets"]:
            chosen = here["arch"] == arch
            if subset != "all":
                chosen &= here["experiment_set"] == subset
            data = here[chosen]
            values = (data["num_params"], data["num_tokens"], data["val_loss"])
            for form in surface["forms"]:
                if progress is not None:
                    progress(f"loss surface: {arch}, context {context}, {subset}, {form}")
                key = {"arch": arch, "context_length": context, "subset": subset, "form": form}
                key["num_runs"] = len(data)
                deltas = [main, *(float(delta) for delta in surface["sensitivity_deltas"])]
                fit, *others = fit_surface_ladder(*values, surface, form=form, deltas=deltas)
                intervals, samples = _intervals(fit, data, key, config)
                rows.append(key | _row(fit, main) | intervals)
                resamples.append(_resamples(samples, key, main))
                for other in others:
                    if np.isclose(other.huber_delta, main, rtol=1e-12, atol=0):
                        continue
                    row = _row(other, other.huber_delta)
                    row["detail"] += " No bootstrap at this delta."
                    rows.append(key | row)
                if fit.surface is not None:
                    frame = data[["run_id", "num_params", "num_tokens", "val_loss"]].copy()
                    frame["predicted_loss"] = fit.surface.predict(data["num_params"], data["num_tokens"])
                    predictions.append(frame.assign(arch=arch, context_length=context, subset=subset, form=form))
    parts = (rows, _stacked(resamples), _stacked(predictions))
    return tuple(make_table(name, part, runs) for name, part in zip(_TABLES, parts))


def _stacked(frames: list[pd.DataFrame]) -> pd.DataFrame | list:
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else []


def _row(fit: SurfaceFit, delta: float) -> dict[str, Any]:
    row: dict[str, Any] = {"huber_delta": delta, "status": fit.status.value, "detail": fit.detail}
    names = ("objective", "rmse_log", "r2_log", "log_likelihood", "aic", "bic")
    row |= {name: getattr(fit, name) for name in (*names, "num_starts", "num_starts_agree", "condition_number")}
    if fit.surface is not None:
        row |= asdict(fit.surface)
        row |= {"exponent_params": fit.surface.exponent_params, "exponent_tokens": fit.surface.exponent_tokens}
    return row


def _intervals(
    fit: SurfaceFit, data: pd.DataFrame, key: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], Samples]:
    """Return the `_lo`, `_hi` columns and the detail with the number of resamples that converged, and the resamples."""
    if fit.surface is None:
        return {}, np.empty((0, len(SAMPLED)))
    samples, survivors = surface_samples(fit, data, config, key["arch"], key["context_length"], key["subset"])
    intervals: dict[str, Any] = {}
    for name, column in zip(SAMPLED, samples.T):
        intervals[f"{name}_lo"], intervals[f"{name}_hi"] = percentile_interval(column, config["confidence"])
    if key["form"] == "gamma_fixed":
        intervals["gamma_lo"] = intervals["gamma_hi"] = np.nan
    detail = f"{fit.detail} {survivors} of {len(samples)} resamples converged."
    if np.isnan(intervals["exponent_params_lo"]):
        detail += " Fewer than half: no interval."
    return intervals | {"detail": detail}, samples


def _resamples(samples: Samples, key: Mapping[str, Any], delta: float) -> pd.DataFrame:
    """Rows of `surface_resamples`: the surface of each resample, NaN where it did not converge."""
    frame = pd.DataFrame(samples[:, : len(SURFACE_FIELDS)], columns=list(SURFACE_FIELDS))
    names = ("arch", "context_length", "subset", "form")
    return frame.assign(resample=np.arange(len(frame)), huber_delta=delta, **{name: key[name] for name in names})


def surface_samples(
    fit: SurfaceFit, data: pd.DataFrame, config: Mapping[str, Any], *stream: Hashable
) -> tuple[Samples, int]:
    """Return the bootstrap of a fit; resamples keep the number of runs of each FLOP budget and of the token/param set.

    Args:
        fit: a fit with values.
        data: the runs that it was fitted to, in the same order: experiment_set, isoflop_tag.
        config: the group `fitting`.
        stream: what names the random stream besides "surface": architecture, context, subset.

    Returns:
        As `bootstrap_surface`: `SAMPLED` of each resample, and how many converged.
    """
    counts = stratified_counts(
        budget_cells(data),
        int(config["num_resamples"]),
        config["seed"],
        "surface",
        *stream,
        min_distinct=fit.problem.lower.size,
    )
    return bootstrap_surface(fit, counts, config["surface"])
