"""What the Snakefile needs to know when it is parsed: the composed study, its runs, its files."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from xlstm_scaling.corpus import CorpusError, source_files
from xlstm_scaling.corpus.tokenizer import tokenizer_files
from xlstm_scaling.figures.registry import FIGURES
from xlstm_scaling.figures.study import figure_outputs
from xlstm_scaling.fitting.tables import COLUMNS
from xlstm_scaling.study.config import compose, normalise_overrides, to_dict
from xlstm_scaling.study.files import digest
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import RunSpec, benchmarked_runs, plan_runs
from xlstm_scaling.warmstart import open_session

REPOSITORY = Path(__file__).resolve().parents[2]


class WorkflowStudy:
    """One study as the workflow sees it.

    ``config``: the workflow's config with ``study`` (default laptop), ``overrides`` (Hydra overrides, a list or text)
    and ``results`` (default results).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.study_name = str(config.get("study", "laptop"))
        self.overrides = [f"study={self.study_name}", *normalise_overrides(config.get("overrides"))]
        self.config = compose(self.overrides)
        self.paths = StudyPaths.of(self.config, config.get("results", "results"))

    @property
    def arguments(self) -> str:
        """The overrides and the results folder as shell words, for ``xlstm-scaling STAGE``."""
        return shlex.join(["--results", str(self.paths.results), *self.overrides])

    @cached_property
    def runs(self) -> dict[str, RunSpec]:
        """Run id -> run."""
        return {run.run_id: run for run in plan_runs(self.config)}

    def result(self, run_id: str) -> Path:
        return self.paths.runs / run_id / "result.json"

    @property
    def results(self) -> list[Path]:
        return [self.result(run_id) for run_id in self.runs]

    def for_run(self, run_id: str, path: str, ancient: Callable[[str], str]) -> str:
        """An input that a run must wait for, and whose changes are none of its business once it has its result."""
        return ancient(str(path)) if self.result(run_id).exists() else str(path)

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

    @cached_property
    def figures(self) -> list[Path]:
        return figure_outputs(self.paths.figures, to_dict(self.config))

    @property
    def benchmarked_runs(self) -> list[RunSpec]:
        """Trained runs that the inference stage measures."""
        return benchmarked_runs(self.config, list(self.runs.values()))

    def estimated_time_s(self, run_id: str) -> float:
        """Time of a run by the assumed speed of ``hardware.flops_per_s``."""
        return self.runs[run_id].num_flops / self.config.hardware.flops_per_s

    def prepare_environment(self) -> None:
        """Let the rules' commands come from the environment of this interpreter, and share one warm process."""
        here = str(Path(sys.executable).parent)
        search = os.environ.get("PATH", "").split(os.pathsep)
        if search[0] != here:
            os.environ["PATH"] = os.pathsep.join([here, *search])
        if self.config.hardware.warm_start:
            open_session(os.environ)

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
        words = [f"study={self.study_name}", f"results={self.paths.results}"]
        if len(self.overrides) > 1:
            words.append(f"overrides={json.dumps(self.overrides[1:])}")
        return shlex.join(words)

    @staticmethod
    def code(package: str, pattern: str = "*.py") -> list[Path]:
        """Source files of a part of this package: stages that are cheap to repeat rerun when their code changes."""
        return sorted((REPOSITORY / "src" / package).glob(pattern))

    @staticmethod
    def code_file(name: str) -> Path:
        return REPOSITORY / "src" / name
