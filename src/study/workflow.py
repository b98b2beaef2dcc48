"""What the Snakefile needs to know when it is parsed: the composed study, its runs, its files."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from xlstm_scaling import experiments
from xlstm_scaling.corpus import CorpusError, source_files
from xlstm_scaling.corpus.tokenizer import tokenizer_files
from xlstm_scaling.evaluation.selection import evaluated_runs
from xlstm_scaling.figures.registry import FIGURES
from xlstm_scaling.figures.study import drawable_names, figure_outputs
from xlstm_scaling.fitting.tables import COLUMNS
from xlstm_scaling.published.upstream import Upstream
from xlstm_scaling.study.config import ConfigError, compose, conf_dir, is_published, normalise_overrides, to_dict
from xlstm_scaling.study.context_scaling import context_scaling_runs, extra_runs
from xlstm_scaling.study.files import digest
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import PlanError, benchmarked_runs, plan_runs
from xlstm_scaling.study.published import (
    INFERENCE_FILES,
    has_inference,
    inference_file,
    published_folder,
    run_files,
)
from xlstm_scaling.study.resources import JobResources
from xlstm_scaling.study.run_spec import RunSpec, TrunkSpec, find_trunks
from xlstm_scaling.study.status import study_status, unfinished_lines
from xlstm_scaling.warmstart import open_session

REPOSITORY = Path(__file__).resolve().parents[2]
#: failed runs whose logs are shown at the end of a workflow
MAX_FAILED_SHOWN = 5


def _names(given: Sequence[str] | str | None) -> list[str]:
    """Names from a list, or from text such as ``a, b`` or ``[a, b]``."""
    listed = given.strip("[] ").replace(",", " ").split() if isinstance(given, str) else given or []
    return [str(name) for name in listed]


class WorkflowStudy:
    """One study as the workflow sees it.

    ``config``: the workflow's config with ``study`` (default laptop; paper, where runs are published), ``runs``
    (trained or published), ``paper`` and ``download`` (where published runs come from), ``architectures`` (a list or
    text), ``overrides`` (Hydra overrides, a list or text), ``compare`` (other studies, a list or text) and ``results``
    (default results).

    Raises ConfigError where published runs are asked for and there are none.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        given = [f"{key}={config[key]}" for key in ("runs",) if config.get(key)]
        given += [f"runs.folder={json.dumps(str(config['paper']))}"] if config.get("paper") else []
        given += [f"runs.download={str(bool(config['download'])).lower()}"] if config.get("download") else []
        overrides = normalise_overrides(config.get("overrides"))
        if architectures := _names(config.get("architectures")):
            overrides.append(f"study.architectures=[{','.join(architectures)}]")
        published = "runs=published" in [*given, *overrides]
        if not published and len(given) > given.count("runs=trained"):
            raise ConfigError("paper and download name published runs: add runs=published")
        self.study_name = str(config.get("study") or ("paper" if published else "laptop"))
        self.overrides = [f"study={self.study_name}", *given, *overrides]
        self.config = compose(self.overrides)
        self.paths = StudyPaths.of(self.config, config.get("results", "results"))
        self._there: dict[str, bool] = {}
        self._compare = config.get("compare") or []
        if self.published:
            published_folder(self.config, self.paths)

    @property
    def published(self) -> bool:
        """Whether the runs are published ones; then nothing is trained or timed."""
        return is_published(self.config)

    @property
    def downloads(self) -> list[Path]:
        """The paper's files that are fetched; none where a folder is given."""
        if not (self.published and self.config.runs.download):
            return []
        return [self.paths.downloads / name for name in (*Upstream.load().logs, INFERENCE_FILES[-1])]

    @property
    def published_files(self) -> list[Path]:
        """The files that the table of runs is read from."""
        if self.downloads:
            return [path for path in self.downloads if path.name not in INFERENCE_FILES]
        return run_files(published_folder(self.config, self.paths))

    @property
    def published_folder(self) -> Path:
        return published_folder(self.config, self.paths)

    @property
    def published_settings(self) -> list[Path]:
        """The settings that `ingest` reads, and the mapping of tables that the study names."""
        mapping = self.config.runs.mapping
        return sorted((conf_dir() / "published").glob("*.yaml")) + ([Path(mapping)] if mapping else [])

    @property
    def ingest_options(self) -> str:
        """Options of ``xlstm-scaling ingest`` as shell words."""
        words = ["--selected"] if self.config.runs.selected else []
        return shlex.join([*words, *(["--mapping", self.config.runs.mapping] if self.config.runs.mapping else [])])

    @property
    def published_inference_digest(self) -> str:
        """Digest of what the published measurements do not say of themselves."""
        return digest(to_dict(self.config.runs.inference))[:16]

    @property
    def published_measurements(self) -> list[Path]:
        """The published measurements as they were read, if there are any."""
        return [self.paths.inference / "published.parquet"] if self.published_inference else []

    @property
    def claims(self) -> list[Path]:
        """What the paper claims."""
        return sorted((conf_dir() / "claims").glob("*.yaml"))

    @property
    def claims_files(self) -> list[Path]:
        """The ledger of the paper's claims; none of runs trained here, and of those of others (``runs.claims``)."""
        wanted = self.published and self.config.runs.claims
        return [self.paths.claims / f"claims.{kind}" for kind in ("html", "csv", "md")] if wanted else []

    @cached_property
    def compared(self) -> list[Path]:
        """Folders of the studies that this one is compared with; ConfigError where one has no fits."""
        folders = [self.paths.results / name for name in _names(self._compare)]
        for folder in folders:
            if folder == self.paths.study:
                raise ConfigError(f"compare={folder.name}: that is this study; name others")
            if not (folder / "fits" / "power_laws.parquet").is_file():
                there = sorted(path.parts[-3] for path in self.paths.results.glob("*/fits/power_laws.parquet"))
                known = f"studies with fits: {', '.join(there)}" if there else "no study has fits yet"
                raise ConfigError(f"compare={folder.name}: no fits in {folder}; {known}. Run that study first")
        return folders

    @property
    def compared_files(self) -> list[Path]:
        """The tables of other studies that this one is compared with."""
        names = ("power_laws", "surface", "pareto_ratio")
        return [folder / "fits" / f"{name}.parquet" for folder in self.compared for name in names]

    @property
    def comparison_files(self) -> list[Path]:
        return [self.paths.study / "comparison" / "comparison.parquet"] if self.compared else []

    @property
    def report_targets(self) -> str:
        """The rules whose outputs are in the report."""
        given = ("claims" if self.claims_files else "", "compare" if self.compared else "")
        return " ".join(["figures findings", *filter(None, given)])

    @property
    def claims_arguments(self) -> str:
        """Options of ``xlstm-scaling claims`` as shell words."""
        study = self.paths.study
        words = ["--runs", study / "runs.parquet", "--curves", study / "curves.parquet", "--fits", self.paths.fits]
        words += [word for path in self.published_measurements for word in ("--inference-table", path)]
        return shlex.join(map(str, [*words, "--out", self.paths.claims]))

    @property
    def provenance(self) -> list[Path]:
        """What published runs were read from; none of runs trained here."""
        return [self.paths.study / "runs.provenance.json"] if self.published else []

    @property
    def published_inference(self) -> Path | None:
        """The published inference measurements, if there are any."""
        return inference_file(self.config, self.paths)

    @property
    def inference_files(self) -> list[Path]:
        """The tables of the stage `inference`; none where there is nothing published to make them from."""
        names = ("measurements", "runtime_model", "runtime_predictions", "device", "roofline", "crossings")
        kept = has_inference(self.config, self.paths)
        return [self.paths.inference / f"{name}.parquet" for name in names] if kept else []

    @property
    def evaluation_files(self) -> list[Path]:
        """The table of the stage `evaluate`; none of published runs, whose models are not at hand."""
        return [] if self.published else [self.paths.evaluation / "length.parquet"]

    @property
    def arguments(self) -> str:
        """The overrides and the results folder as shell words, for ``xlstm-scaling STAGE``."""
        return shlex.join(["--results", str(self.paths.results), *self.overrides])

    @cached_property
    def runs(self) -> dict[str, RunSpec]:
        """Run id -> run."""
        return {run.run_id: run for run in plan_runs(self.config)}

    @cached_property
    def context_runs(self) -> dict[str, RunSpec]:
        """Run id -> run that the target `context_scaling` compares and the study does not have; none where it cannot be
        made, which is the target's error and not the study's."""
        if self.published:
            return {}
        with suppress(PlanError):
            extra = extra_runs(context_scaling_runs(self.config), self.runs.values())
            return {run.run_id: run for run in extra}
        return {}

    @cached_property
    def all_runs(self) -> dict[str, RunSpec]:
        """Runs of the study, and of its experiments."""
        return self.runs | self.context_runs

    @property
    def context_plan(self) -> Path:
        return self.paths.experiment("context_scaling") / "plan.json"

    def run_inputs(self, run_id: str, certificate: str, ancient: Callable[[str], str]) -> dict[str, Any]:
        """Names and files that a run waits for, beside its tokens. One function for all: each one that Snakemake calls
        costs more than what it does.

        A run that is there waits for none of them: they count as ancient, and are left out where they are not there
        yet, as in a folder that runs were adopted into (Snakemake heeds `ancient` only of files that exist).
        """
        finished = self.result(run_id).exists()

        def kept(path: str) -> str | list[str]:
            if not finished:
                return path
            return ancient(path) if self._is_there(path) else []

        inputs = {"plan": kept(self.plan_of(run_id)), "certificate": kept(str(certificate))}
        trunk = self.trunks.get(self.all_runs[run_id].trunk_id or "")
        if trunk is not None:
            inputs["trunk"] = kept(str(self.paths.trunks / trunk.trunk_id / "trunk.json"))
        return inputs

    def _is_there(self, path: str) -> bool:
        """Whether a file exists that many runs share, looked up once."""
        if path not in self._there:
            self._there[path] = Path(path).exists()
        return self._there[path]

    def plan_of(self, run_id: str) -> str:
        """The plan that a run is trained from."""
        return str(self.paths.plan / "plan.json" if run_id in self.runs else self.context_plan)

    def experiment_inputs(self, name: str) -> list[Path]:
        """What the tables of an experiment are made from: results of runs, or published tables.

        ConfigError where the study has no runs for it.
        """
        if name == "latency_profile":
            return self.inference_files[:1] if self.published else []
        if self.published:
            return [self.paths.study / "runs.parquet"]
        if name == "isoflop_sweep":
            runs = [run for run in self.runs.values() if run.experiment_set == "isoflop"]
        else:
            runs = [run for _, run in context_scaling_runs(self.config)]
        if not runs:
            raise ConfigError(f"study={self.study_name} has no IsoFLOP runs for {name}: give study.isoflop a cell")
        return list({self.result(run.run_id): None for run in runs})

    def experiment_figures(self, name: str) -> list[Path]:
        """The figures of an experiment."""
        return figure_outputs(
            self.paths.experiment(name) / "figures", to_dict(self.config), experiments.EXPERIMENTS[name][0]
        )

    @cached_property
    def trunks(self) -> dict[str, TrunkSpec]:
        """Trunk id -> what some runs share."""
        return {trunk.trunk_id: trunk for trunk in find_trunks(self.runs.values())}

    def result(self, run_id: str) -> Path:
        return self.paths.runs / run_id / "result.json"

    @property
    def results(self) -> list[Path]:
        return [self.result(run_id) for run_id in self.runs]

    @property
    def text_files(self) -> list[Path]:
        """Text and tokenizer files that the tokens depend on; empty where they are missing (the stage says why)."""
        try:
            return source_files(to_dict(self.config.corpus)) + tokenizer_files(to_dict(self.config.tokenizer))
        except CorpusError:
            return []

    def digest(self, *groups: str) -> str:
        """Digest of some groups of the configuration: a change reruns the rules that depend on it."""
        plain = to_dict(self.config)
        return digest({group: plain[group] for group in groups or sorted(plain)})[:16]

    @property
    def inference_digest(self) -> str:
        """Digest of what the stage `inference` depends on."""
        return digest({name: value for name, value in to_dict(self.config.inference).items() if name != "profile"})[:16]

    @property
    def profile_digest(self) -> str:
        """Digest of what the target `latency_profile` measures."""
        return digest([] if self.published else experiments.profile_settings(self.config))[:16]

    @cached_property
    def figures(self) -> list[Path]:
        names = drawable_names(to_dict(self.config), has_inference(self.config, self.paths))
        return figure_outputs(self.paths.figures, to_dict(self.config), names)

    @property
    def benchmarked_runs(self) -> list[RunSpec]:
        """Trained runs that the inference stage measures."""
        return benchmarked_runs(self.config, list(self.runs.values()))

    @property
    def evaluated_runs(self) -> list[RunSpec]:
        """Trained runs that the stage `evaluate` chooses from."""
        return evaluated_runs(self.config, list(self.runs.values()))

    @cached_property
    def resources(self) -> JobResources:
        """What a scheduler is asked for."""
        # a plain object: it is read thousands of times
        return JobResources(self.all_runs, self.trunks, OmegaConf.to_object(self.config.hardware), self.paths.runs)

    def prepare_environment(self) -> None:
        """Let the rules' commands come from the environment of this interpreter, and share one warm process."""
        here = str(Path(sys.executable).parent)
        search = os.environ.get("PATH", "").split(os.pathsep)
        if search[0] != here:
            os.environ["PATH"] = os.pathsep.join([here, *search])
        if self.config.hardware.warm_start and not self.published:
            open_session(os.environ)

    def explain_failure(self) -> str:
        """The workflow's last words where it failed: runs that failed or were stopped, how their logs end, and the
        commands that say more."""
        lines, arguments = [], self.arguments
        if not self.published:
            runs = list(self.all_runs.values())
            status = study_status(runs, self.paths.runs, self.config.hardware.flops_per_s)
            counts = status.runs["state"].value_counts()
            if failed := counts.get("failed", 0) + counts.get("stopped", 0):
                lines.append(f"runs that failed or were stopped: {failed}")
                lines += unfinished_lines(status, self.paths.results, ("failed", "stopped"), most=MAX_FAILED_SHOWN)
            lines += ["", f"how the runs stand:          xlstm-scaling status {arguments}"]
        lines.append(f"what there is, on one page:  xlstm-scaling report {arguments}")
        lines.append("The same call of the workflow again keeps what is finished and goes on.")
        return "\n".join(lines)

    def fit_files(self, suffix: str) -> list[Path]:
        """The tables of the stage `fit`."""
        return [self.paths.fits / f"{name}{suffix}" for name in COLUMNS]

    @property
    def figure_specs(self) -> dict:
        return FIGURES

    @property
    def captions(self) -> list[Path]:
        """Texts of the report."""
        return sorted((REPOSITORY / "workflow" / "report").glob("*.rst"))

    @property
    def workflow_config_arguments(self) -> str:
        """This study as shell words for ``snakemake --config``."""
        # `runs`, `paper` and `download` are among the overrides
        words = [f"study={self.study_name}", f"results={self.paths.results}"]
        if self.compared:
            words.append(f"compare={json.dumps([folder.name for folder in self.compared])}")
        if len(self.overrides) > 1:
            words.append(f"overrides={json.dumps(self.overrides[1:])}")
        return shlex.join(words)

    @staticmethod
    def code(package: str, pattern: str = "*.py") -> list[Path]:
        """Source files of a part of this package: stages that are cheap to repeat rerun when their code changes."""
        return sorted((REPOSITORY / "src" / package).glob(pattern))
