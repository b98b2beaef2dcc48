"""Where a study's files lie under the results folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from xlstm_scaling.corpus.identity import tokens_id
from xlstm_scaling.study.config import is_published, to_dict


def certificate_path(results: Path | str, hardware: str) -> Path:
    """The kernels' certificate on the hardware of this name (conf/hardware), shared by all studies."""
    return Path(results) / "certificates" / f"{hardware}.json"


@dataclass(frozen=True)
class StudyPaths:
    """``tokens/``, ``runs/`` and ``certificates/`` are shared by all studies; the rest belongs to one."""

    results: Path
    name: str
    tokens_id: str

    @classmethod
    def of(cls, config: DictConfig, results: Path | str = "results") -> StudyPaths:
        name = config.study.name + ("-published" if is_published(config) else "")
        return cls(Path(results), name, tokens_id(to_dict(config.corpus), to_dict(config.tokenizer)))

    @property
    def tokens(self) -> Path:
        return self.results / "tokens" / self.tokens_id

    @property
    def runs(self) -> Path:
        return self.results / "runs"

    @property
    def trunks(self) -> Path:
        """What runs share that differ in length alone."""
        return self.results / "trunks"

    def certificate(self, hardware: str) -> Path:
        """The kernels' certificate on the hardware of this name (conf/hardware)."""
        return certificate_path(self.results, hardware)

    @property
    def study(self) -> Path:
        return self.results / self.name

    @property
    def plan(self) -> Path:
        return self.study / "plan"

    @property
    def fits(self) -> Path:
        return self.study / "fits"

    @property
    def inference(self) -> Path:
        return self.study / "inference"

    @property
    def evaluation(self) -> Path:
        return self.study / "evaluation"

    @property
    def figures(self) -> Path:
        return self.study / "figures"

    @property
    def claims(self) -> Path:
        return self.study / "claims"

    def experiment(self, name: str) -> Path:
        """One of the experiments that are targets of their own (``experiments.EXPERIMENTS``)."""
        return self.study / name

    @property
    def downloads(self) -> Path:
        """The paper's files, where they are fetched (``runs.download``)."""
        return self.results / "downloads"
