"""Which trained runs are evaluated. No torch: the workflow asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from xlstm_scaling.study.config import ConfigError
from xlstm_scaling.study.run_spec import RunSpec

CHOICES = ("best", "largest")


def evaluated_runs(config: DictConfig, runs: Sequence[RunSpec]) -> list[RunSpec]:
    """The runs that may be evaluated, known before any is trained: those of the largest budget at each context, by
    architecture (all runs of a context without a budget).

    Of them ``evaluation.choose: largest`` takes the ``evaluation.num_runs`` with the most parameters; ``best`` leaves
    the choice to `best_runs`, when their losses are known.
    """
    choose = config.evaluation.choose
    if choose not in CHOICES:
        raise ConfigError(f"evaluation.choose must be {' or '.join(CHOICES)}, got {choose!r}")
    chosen = []
    for context in sorted({run.context_length for run in runs}):
        for arch in config.study.architectures:
            here = [run for run in runs if run.arch == arch and run.context_length == context]
            top = max((run.isoflop_tag for run in here if run.isoflop_tag), default=None)
            here = [run for run in here if top is None or run.isoflop_tag == top]
            by_size = sorted(here, key=lambda run: -run.num_params)
            chosen += by_size if choose == "best" else by_size[: config.evaluation.num_runs]
    return chosen


def best_runs(candidates: Sequence[RunSpec], results: Mapping[str, Mapping[str, Any]], num_runs: int) -> list[RunSpec]:
    """The ``num_runs`` with the lowest validation loss for each architecture and context, of those that ended well.

    results: run id -> its ``result.json``.
    """
    chosen: list[RunSpec] = []
    good = [run for run in candidates if results[run.run_id]["status"] == "ok"]
    for group in dict.fromkeys((run.context_length, run.arch) for run in candidates):
        here = [run for run in good if (run.context_length, run.arch) == group]
        chosen += sorted(here, key=lambda run: results[run.run_id]["val_loss"])[:num_runs]
    return chosen
