"""Labels of the paper's runs (FLOP budget, token/param ratio) and the rules that choose its 640 runs.

The rules are the authors' own, per architecture, context and set; each has a name, and `select` says of every run which
of them leave it out. Losses are validation losses [nat/token], budgets and H are FLOPs of the paper's convention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

BUDGETS = (6e18, 1e19, 3e19, 1e20, 6e20, 3e21)  # [FLOPs]
BUDGET_TOLERANCE = 0.10
RATIOS = (22.0, 44.0, 110.0, 220.0, 550.0, 1100.0, 2200.0)  # [tokens/parameter]
RATIO_TOLERANCE = 0.18
#: its ratio lies near 44, but the authors took it out of that line by hand
UNLABELLED_RUNS = ("dclm_mLSTMv1_160M_ctx8192_lr0.003_steps8000_nh6_gbs128",)
TAGS = {
    "xlstm": (
        *("scl_mlstm_160Mv2", "scl_mlstm_400M", "scl_mlstm_830M", "scl_mlstm_1.4B", "scl_mlstm_2.7B", "scl_mlstm_7B"),
        "dclm_mLSTMv1_7B_longrun_pretraining_final",
    ),
    "transformer": (
        *("scl_llama_160M", "scl_llama_400M", "scl_llama_830Mv2", "scl_llama_1.4Bv2", "scl_llama_2.7B", "scl_llama_7B"),
    ),
}
#: columns that the rules read
COLUMNS = (
    *("arch", "context_length", "experiment_set", "isoflop_tag", "tag", "num_params", "num_tokens", "num_flops"),
    *("val_loss", "global_batch_size_sequences"),
)


@dataclass(frozen=True)
class Filter:
    """A rule of one set: where it applies (None: everywhere), and which runs it keeps (a column of booleans)."""

    name: str
    keep: Callable[[pd.DataFrame], pd.Series]
    experiment_set: str
    arch: str | None = None
    contexts: tuple[int, ...] | None = None

    def applies(self, runs: pd.DataFrame) -> pd.Series:
        """Whether each run is subject to the rule."""
        mask = runs["experiment_set"] == self.experiment_set
        if self.arch is not None:
            mask &= runs["arch"] == self.arch
        if self.contexts is not None:
            mask &= runs["context_length"].isin(self.contexts)
        return mask


def _complete(runs: pd.DataFrame) -> pd.Series:
    return runs[["num_params", "num_tokens", "num_flops", "val_loss"]].notna().all(axis=1)


def _loss_below(limit: float) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda runs: runs["val_loss"] < limit


def _without_spike_2048(runs: pd.DataFrame) -> pd.Series:
    return ~((runs["num_params"] == 1_223_934_208) & (runs["isoflop_tag"] == 3e19))


def _without_spike_3e19(runs: pd.DataFrame) -> pd.Series:
    near = runs["num_flops"].between(2.75e19, 4.5e19, inclusive="neither")
    return ~((runs["num_params"] == 406_635_520) & near & (runs["val_loss"] > 3.0))


def _without_spike_1e20(runs: pd.DataFrame) -> pd.Series:
    return ~(runs["num_flops"].between(0.9e20, 1.4e20, inclusive="neither") & (runs["val_loss"] > 3.2))


def _small_batch_below_3e20(runs: pd.DataFrame) -> pd.Series:
    return (runs["num_flops"] >= 3e20) | (runs["global_batch_size_sequences"] < 200)


def _budgets_to_6e20(runs: pd.DataFrame) -> pd.Series:
    return runs["isoflop_tag"].isin(BUDGETS[:5])


def _loss_at_6e20(runs: pd.DataFrame) -> pd.Series:
    return (runs["isoflop_tag"] != 6e20) | (runs["val_loss"] <= 3.0)


def _tagged(arch: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda runs: runs["tag"].isin(TAGS[arch])


#: every rule of the paper's selection
FILTERS: tuple[Filter, ...] = (
    Filter("complete", _complete, "isoflop"),
    Filter("complete", _complete, "tokenparam"),
    Filter("loss_below_4.5", _loss_below(4.5), "isoflop", "xlstm", (2048, 16384)),
    Filter("loss_below_4.5", _loss_below(4.5), "isoflop", "transformer", (16384,)),
    Filter("without_spike_at_2048", _without_spike_2048, "isoflop", "transformer", (2048,)),
    Filter("loss_below_3.5", _loss_below(3.5), "isoflop", "transformer", (8192,)),
    Filter("without_spike_at_3e19", _without_spike_3e19, "isoflop", "transformer", (8192,)),
    Filter("without_spike_at_1e20", _without_spike_1e20, "isoflop", "transformer", (8192,)),
    Filter("loss_below_4.0", _loss_below(4.0), "isoflop", "xlstm", (8192,)),
    Filter("batch_below_200_under_3e20", _small_batch_below_3e20, "isoflop", "xlstm", (8192,)),
    Filter("budgets_to_6e20", _budgets_to_6e20, "isoflop", "xlstm", (8192,)),
    Filter("loss_to_3.0_at_6e20", _loss_at_6e20, "isoflop", "xlstm", (8192,)),
    Filter("published_tags", _tagged("xlstm"), "tokenparam", "xlstm"),
    Filter("published_tags", _tagged("transformer"), "tokenparam", "transformer"),
)
#: the rule that a run of another set (other batch, other FLOP setting) breaks
OUTSIDE = "outside_the_sets"


def nearest_label(values: Sequence[float] | pd.Series, labels: Sequence[float], tolerance: float) -> np.ndarray:
    """The nearest of ``labels`` [same unit] for each of n values, NaN where none lies within ``tolerance`` of itself.

    Distance is relative to the label; missing values get NaN. Returns floats of shape (n,).
    """
    values = np.asarray(values, dtype=np.float64)[:, None]
    labels = np.asarray(labels, dtype=np.float64)
    distance = np.abs(values / labels - 1)
    nearest = np.where(np.isnan(distance), np.inf, distance).argmin(axis=1)
    within = distance[np.arange(len(values)), nearest] <= tolerance
    return np.where(within, labels[nearest], np.nan)


def add_labels(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with `isoflop_tag` [FLOPs] in IsoFLOP sets and `ratio_tag` [tokens/parameter] in token/param sets.

    Needs `experiment_set`, `num_flops`, `tokens_per_param`; NaN where no label is near (the authors say "extra").
    """
    budgets = nearest_label(_floats(runs["num_flops"]), BUDGETS, BUDGET_TOLERANCE)
    ratios = nearest_label(_floats(runs["tokens_per_param"]), RATIOS, RATIO_TOLERANCE)
    by_hand = runs["name"].isin(UNLABELLED_RUNS) if "name" in runs else False
    return runs.assign(
        isoflop_tag=np.where(runs["experiment_set"] == "isoflop", budgets, np.nan),
        ratio_tag=np.where((runs["experiment_set"] == "tokenparam") & ~by_hand, ratios, np.nan),
    )


def select(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with `selected`, whether the paper's rules keep a run, and `exclusion`, the rules that do not.

    Args:
        runs: the paper's runs with `COLUMNS`, duplicates dropped.

    Returns:
        The same rows; `exclusion` names rules, separated by commas, NaN where none applies.
    """
    floats = {column: _floats(runs[column]) for column in COLUMNS[5:] if column != "tag"}
    numbers = runs.assign(**floats, isoflop_tag=_floats(runs["isoflop_tag"]))
    known, complete = pd.Series(False, index=runs.index), _complete(numbers)
    broken: list[list[str]] = [[] for _ in range(len(runs))]
    for rule in FILTERS:
        subject = rule.applies(numbers)
        known |= subject
        judged = subject if rule.keep is _complete else subject & complete
        for place in np.flatnonzero(judged & ~rule.keep(numbers)):
            broken[place].append(rule.name)
    for place in np.flatnonzero(~known):
        broken[place].append(OUTSIDE)
    reasons = pd.Series([",".join(names) or None for names in broken], index=runs.index, dtype="str")
    return runs.assign(selected=reasons.isna(), exclusion=reasons)


def _floats(column: pd.Series) -> pd.Series:
    return column.astype("float64")
