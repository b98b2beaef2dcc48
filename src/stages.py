"""The stages of a study as functions: files in, files out. The command line and the workflow call the same ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from omegaconf import DictConfig

from xlstm_scaling.study.config import ConfigError, is_published, to_dict, write_resolved
from xlstm_scaling.study.files import read_json, write_table
from xlstm_scaling.study.locks import folder_locked
from xlstm_scaling.study.paths import StudyPaths, certificate_path
from xlstm_scaling.study.plan import PlanError, load_plan, plan_runs, plan_table, plan_warnings, write_plan
from xlstm_scaling.study.run_spec import RunSpec, TrunkSpec

if TYPE_CHECKING:
    from xlstm_scaling.study.status import StudyStatus
    from xlstm_scaling.training.execution import Execution

log = logging.getLogger(__name__)


def tokens(
    config: DictConfig, paths: StudyPaths, progress: bool = True, workers: int | None = None, part: str | None = None
) -> dict:
    """Text -> tokens: ``tokens/<id>/meta.json``, whose content is returned, and the shards beside it.

    workers: processes side by side, default the CPUs there are; part: "I/N" makes that share of the parts only, for
    one job of an array; without it what is missing is made, all is merged, and the parts go.
    """
    from xlstm_scaling.corpus.build import build_part, build_tokens

    corpus, tokenizer = to_dict(config.corpus), to_dict(config.tokenizer)
    if part is not None:
        count = build_part(corpus, tokenizer, paths.tokens, part, progress, workers)
        log.info("%s: share %s, %d parts; when all are there, run `tokens` without --part", paths.tokens, part, count)
        return {}
    path = paths.tokens / "meta.json"
    before = path.stat() if path.is_file() else None
    with folder_locked(paths.tokens, f"the corpus {paths.tokens_id}") as (lock, waited):
        if waited and path.is_file() and (before is None or path.stat().st_mtime_ns != before.st_mtime_ns):
            log.info("%s was made meanwhile", paths.tokens)
            return read_json(path)
        meta = build_tokens(corpus, tokenizer, paths.tokens, progress, workers, lock.require)
        lock.require()
        write_resolved(config, paths.tokens / "config.yaml", ["corpus", "tokenizer"])
    train = meta["splits"]["train"]
    log.info("%s: %s training tokens, vocabulary %d", paths.tokens, f"{train['num_tokens']:,}", meta["vocab_size"])
    return meta


def corpus_tokens(config: DictConfig, paths: StudyPaths) -> float | None:
    """Training tokens of the corpus: counted where the tokens exist, else ``corpus.expected_tokens``."""
    meta = paths.tokens / "meta.json"
    if meta.is_file():
        return float(read_json(meta)["splits"]["train"]["num_tokens"])
    expected = config.corpus.get("expected_tokens")
    return None if expected is None else float(expected)


def plan(config: DictConfig, paths: StudyPaths) -> pd.DataFrame:
    """The plan of runs: ``plan/plan.json`` (what runs need) and ``plan/plan.parquet`` (what people read)."""
    runs = plan_runs(config)
    table = plan_table(runs, config, corpus_tokens(config, paths))
    warnings = plan_warnings(table, config)
    meta = paths.tokens / "meta.json"
    if meta.is_file() and (vocab := read_json(meta)["vocab_size"]) != runs[0].shape["vocab_size"]:
        raise PlanError(f"the tokens have a vocabulary of {vocab}, the plan's models {runs[0].shape['vocab_size']}")
    for warning in warnings:
        log.warning("%s", warning)
    write_table(table, paths.plan / "plan")
    write_resolved(config, paths.plan / "config.yaml")
    write_plan(paths.plan / "plan.json", runs, config, warnings)
    return table


def find_run(runs: Sequence[RunSpec], name: str) -> RunSpec:
    """The run of this id, or the only one whose id starts with or contains ``name``."""
    exact = [run for run in runs if run.run_id == name]
    found = exact or [run for run in runs if run.run_id.startswith(name)] or [r for r in runs if name in r.run_id]
    if len(found) == 1:
        return found[0]
    listed = "\n  ".join(run.run_id for run in (found or runs)[:20])
    what = f"{len(found)} runs match {name!r}" if found else f"no run matches {name!r}"
    raise ConfigError(f"{what}; there are:\n  {listed}")


def train(
    run: RunSpec,
    hardware: dict,
    results: Path,
    progress: bool = True,
    uncertified: bool = False,
    trunk: TrunkSpec | None = None,
) -> dict:
    """Train one run (or find it trained): ``runs/<run_id>/result.json``; from its trunk, where it has one.

    CertificateError, before any step, unless ``certificates/<hardware name>.json`` covers the run's kernels, or
    ``uncertified`` is asked for.
    """
    from xlstm_scaling.training.run import train as train_run

    execution = _execution(hardware, results, progress, uncertified, trunk)
    return train_run(run, _tokens_folder(results, run), Path(results) / "runs" / run.run_id, execution)


def train_trunk(
    trunk: TrunkSpec, hardware: dict, results: Path, progress: bool = True, uncertified: bool = False
) -> dict:
    """Train what some runs share (or find it trained): ``trunks/<trunk_id>/trunk.json``; errors as in `train`."""
    from xlstm_scaling.training.trunk import train_trunk as train_shared

    execution = _execution(hardware, results, progress, uncertified)
    return train_shared(trunk, _tokens_folder(results, trunk.spec), trunk_folder(results, trunk), execution)


def trunk_folder(results: Path, trunk: TrunkSpec) -> Path:
    return Path(results) / "trunks" / trunk.trunk_id


def _tokens_folder(results: Path, run: RunSpec) -> Path:
    folder = Path(results) / "tokens" / run.tokens_id
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"no tokens at {folder}: run the stage `tokens` first")
    return folder


def _execution(
    hardware: dict, results: Path, progress: bool, uncertified: bool, trunk: TrunkSpec | None = None
) -> Execution:
    from xlstm_scaling.training.execution import Execution

    devices = hardware.get("devices_per_run", 1)
    if devices > 1 and "WORLD_SIZE" not in os.environ:
        log.warning("hardware.devices_per_run = %d, but without torchrun one device trains", devices)
    return Execution(
        device=hardware["device"],
        threads=hardware["threads_per_run"],
        peak_flops=hardware["peak_flops"],
        micro_batch_sequences=hardware["micro_batch_sequences"],
        checkpoint_interval_s=hardware["checkpoint_interval_s"],
        prefetch_batches=hardware["prefetch_batches"],
        trackers=tuple(hardware["trackers"]),
        shard=hardware.get("shard", "none"),
        activation_checkpointing=hardware.get("activation_checkpointing", False),
        progress=progress,
        certificate=None if uncertified else certificate_path(results, hardware.get("name", "auto")),
        compile_cache=Path(results) / "cache" / "compiled" if hardware.get("compile") else None,
        trunk=None if trunk is None else trunk_folder(results, trunk),
    )


def runs(paths: StudyPaths) -> pd.DataFrame:
    """The table of runs and the training curves of the plan in ``plan/plan.json``."""
    from xlstm_scaling.study.runs import curves_table, load_results, runs_table

    content, specs = load_plan(paths.plan / "plan.json")
    table = runs_table(specs, load_results(specs, paths.runs), content["study"], content["corpus"])
    write_table(curves_table(specs, paths.runs), paths.study / "curves")
    write_table(table, paths.study / "runs")
    for row in table[table.status != "ok"].itertuples():
        log.warning("%s %s: %s; the fits leave it out", row.run_id, row.status, row.detail)
    return table


def download(config: DictConfig, paths: StudyPaths, only: Sequence[str] | None = None, progress: bool = True) -> None:
    """Fetch the paper's run logs and inference measurements into ``downloads/``, each checked by its published id."""
    from tqdm import tqdm

    from xlstm_scaling.published.upstream import Upstream
    from xlstm_scaling.study.published import INFERENCE_FILES

    upstream = Upstream.load()
    names = only or [*upstream.logs, INFERENCE_FILES[-1]]
    for name in tqdm(names, desc="downloading", unit="file", disable=not progress, leave=False):
        upstream.fetch(name, paths.downloads, config.runs.url)


def published_inference(config: DictConfig, paths: StudyPaths) -> pd.DataFrame:
    """Published inference measurements and the runtime model fitted to them: ``inference/*.parquet``;
    ``published.parquet`` is what was read, for the ledger of claims."""
    from xlstm_scaling.fitting.runtime_model import fit_runtime_models
    from xlstm_scaling.inference.counts import add_counts
    from xlstm_scaling.inference.probe import published_device
    from xlstm_scaling.inference.roofline import write_rooflines
    from xlstm_scaling.study.published import inference_file, measurements_table, published_folder, read_published

    source = inference_file(config, paths)
    if source is None:
        raise FileNotFoundError(f"no inference measurements in {published_folder(config, paths)}")
    settings = to_dict(config.runs.inference)
    published = read_published(source)
    measurements = measurements_table(published, settings)
    counted = add_counts(measurements, settings["generate_steps"], settings.get("prefill_logits"))
    fitting = to_dict(config.inference)["runtime_model"] | {"datasheet": settings.get("datasheet")}
    model, predictions = fit_runtime_models(counted, fitting)
    write_table(model, paths.inference / "runtime_model")
    write_table(predictions, paths.inference / "runtime_predictions")
    write_table(measurements, paths.inference / "measurements")
    write_rooflines(counted, published_device(settings), paths.inference)
    write_table(published, paths.inference / "published")
    write_resolved(config, paths.inference / "config.yaml", ["runs", "inference"])
    return measurements


def fit(config: DictConfig, paths: StudyPaths) -> dict[str, pd.DataFrame]:
    """Every law from the table of runs: ``fits/*.parquet``."""
    from xlstm_scaling.fitting import fit_all
    from xlstm_scaling.study.runs import read_runs

    runs_table = read_runs(paths.study / "runs.parquet")
    curves_path = paths.study / "curves.parquet"
    curves = pd.read_parquet(curves_path).rename(columns={"train_loss": "loss"}) if curves_path.is_file() else None
    tables = fit_all(runs_table, to_dict(config.fitting), curves, log.info)
    for name, table in tables.items():
        write_table(table, paths.fits / name)
    write_resolved(config, paths.fits / "config.yaml", ["fitting"])
    return tables


def inference(config: DictConfig, paths: StudyPaths, progress: bool = True) -> pd.DataFrame:
    """Time to first token and step time of trained and larger untrained models on this machine, and the runtime model:
    ``inference/*.parquet``. Of published runs, the published measurements (`published_inference`)."""
    from functools import partial

    if is_published(config):
        return published_inference(config, paths)

    from xlstm_scaling.fitting.runtime_model import fit_runtime_models
    from xlstm_scaling.inference.benchmark import BenchmarkModel, measure, measured_device, models_of_study
    from xlstm_scaling.inference.counts import add_counts
    from xlstm_scaling.inference.roofline import write_rooflines
    from xlstm_scaling.study.plan import benchmarked_runs
    from xlstm_scaling.training.trainer import load_trained

    settings = to_dict(config.inference)
    trained = []
    for run in benchmarked_runs(config, plan_runs(config)):
        folder = paths.runs / run.run_id
        if not (folder / "final.ckpt").is_file():
            raise FileNotFoundError(f"no trained model in {folder}: run the stage `train` first")
        name = f"{run.arch}-{run.size}-trained"
        trained.append(BenchmarkModel(name, run.arch, run.model_shape, True, partial(load_trained, folder)))
    untrained = models_of_study(config, settings["untrained"])
    measurements = measure([*trained, *untrained], settings, paths.inference, progress)
    counted = add_counts(measurements, settings["generate_steps"])
    device = measured_device(settings)
    write_rooflines(counted, device, paths.inference)
    model, predictions = fit_runtime_models(counted, settings["runtime_model"], device)
    write_table(model, paths.inference / "runtime_model")
    write_table(predictions, paths.inference / "runtime_predictions")
    write_resolved(config, paths.inference / "config.yaml", ["inference"])
    return measurements


def evaluate(config: DictConfig, paths: StudyPaths, progress: bool = True) -> pd.DataFrame:
    """The loss of trained models by position, out to several training contexts, on long held-out documents:
    ``evaluation/length.parquet``."""
    from functools import partial

    import torch

    from xlstm_scaling.corpus import TokenDataset
    from xlstm_scaling.evaluation.length import EvaluatedRun, length_table
    from xlstm_scaling.evaluation.selection import best_runs, evaluated_runs
    from xlstm_scaling.study.machine import keep_freed_memory
    from xlstm_scaling.training.trainer import load_trained

    if is_published(config):
        raise ConfigError("published runs come without their models: there is nothing to evaluate")
    settings = to_dict(config.evaluation)
    if not (paths.tokens / "meta.json").is_file():
        raise FileNotFoundError(f"no tokens at {paths.tokens}: run the stage `tokens` first")
    candidates = evaluated_runs(config, plan_runs(config))
    results = {}
    for run in candidates:
        path = paths.runs / run.run_id / "result.json"
        if not path.is_file():
            raise FileNotFoundError(f"no trained model in {path.parent}: run the stage `train` first")
        results[run.run_id] = read_json(path)
    keep_freed_memory()
    torch.set_num_threads(config.hardware.threads_per_run)
    runs = []
    for run in best_runs(candidates, results, settings["num_runs"]):
        about = {"arch": run.arch, "run_id": run.run_id, "isoflop_tag": run.isoflop_tag, "num_params": run.num_params}
        about |= {"num_flops": run.num_flops, "val_loss": results[run.run_id]["val_loss"]}
        runs.append(EvaluatedRun(run.context_length, about, partial(load_trained, paths.runs / run.run_id)))
    split = TokenDataset.open(paths.tokens).split("validation")
    table = length_table(runs, split, settings, config.hardware.device, progress)
    write_table(table, paths.evaluation / "length")
    write_resolved(config, paths.evaluation / "config.yaml", ["evaluation"])
    return table


def figures(config: DictConfig, paths: StudyPaths, only: Sequence[str] | None = None, progress: bool = True) -> None:
    """Draw the figures from the tables: ``figures/*.svg`` and ``*.png``."""
    from xlstm_scaling.figures.study import draw_all, drawable_names
    from xlstm_scaling.study.published import has_inference

    if only is None:
        only = drawable_names(to_dict(config), has_inference(config, paths))
    draw_all(paths.study, paths.figures, {**to_dict(config), "study": config.study.name}, only, progress)
    write_resolved(config, paths.figures / "config.yaml", ["figures"])


def explore(config: DictConfig, paths: StudyPaths, out: Path | None = None) -> Path:
    """The laws as one offline page, to drag budget, context and limits: ``explorer.html`` (docs/explorer.md)."""
    from xlstm_scaling.explorer.data import study_data

    try:
        from xlstm_scaling.explorer.page import write_page
    except ModuleNotFoundError as error:
        text = f"the explorer is drawn by Bokeh, and {error.name} is missing: make env installs it"
        raise ConfigError(text) from None
    target = paths.study / "explorer.html" if out is None else out
    write_page(study_data(paths.study, config.study.title), target)
    return target


def findings(config: DictConfig, paths: StudyPaths) -> pd.DataFrame:
    """What the study found, in sentences computed from its tables: ``findings.md``, ``.html``, ``.csv``; and the
    table of optima: ``optimal.csv``."""
    from xlstm_scaling.figures.tables import Tables
    from xlstm_scaling.report.findings import findings as compute
    from xlstm_scaling.report.findings import write_findings
    from xlstm_scaling.report.optimal import optimal_table
    from xlstm_scaling.study.published import has_inference

    provenance = read_json(paths.study / "runs.provenance.json") if is_published(config) else None
    tables = Tables(paths.study)
    fitting = to_dict(config.fitting)
    write_table(
        optimal_table(tables["fits/isoflop"], tables["fits/isoflop_resamples"], fitting), paths.study / "optimal"
    )
    table = compute(tables, has_inference(config, paths), provenance)
    title = f"Findings of the study {config.study.name}: {config.study.title}"
    write_findings(table, paths.study / "findings", title, config.fitting.confidence)
    return table


def report(config: DictConfig, paths: StudyPaths) -> Path:
    """The study's results on one page, ``report.html``; what is not there yet is said on it."""
    from xlstm_scaling.report.page.write import write_page
    from xlstm_scaling.study.published import has_inference
    from xlstm_scaling.study.workflow import REPOSITORY

    captions, plain = REPOSITORY / "workflow" / "report", to_dict(config)
    return write_page(paths, plain, captions, is_published(config), has_inference(config, paths))


def status(config: DictConfig, paths: StudyPaths) -> StudyStatus:
    """Where a study stands: the state of every run of the plan, and the time left."""
    from xlstm_scaling.study.status import study_status

    return study_status(plan_runs(config), paths.runs, config.hardware.flops_per_s)
