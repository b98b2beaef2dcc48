"""What a results folder holds that no study in it needs: runs of older code, locks of the dead, temporary files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xlstm_scaling.study.files import read_json
from xlstm_scaling.study.locks import FolderLock, lock_state
from xlstm_scaling.study.run_spec import BEHAVIOUR_VERSION, spec_of

#: a temporary file of a folder without locks is somebody's until it is this old [s]
TEMPORARY_AGE_S = 86400.0
KINDS = ("runs", "trunks", "tokens")


@dataclass(frozen=True)
class Leftover:
    """Something that may go: ``kind`` superseded, unneeded, lock, temporary, parts or checkpoints; ``kept``: why it
    stays all the same, or empty."""

    kind: str
    path: Path
    num_bytes: int
    reason: str
    kept: str = ""


def leftovers(results: Path, unneeded: bool = False) -> list[Leftover]:
    """What `clean` removes, and what it would remove but keeps; ``unneeded``: runs of this code that no plan names too.

    A folder in which a process is at work is passed over.
    """
    results = Path(results)
    needed, plans = _needed(results)
    found = []
    for kind in KINDS:
        for folder in sorted(path for path in (results / kind).glob("*") if path.is_dir()):
            held = lock_state(folder)
            if held is not None and not held.dead:
                continue
            whole = None if kind == "tokens" else _whole(kind, folder, needed, plans, unneeded)
            if whole is not None:
                found.append(whole)
            if whole is None or whole.kept:
                found += _within(folder)
    ages = time.time() - TEMPORARY_AGE_S
    for path in sorted(results.rglob(".*.tmp")):
        if path.relative_to(results).parts[0] not in KINDS and path.stat().st_mtime < ages:
            found.append(Leftover("temporary", path, path.stat().st_size, "a killed process was writing it"))
    return found


def remove(found: list[Leftover], results: Path) -> list[Leftover]:
    """Remove what is not kept, whole folders under their lock; returns what went."""
    gone = []
    for one in found:
        if one.kept:
            continue
        if one.kind in ("superseded", "unneeded"):
            lock = FolderLock(one.path)
            if lock.try_acquire() is not None:  # somebody has begun there meanwhile
                continue
            for name in ("result.json", "trunk.json", "final.ckpt"):
                (one.path / name).unlink(missing_ok=True)  # an interrupted removal leaves nothing that looks finished
            lock.release()
            shutil.rmtree(one.path, ignore_errors=True)
            for log in (Path(results) / "logs" / one.path.parent.name).glob(f"{one.path.name}.*"):
                log.unlink(missing_ok=True)
        elif one.path.is_dir():
            shutil.rmtree(one.path, ignore_errors=True)
        else:
            one.path.unlink(missing_ok=True)
        gone.append(one)
    return gone


def _needed(results: Path) -> tuple[dict[str, str], int]:
    """Run or trunk id -> a study whose plan names it; and how many plans there are."""
    needed: dict[str, str] = {}
    plans = [*results.glob("*/plan/plan.json"), *results.glob("*/*/plan.json")]
    plans = [path for path in dict.fromkeys(plans) if "runs" in (content := read_json(path)) and content["runs"]]
    for path in plans:
        study = path.relative_to(results).parts[0]
        table = path.with_suffix(".csv")
        if table.is_file():  # names as they were when it was planned, by whatever code
            names = (line.partition(",")[0] for line in table.read_text().splitlines()[1:])
            needed |= dict.fromkeys(names, study)
        for run in read_json(path)["runs"]:
            spec = spec_of(run)
            if spec is not None:
                needed |= {spec.run_id: study} | ({spec.trunk_id: study} if spec.trunk_id else {})
    return needed, len(plans)


def _whole(kind: str, folder: Path, needed: dict[str, str], plans: int, unneeded: bool) -> Leftover | None:
    """Whether a folder as a whole has no use."""
    plan = folder / "spec.json"
    spec = spec_of(read_json(plan)) if plan.is_file() else None
    if plan.is_file() and (spec is None or folder.name != (spec.run_id if kind == "runs" else spec.trunk_id)):
        reason, name = f"of older code: this is behaviour version {BEHAVIOUR_VERSION}", "superseded"
    elif unneeded and folder.name not in needed:
        reason, name = "no plan here names it", "unneeded"
    else:
        return None
    kept = ""
    if folder.name in needed:
        kept = f"the plan of {needed[folder.name]} names it; plan that study again with this code"
    elif not plans:
        kept = "no study here says what it needs"
    return Leftover(name, folder, _bytes(folder), reason, kept)


def _within(folder: Path) -> Iterator[Leftover]:
    """Leftovers of killed processes in a folder where nobody is at work."""
    for path in [*folder.glob("lock-*.json"), *folder.glob(".lock")]:
        yield Leftover("lock", path, path.stat().st_size, "its owner is gone")
    for path in [*folder.rglob(".*.tmp"), *folder.rglob(".*.partial")]:
        yield Leftover("temporary", path, _bytes(path), "a killed process was writing it")
    if (folder / "parts").is_dir() and (folder / "meta.json").is_file():
        yield Leftover("parts", folder / "parts", _bytes(folder / "parts"), "the tokens are complete")
    checkpoints = folder / "checkpoints"
    if (folder / "result.json").is_file() and (folder / "final.ckpt").is_file() and any(checkpoints.glob("step-*")):
        yield Leftover("checkpoints", checkpoints, _bytes(checkpoints), "the run has finished")


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
