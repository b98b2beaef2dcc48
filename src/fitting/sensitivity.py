"""How much the exponents of N*(H) and D*(H) depend on what is counted: the FLOP convention, and runs counted twice."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from xlstm_scaling.accounting import CONVENTIONS, shape_of_row, training_flops
from xlstm_scaling.accounting.shapes import DIMENSIONS

from .isoflop import fit_isoflop
from .power_law import fit_power_laws
from .tables import make_table

#: how often a run stands in the authors' tables (docs/published.md)
MULTIPLICITY = "notebook_multiplicity"
_RECIPE = ("global_batch_size_sequences", "num_train_steps")


def fit_sensitivity(
    runs: pd.DataFrame, isoflop: pd.DataFrame, resamples: pd.DataFrame, config: Mapping[str, Any]
) -> pd.DataFrame:
    """Refit the power laws of the IsoFLOP minima under other countings.

    Variants: `flops_<convention>` for every FLOP convention of the accounting but the paper's, where shapes and recipe
    are known; `duplicates`, every run weighted by how often its authors counted it, where some were counted twice. The
    runs of a budget stay together: the convention moves where the budget lies.

    Args:
        runs: usable runs.
        isoflop, resamples: the tables of `isoflop.fit_isoflop`.
        config: the group `fitting`.

    Returns:
        The table `sensitivity` of docs/tables.md.
    """
    parts = []
    for variant, minima, draws in _variants(runs, isoflop, resamples, config):
        laws, _ = fit_power_laws(minima, draws, config, runs)
        laws = laws[(laws["predictor"] == "flops") & laws["variable"].isin(["num_params", "num_tokens"])]
        names = ["arch", "context_length", "variable", "exponent", "exponent_lo", "exponent_hi", "num_points"]
        parts.append(laws[[*names, "status", "detail"]].assign(variant=variant))
    rows = pd.concat(parts, ignore_index=True) if parts else []
    return make_table("sensitivity", rows, runs)


def _variants(
    runs: pd.DataFrame, isoflop: pd.DataFrame, resamples: pd.DataFrame, config: Mapping[str, Any]
) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    members = runs[(runs["experiment_set"] == "isoflop") & runs["isoflop_tag"].notna()]
    cell = ["arch", "context_length", "isoflop_tag"]
    known = {*DIMENSIONS, *_RECIPE} <= set(runs.columns) and members[[*DIMENSIONS, *_RECIPE]].notna().all(axis=None)
    for convention in CONVENTIONS if known and len(members) else ():
        if convention == "paper":
            continue
        flops = [_flops(run, convention) for run in members.itertuples()]
        means = members.assign(counted=flops).groupby(cell)["counted"].mean().to_dict()
        yield (
            f"flops_{convention}",
            *(
                table.assign(flops_mean=[means[key] for key in zip(*(table[name] for name in cell))])
                for table in (isoflop, resamples)
            ),
        )
    if MULTIPLICITY in runs and (runs[MULTIPLICITY] > 1).any():
        weighted = {**config, "isoflop": {**config["isoflop"], "weight_column": MULTIPLICITY}}
        yield "duplicates", *fit_isoflop(runs, weighted)


def _flops(run: Any, convention: str) -> float:
    """FLOPs of a training run under a convention."""
    recipe = (int(getattr(run, name)) for name in _RECIPE)
    return training_flops(shape_of_row(run._asdict()), int(run.context_length), *recipe, convention)
