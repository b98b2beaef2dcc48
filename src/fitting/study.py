"""All fits of a study: one table of runs in, every table of docs/tables.md (section Fits) out."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from .envelope import fit_envelope
from .forecast import fit_forecasts
from .isoflop import fit_isoflop
from .overtraining import fit_overtraining
from .pareto import fit_pareto
from .power_law import fit_power_laws
from .sensitivity import fit_sensitivity
from .surface_tables import fit_surfaces
from .tables import FitError, usable_runs

_VALID = {"isoflop": "ok", "overtraining": "ok", "surface": "converged", "envelope": "ok"}


def fit_all(
    runs: pd.DataFrame,
    config: Mapping[str, Any],
    curves: pd.DataFrame | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """Fit everything.

    Args:
        runs: the table `runs` of docs/tables.md; only rows with status `ok` and a finite loss are used.
        config: the group `fitting` (conf/fitting/default.yaml).
        curves: training curves for the envelope: arch, context_length, run_id, num_params, tokens, flops, loss.
        progress: called with a line before each part.

    Returns:
        Table name → table, always with every column and its type, also if empty. The numbers depend on the seed and on
        the runs, not on the order of their rows.

    Raises:
        FitError: a column is absent, no run is usable, or not one fit of the study is valid; a cell that fails on
            its own gets a status and a detail instead.
    """
    tell = progress if progress is not None else _silent
    usable = usable_runs(runs)
    if usable.empty:
        states = runs["status"].value_counts().to_dict()
        raise FitError(f"none of the {len(runs)} runs has status 'ok' and a finite validation loss; statuses: {states}")
    tables: dict[str, pd.DataFrame] = {}
    tell("IsoFLOP parabolas")
    tables["isoflop"], tables["isoflop_resamples"] = fit_isoflop(usable, config)
    tell("power laws")
    laws = fit_power_laws(tables["isoflop"], tables["isoflop_resamples"], config, usable)
    tables["power_laws"], tables["power_law_bands"] = laws
    for name, table in zip(("surface", "surface_resamples", "surface_predictions"), fit_surfaces(usable, config, tell)):
        tables[name] = table
    tell("over-training slopes")
    tables["overtraining"] = fit_overtraining(usable, config)
    tell("Pareto frontiers")
    tables["pareto"], tables["pareto_ratio"] = fit_pareto(usable, config)
    tell("training-curve envelope")
    tables["envelope"] = fit_envelope(_usable_curves(curves, usable), config, usable)
    tell("other countings, and budgets predicted from smaller ones")
    tables["sensitivity"] = fit_sensitivity(usable, tables["isoflop"], tables["isoflop_resamples"], config)
    tables["forecasts"] = fit_forecasts(tables["isoflop"], tables["isoflop_resamples"], usable, config, tell)
    _require_a_fit(tables, usable)
    return tables


def _usable_curves(curves: pd.DataFrame | None, usable: pd.DataFrame) -> pd.DataFrame | None:
    if curves is None or "run_id" not in curves.columns:
        return curves
    return curves[curves["run_id"].isin(usable["run_id"])]


def _require_a_fit(tables: Mapping[str, pd.DataFrame], usable: pd.DataFrame) -> None:
    if any((tables[name]["status"] == status).any() for name, status in _VALID.items()):
        return
    seen = {name: tables[name]["status"].value_counts().to_dict() for name in _VALID}
    reasons = "; ".join(f"{name}: {counts or 'no cells'}" for name, counts in seen.items())
    details = [text for name in ("isoflop", "overtraining", "surface") for text in tables[name]["detail"].head(1)]
    sets = usable["experiment_set"].value_counts().to_dict()
    raise FitError(f"not one fit is valid. {len(usable)} usable runs, {sets}. {reasons}. E.g.: {' '.join(details)}")


def _silent(_: str) -> None:
    return None
