"""Composed configurations kept on disk: Hydra needs a second for a large study, and every command composes.

One is found again by the digest of all that decides it: every file under ``conf/``, the overrides, the code that
checks, the versions of Hydra and OmegaConf. Interpolations (of the environment, say) are kept as they are written.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from xlstm_scaling.study.files import atomic_write, digest
from xlstm_scaling.study.machine import cache_folder

#: configurations that are kept, the last used
KEPT = 64
#: 0: always compose
SWITCH_VARIABLE = "XLSTM_SCALING_KEEP_CONFIGURATIONS"


def keep_composed(conf: Path, overrides: Sequence[str], compose: Callable[[], DictConfig]) -> DictConfig:
    """What ``compose`` gives for these overrides of the folder ``conf``, from the disk if it is there.

    A cache that cannot be read or written is left alone.
    """
    if os.environ.get(SWITCH_VARIABLE) == "0":
        return compose()
    try:
        path = cache_folder() / "configurations" / f"{_key(conf, overrides)}.pickle"
        found = pickle.loads(path.read_bytes())
    except Exception:  # not there, torn, of other versions: pickle raises anything
        found = None
    if isinstance(found, DictConfig):
        with contextlib.suppress(OSError):
            os.utime(path)
        OmegaConf.set_readonly(found, True)
        return found
    composed = compose()
    with contextlib.suppress(OSError):
        with atomic_write(path) as stream:
            pickle.dump(composed, stream)
        for old in sorted(path.parent.glob("*.pickle"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return composed


def _key(conf: Path, overrides: Sequence[str]) -> str:
    files = sorted(path for path in conf.rglob("*") if path.suffix in (".yaml", ".yml"))
    code = [Path(__file__).with_name(name) for name in ("config.py", "schemas.py")]
    contents = {str(path.relative_to(conf)): path.read_bytes().hex() for path in files}
    contents |= {path.name: path.read_bytes().hex() for path in code}
    versions = [importlib.metadata.version(package) for package in ("hydra-core", "omegaconf")]
    return digest({"contents": contents, "overrides": list(overrides), "versions": [*versions, sys.version]})[:32]
