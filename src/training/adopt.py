"""Taking over runs and tokens from another results folder: everything is verified, nothing finished is overwritten.

A run is known by its folder's name, which carries the digest of what determined its loss. What it holds must agree with
that name and with itself: plan, result, curve, weights (all with their digests), and the tokens it names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from xlstm_scaling.corpus import CorpusError, TokenDataset
from xlstm_scaling.kernels.certification.certificate import certificate_digest
from xlstm_scaling.study.files import digest, read_json
from xlstm_scaling.study.locks import FolderLock, lock_state
from xlstm_scaling.study.run_spec import BEHAVIOUR_VERSION, RunSpec, spec_of
from xlstm_scaling.training.checkpoint import CheckpointError, load_file
from xlstm_scaling.training.metrics import read_history
from xlstm_scaling.training.parallel import Parallel
from xlstm_scaling.training.sharded import check_files, read_manifest

ADOPTED, WOULD, HERE, REFUSED = "adopted", "would be adopted", "already here", "refused"
#: how files are taken over
WAYS = ("copy", "link", "move")
#: written last, as others wait for it; always copied, so that the source keeps its times
LAST = {"tokens": "meta.json", "trunks": "trunk.json", "runs": "result.json"}
#: what no other folder has a use for
LEFT_OUT = ("lock-*.json", ".*", "failure.json")


class Refused(ValueError):
    """Why something is not taken over."""


@dataclass(frozen=True)
class Adoption:
    """One folder: ``kind`` tokens, trunks, runs or certificates; ``state``: adopted, would be adopted, already here or
    refused; ``reason``: why, or what to know."""

    kind: str
    name: str
    state: str
    reason: str = ""


def adopt(
    source: Path, results: Path, way: str = "copy", dry_run: bool = False, progress: bool = True
) -> list[Adoption]:
    """Verify and take over what a results folder, its ``runs`` folder or one run's folder holds.

    way: ``copy``; ``link``: large files by hard links, on one file system; ``move``: the source loses what was taken.
    Raises ValueError where there is nothing to adopt, or source and destination are one.
    """
    if way not in WAYS:
        raise ValueError(f"files are taken over by {', '.join(WAYS)}, not {way!r}")
    found = list(_folders(Path(source)))
    if not found:
        raise ValueError(f"{source} holds no runs, trunks or tokens: name a results folder or a run's folder")
    if any(folder.resolve().parent == (Path(results) / kind).resolve() for kind, folder in found):
        raise ValueError(f"{source} is in the results folder {results} already")
    said = []
    for kind, folder in tqdm(found, desc="verifying", unit="folder", disable=not progress, leave=False):
        said.append(_adopt_folder(kind, folder, Path(results), way, dry_run))
    return said + _adopt_certificates(found, said, Path(results), dry_run)


def _folders(source: Path) -> Iterator[tuple[str, Path]]:
    """Kind and folder of all that can be adopted; tokens first, as runs must not be older than their tokens."""
    if not source.is_dir():
        raise ValueError(f"no folder {source}")
    if (source / "spec.json").is_file():
        yield ("trunks" if (source / "trunk.json").is_file() else "runs"), source
        return
    if (source / "meta.json").is_file():
        yield "tokens", source
        return
    for kind in ("tokens", "trunks", "runs"):
        parent = source if source.name == kind else source / kind
        if parent.is_dir():
            yield from ((kind, folder) for folder in sorted(parent.iterdir()) if folder.is_dir())


def _adopt_folder(kind: str, source: Path, results: Path, way: str, dry_run: bool) -> Adoption:
    verify: Callable[[Path], tuple[bool, str]] = {"tokens": _tokens, "trunks": _trunk, "runs": _run}[kind]
    target = results / kind / source.name
    try:
        held = lock_state(source)
        if held is not None and not held.dead:
            raise Refused(f"{held.owner or 'a process'} is at work in it")
        finished, about = verify(source)
        note = _tokens_note(source, results) if kind == "runs" else ""
        if _here(kind, source, target, finished):
            return Adoption(kind, source.name, HERE)
        if not dry_run:
            _take(kind, source, target, way, finished)
        return Adoption(kind, source.name, WOULD if dry_run else ADOPTED, "; ".join(filter(None, (about, note))))
    except (Refused, CheckpointError, CorpusError) as error:
        return Adoption(kind, source.name, REFUSED, str(error))
    except (OSError, ValueError, KeyError, TypeError) as error:  # missing, torn or foreign files
        return Adoption(kind, source.name, REFUSED, f"{type(error).__name__}: {error}")


# verification: whether it is finished, and what to know; Refused, or an error that names the file


def _tokens(folder: Path) -> tuple[bool, str]:
    TokenDataset.open(folder, verify="digest")
    return True, ""


def _spec(folder: Path) -> RunSpec:
    spec = spec_of(read_json(folder / "spec.json"))
    if spec is None:
        raise Refused("its spec.json is of code with other settings")
    return spec


def _run(folder: Path) -> tuple[bool, str]:
    spec = _spec(folder)
    if spec.run_id != folder.name:
        version = (
            read_json(folder / "result.json").get("behaviour_version") if (folder / "result.json").is_file() else None
        )
        if version not in (None, BEHAVIOUR_VERSION):
            raise Refused(f"trained by code of behaviour version {version}, this is version {BEHAVIOUR_VERSION}")
        raise Refused(
            f"its plan belongs to {spec.run_id}: the folder was renamed, or is of another version of the code"
        )
    if not (folder / "result.json").is_file():
        return False, _unfinished(folder)
    result = read_json(folder / "result.json")
    if result["run_id"] != spec.run_id:
        raise Refused(f"its result is that of {result['run_id']}")
    if result["identity"] != digest({"spec": spec.identity(), "tokens": result["tokens_digest"]}):
        raise Refused("its result's identity is not that of its plan and its tokens")
    content = load_file(folder / "final.ckpt")
    if content["identity"] != result["identity"] or not same(content["result"], result):
        raise Refused("result.json is not what was saved with the weights")
    _check_history(folder, spec, result)
    return True, "" if result["status"] == "ok" else f"the run {result['status']}"


def _unfinished(folder: Path) -> str:
    """The newest intact checkpoint of an unfinished run. Refused without one."""
    from xlstm_scaling.training.sharded import Checkpoints

    alone = Parallel()
    for path in reversed(Checkpoints(folder / "checkpoints", alone).paths()):
        try:
            if path.is_dir():
                problems = check_files(path, read_manifest(path), alone)
                if problems:
                    raise CheckpointError(problems[0])
            else:
                load_file(path)
        except (CheckpointError, OSError):
            continue
        return f"unfinished, goes on from {path.name}"
    raise Refused("it has neither a result nor an intact checkpoint")


def _check_history(folder: Path, spec: RunSpec, result: dict) -> None:
    """The curve belongs to the result: it ends with it, and the training loss is the mean of its last twentieth."""
    lines = read_history(folder / "history.jsonl")
    steps = [line["step"] for line in lines]
    if not steps or steps != sorted(set(steps)) or steps[-1] > spec.num_train_steps:
        raise Refused("history.jsonl is torn or of another run")
    if result["status"] != "ok":
        return
    tail = [line["train_loss"] for line in lines[-max(1, len(lines) // 20) :] if line["train_loss"] is not None]
    if steps[-1] != result["steps_done"] or not math.isclose(
        sum(tail) / len(tail), result["train_loss"], rel_tol=1e-12
    ):
        raise Refused("history.jsonl does not end in the result's training loss")


def _trunk(folder: Path) -> tuple[bool, str]:
    spec, trunk = _spec(folder), read_json(folder / "trunk.json")
    if spec.trunk_id != folder.name or trunk["trunk_id"] != folder.name:
        raise Refused("its plan belongs to another trunk, or to another version of the code")
    identities = {load_file(folder / f"branch-{step}.ckpt")["identity"] for step in trunk["steps"]}
    if len(identities) != 1:
        raise Refused("its branches are of several trunks")
    return True, ""


def _tokens_note(folder: Path, results: Path) -> str:
    """Whether the destination has the tokens that a run was trained on. Refused where it has others of that name."""
    spec = _spec(folder)
    meta = Path(results) / "tokens" / spec.tokens_id / "meta.json"
    result = folder / "result.json"
    if not meta.is_file():
        return f"its tokens {spec.tokens_id} are not here: adopt or make them first, or runs are looked at again"
    if result.is_file() and read_json(meta)["digest"] != read_json(result)["tokens_digest"]:
        raise Refused(f"it was trained on other tokens than those in {meta.parent}")
    return ""


def same(one: object, other: object) -> bool:
    """Equal as JSON, where NaN equals NaN."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


# taking over


def _here(kind: str, source: Path, target: Path, finished: bool) -> bool:
    """Whether the destination has the same already. Refused where it has something else that is finished."""
    last = target / LAST[kind]
    if last.is_file():
        ours, theirs = read_json(last), read_json(source / LAST[kind]) if finished else None
        keys = {"tokens": ("digest",), "trunks": ("trunk_id", "steps"), "runs": ("identity", "status", "val_loss")}[
            kind
        ]
        if theirs is not None and not same([ours.get(key) for key in keys], [theirs.get(key) for key in keys]):
            raise Refused(f"{target} holds another finished one: {_difference(ours, theirs, keys)}")
        return True
    return not finished and target.is_dir() and any(target.iterdir())


def _difference(ours: dict, theirs: dict, keys: tuple[str, ...]) -> str:
    return ", ".join(
        f"{k} {ours.get(k)} here, {theirs.get(k)} there" for k in keys if not same(ours.get(k), theirs.get(k))
    )


def _take(kind: str, source: Path, target: Path, way: str, finished: bool) -> None:
    """Bring the files to ``target``, the one that others wait for last and with the time of now."""
    lock = FolderLock(target)
    held = lock.try_acquire()
    if held is not None:
        raise Refused(f"{held.owner or 'another process'} is at work in {target}")
    try:
        files = [path for path in sorted(source.rglob("*")) if path.is_file() and not _left_out(path)]
        files = [path for path in files if path.relative_to(source).as_posix() != LAST[kind]]
        for path in files:
            _bring(path, target / path.relative_to(source), way)
        if finished:
            lock.require()
            _bring(source / LAST[kind], target / LAST[kind], "copy")
            os.utime(target / LAST[kind])  # newer than the tokens, so that nothing is made again
            if kind == "runs":
                shutil.rmtree(target / "checkpoints", ignore_errors=True)
    finally:
        lock.release()
    if way == "move":
        shutil.rmtree(source)


def _left_out(path: Path) -> bool:
    return any(path.match(pattern) for pattern in LEFT_OUT) and path.name != ".metadata"


def _bring(path: Path, target: Path, way: str) -> None:
    """One file, under a temporary name first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if way == "link" and path.suffix != ".json":
            os.link(path, temporary)
        elif way == "move" and path.suffix != ".json" and path.stat().st_dev == target.parent.stat().st_dev:
            os.link(path, temporary)  # the source is removed when all is here
        else:
            shutil.copy2(path, temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _adopt_certificates(found: list, said: list[Adoption], results: Path, dry_run: bool) -> list[Adoption]:
    """The certificates that adopted runs name and that are not here: ``certificates/adopted-<digest>.json``."""
    taken = {one.name for one in said if one.kind == "runs" and one.state in (ADOPTED, WOULD, HERE)}
    known = {certificate_digest(read_json(path)) for path in (results / "certificates").glob("*.json")}
    rows = []
    for parent in {folder.parent.parent / "certificates" for kind, folder in found if folder.name in taken}:
        for path in sorted(parent.glob("*.json")):
            name = certificate_digest(read_json(path))
            if name in known:
                continue
            known.add(name)
            target = results / "certificates" / f"adopted-{name[:16]}.json"
            if not dry_run:
                _bring(path, target, "copy")
            rows.append(Adoption("certificates", target.stem, WOULD if dry_run else ADOPTED, f"was {path.name}"))
    return rows


def as_rows(said: list[Adoption]) -> list[dict]:
    """For JSON."""
    return [asdict(one) for one in said]
