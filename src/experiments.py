"""The paper's first three experiments, each on its own: tables and figures in a folder of the study.

`isoflop_sweep`: runs of equal compute -> parabolas -> power laws. `latency_profile`: one size over long prompts.
`context_scaling`: two contexts, the same token budget. Of published runs the same, from what was published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from xlstm_scaling.study.config import ConfigError, is_published, to_dict, write_resolved
from xlstm_scaling.study.files import write_table
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import plan_runs, write_plan

#: experiment -> its figures, its tables (below the experiment's folder), and what it is
EXPERIMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "isoflop_sweep": (
        ("isoflop_curves", "isoflop_contexts", "compute_optimal"),
        ("runs", "fits/isoflop", "fits/isoflop_resamples", "fits/power_laws", "fits/power_law_bands"),
        "runs of equal compute, their parabolas and the laws of the minima",
    ),
    "latency_profile": (
        ("latency_profile",),
        ("inference/measurements",),
        "time to first token, step time and memory of one size over long prompts",
    ),
    "context_scaling": (
        ("context_scaling",),
        ("runs", "context_scaling"),
        "the loss of the same training at two contexts, the same token budget",
    ),
}


def table_files(paths: StudyPaths, name: str) -> list[Path]:
    """The tables that `make_tables` writes."""
    return [paths.experiment(name) / f"{table}.parquet" for table in EXPERIMENTS[name][1]]


def make_tables(name: str, config: DictConfig, paths: StudyPaths, progress: bool = True) -> None:
    """The tables of an experiment, in ``<study>/<name>/``. FileNotFoundError names a stage that is to be run first."""
    makers = {"isoflop_sweep": _isoflop_sweep, "latency_profile": _latency_profile, "context_scaling": _context_scaling}
    makers[name](config, paths, progress)
    write_resolved(config, paths.experiment(name) / "config.yaml")


def draw(name: str, config: DictConfig, paths: StudyPaths, progress: bool = True) -> list[Path]:
    """The figures of an experiment, from its tables: ``<study>/<name>/figures/``; returns the files."""
    from xlstm_scaling.figures.study import draw_all

    folder = paths.experiment(name)
    return draw_all(folder, folder / "figures", to_dict(config), EXPERIMENTS[name][0], progress)


def summary(name: str, paths: StudyPaths) -> str:
    """Where the outputs of an experiment are."""
    folder = paths.experiment(name)
    figures = sorted(path.relative_to(folder) for path in (folder / "figures").glob("*.svg"))
    tables = [path.with_suffix(".csv").relative_to(folder) for path in table_files(paths, name)]
    lines = [f"{name}, {EXPERIMENTS[name][2]}, in {folder}:"]
    return "\n".join(
        [*lines, *(f"  {kind} {path}" for kind, found in (("table ", tables), ("figure", figures)) for path in found)]
    )


def _runs_of(specs: Sequence, config: DictConfig, paths: StudyPaths) -> pd.DataFrame:
    """The table of some runs, from their results."""
    from xlstm_scaling.study.runs import load_results, runs_table

    return runs_table(specs, load_results(specs, paths.runs), config.study.name, config.corpus.name)


def _published_runs(paths: StudyPaths) -> pd.DataFrame:
    from xlstm_scaling.study.runs import read_runs

    return read_runs(paths.study / "runs.parquet")


def _isoflop_sweep(config: DictConfig, paths: StudyPaths, progress: bool) -> None:
    from xlstm_scaling.fitting.isoflop import fit_isoflop
    from xlstm_scaling.fitting.power_law import fit_power_laws
    from xlstm_scaling.fitting.tables import FitError, usable_runs

    if is_published(config):
        runs = _published_runs(paths)
        runs = runs[runs["experiment_set"] == "isoflop"]
    else:
        runs = _runs_of([run for run in plan_runs(config) if run.experiment_set == "isoflop"], config, paths)
    usable, settings = usable_runs(runs), to_dict(config.fitting)
    if usable.empty:
        raise FitError(f"none of the {len(runs)} IsoFLOP runs has status 'ok' and a finite validation loss")
    cells, resamples = fit_isoflop(usable, settings)
    laws, bands = fit_power_laws(cells, resamples, settings, usable)
    tables = {"isoflop": cells, "isoflop_resamples": resamples, "power_laws": laws, "power_law_bands": bands}
    folder = paths.experiment("isoflop_sweep")
    for name, table in tables.items():
        write_table(table, folder / "fits" / name)
    write_table(runs, folder / "runs")


def profile_settings(config: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of ``latency_profile``, and the one size that it measures: name -> dimensions.

    ConfigError where ``inference.profile.size`` is not among ``inference.untrained``.
    """
    settings = to_dict(config.inference)
    changes = settings.pop("profile")
    size, known = changes.pop("size"), {name: size for name, size in settings["untrained"].items() if size is not None}
    if size not in known:
        raise ConfigError(f"inference.profile.size = {size!r} is not in inference.untrained; known: {', '.join(known)}")
    for name in ("untrained", "num_trained", "runtime_model"):
        settings.pop(name)
    return settings | {name: value for name, value in changes.items() if value is not None}, {size: known[size]}


def _latency_profile(config: DictConfig, paths: StudyPaths, progress: bool) -> None:
    folder = paths.experiment("latency_profile") / "inference"
    if is_published(config):
        table = _published_profile(pd.read_parquet(paths.inference / "measurements.parquet"))
        write_table(table, folder / "measurements")
        return
    from xlstm_scaling.inference.benchmark import measure, models_of_study

    settings, size = profile_settings(config)
    measure(models_of_study(config, size), settings, folder, progress)


def _published_profile(measurements: pd.DataFrame, least_tokens: int = 2048) -> pd.DataFrame:
    """The largest size that every architecture was measured at (within a tenth), batch 1, from 2,048 tokens on."""
    rows = measurements[(measurements["batch_size"] == 1) & (measurements["prefill_length"] >= least_tokens)]
    sizes = {arch: set(part["num_params"]) for arch, part in rows.groupby("arch")}
    common = [
        size
        for size in sorted(next(iter(sizes.values()), ()))
        if all(any(abs(other / size - 1) <= 0.1 for other in others) for others in sizes.values())
    ]
    if not common:
        raise ValueError(f"no size was measured for all of {', '.join(sizes) or 'no architecture'} at batch 1")
    return rows[(rows["num_params"] / common[-1] - 1).abs() <= 0.1].reset_index(drop=True)


def context_plan(config: DictConfig, paths: StudyPaths) -> int:
    """The runs of ``context_scaling`` that the study does not have, as a plan to train from; returns their number."""
    from xlstm_scaling.study.context_scaling import context_scaling_runs, extra_runs

    extra = extra_runs(context_scaling_runs(config), plan_runs(config))
    write_plan(paths.experiment("context_scaling") / "plan.json", extra, config)
    return len(extra)


def _context_scaling(config: DictConfig, paths: StudyPaths, progress: bool) -> None:
    from xlstm_scaling.study.context_scaling import context_scaling_runs, context_table, published_context_table

    folder = paths.experiment("context_scaling")
    if is_published(config):
        runs = _published_runs(paths)
        table = published_context_table(runs, list(config.study.context_scaling.context_lengths))
        runs = runs[runs["run_id"].isin(table["run_id"])]
    else:
        pairs = context_scaling_runs(config)
        specs = list({run.run_id: run for _, run in pairs}.values())
        if not specs:
            raise ConfigError("the study has no IsoFLOP runs at its base context to compare contexts with")
        runs = _runs_of(specs, config, paths)
        table = context_table(runs, pairs, [run.run_id for run in plan_runs(config)])
    write_table(runs, folder / "runs")
    write_table(table, folder / "context_scaling")


def run(name: str, config: DictConfig, paths: StudyPaths, part: str | None = None, progress: bool = True) -> str:
    """An experiment, or its ``plan``, ``tables`` or ``figures`` alone -> a text that says what was made, and where.

    Raises:
        ConfigError: no such experiment, or one that the study has no runs for.
        FileNotFoundError: runs or tables are missing; the message names the stage.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"no experiment {name!r}; there are: {', '.join(EXPERIMENTS)}")
    if part == "plan":
        if name != "context_scaling":
            raise ConfigError(f"{name} needs no runs but the study's: --part plan is for context_scaling")
        return f"{context_plan(config, paths)} runs beside the study's: {paths.experiment(name) / 'plan.json'}"
    if part != "figures":
        make_tables(name, config, paths, progress)
    if part == "tables":
        return f"{name}: tables in {paths.experiment(name)}"
    draw(name, config, paths, progress)
    return summary(name, paths)
