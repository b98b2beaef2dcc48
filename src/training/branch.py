"""Where runs branch off their trunk: ``branch-<step>.ckpt`` in the trunk's folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from xlstm_scaling.corpus import TokenDataset
from xlstm_scaling.study.files import digest
from xlstm_scaling.study.run_spec import RunSpec
from xlstm_scaling.training.checkpoint import CheckpointError, load_file

log = logging.getLogger(__name__)

_BRANCH = re.compile(r"^branch-(\d+)\.ckpt$")


def trunk_identity(spec: RunSpec, dataset: TokenDataset) -> str:
    """What a branch must agree on with its trunk."""
    return digest({"trunk": spec.trunk_identity(), "tokens": dataset.digest})


def branch_path(folder: Path, step: int) -> Path:
    return Path(folder) / f"branch-{step}.ckpt"


def load_branch(folder: Path, spec: RunSpec, dataset: TokenDataset, limit: int | None = None) -> dict | None:
    """The state of the trunk at step ``limit`` (default: where the run branches off), or the last intact one before."""
    limit = spec.branch_step if limit is None else limit
    steps = [int(found[1]) for path in Path(folder).glob("branch-*.ckpt") if (found := _BRANCH.match(path.name))]
    for step in sorted((step for step in steps if step <= limit), reverse=True):
        try:
            content = load_file(branch_path(folder, step))
        except (CheckpointError, OSError) as error:
            log.warning("%s; using an older one", error)
            continue
        if content["identity"] == trunk_identity(spec, dataset):
            return content
        log.warning("%s belongs to other runs or other tokens; it is ignored", branch_path(folder, step))
    return None
