"""Checkpoints of runs on several devices: a folder to which each process writes its shards, read by any number of them.

``step-<n>.sharded/`` holds what ``torch.distributed.checkpoint`` writes (a file a process, ``.metadata``) and
``manifest.json``: what is no tensor, and size and sha256 of every file. It is written to another name, the manifest
last, and renamed. A folder may hold such checkpoints and files of one process side by side: a run goes on from either.
"""

from __future__ import annotations

import errno
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from xlstm_scaling.study.files import DiskFullError, digest, file_sha256, read_json, write_json_atomic
from xlstm_scaling.study.locks import LockLost
from xlstm_scaling.training.checkpoint import CheckpointError, CheckpointFolder, load_file, save_file
from xlstm_scaling.training.parallel import Parallel, is_sharded, whole

KIND = "sharded checkpoint of xlstm-scaling"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
#: how the names of folders end that are being written
PARTIAL = ".sharded.partial"


# tensors


def whole_state(state: Any, parallel: Parallel) -> Any:
    """Nested dicts and lists with their sharded tensors gathered, on the host; empty tensors on all but process 0."""
    if parallel.world == 1:
        return state
    if isinstance(state, Mapping):
        return {key: whole_state(value, parallel) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole_state(value, parallel) for value in state]
    if isinstance(state, Tensor):
        gathered = whole(state)
        return gathered.detach().cpu() if parallel.leader else torch.empty(0)
    return state


def set_whole(weights: dict, optimizer_state: dict, model: nn.Module, optimizer: Optimizer) -> None:
    """Lay the whole state of one process's checkpoint over the devices, as the model's parameters are."""
    own = model.state_dict()
    with torch.no_grad():
        for name, value in weights.items():
            _local(own[name]).copy_(_local(_like(value, own[name])))
    parameters = _parameters(optimizer)
    state = {
        index: {key: _like(value, parameters[index]) for key, value in values.items()}
        for index, values in optimizer_state["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _like(value: Tensor, sharded: Tensor) -> Tensor:
    """``value``, which every process has, with the layout of ``sharded``; a scalar stays whole."""
    from torch.distributed.tensor import distribute_tensor

    if not is_sharded(sharded) or value.dim() == 0:
        return value.to(sharded.device)
    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """In the order in which the optimiser's state counts them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _tensors(model: nn.Module, optimizer_state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor of a run by a name that does not depend on the devices."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, values in optimizer_state.items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    return tensors


def write_tensors(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Every process writes its shards. Raises DiskFullError or CheckpointError on all processes alike."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(folder, sync_files=True)
    try:
        dcp.save(_tensors(model, optimizer.state_dict()["state"]), storage_writer=writer)
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e, _ in error.failures.values()):
            raise DiskFullError(
                errno.ENOSPC, f"disk full while writing {folder}: free some space in {folder.parent} and run again"
            ) from None
        raise CheckpointError(f"process {rank} could not write {folder}: {cause}") from None


def read_tensors(folder: Path, model: nn.Module, optimizer: Optimizer, parallel: Parallel) -> None:
    """Read the shards that this process's parameters need, from however many were written."""
    import torch.distributed.checkpoint as dcp

    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for name in read_json(folder / MANIFEST)["tensors"]:
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            parameter = parameters[int(index)]
            scalar = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.setdefault(int(index), {})[key] = scalar if key == "step" else torch.zeros_like(parameter)
    tensors = {name: value.detach() for name, value in _tensors(model, state).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=parallel.world == 1)
        except dcp.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"process {rank} could not read {folder}: {cause}") from None
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# folders


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint says of itself. Raises CheckpointError for a foreign, newer, torn or altered one."""
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST} (incomplete or foreign folder)") from None
    except ValueError:
        raise CheckpointError(f"{folder / MANIFEST} is truncated or altered") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise CheckpointError(f"{folder} is not a sharded checkpoint of this program")
    if manifest.get("format", 0) > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {manifest['format']}, newer than {FORMAT_VERSION}: update the program"
        )
    expected = manifest.pop("digest", None)
    if expected != digest(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is truncated or altered: its digest does not match")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], parallel: Parallel) -> list[str]:
    """What is wrong with the files of a sharded checkpoint; the processes share the reading."""
    problems = []
    for name in sorted(manifest["files"])[parallel.rank :: parallel.world]:
        path, entry = folder / name, manifest["files"][name]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            problems.append(f"{path} is truncated or altered: its digest does not match")
    return [problem for said in parallel.gather(problems) for problem in said]


class Checkpoints(CheckpointFolder):
    """The checkpoints of one run, of one process (``step-<n>.ckpt``) or several (``step-<n>.sharded``)."""

    pattern = re.compile(r"^step-(\d+)\.(ckpt|sharded)$")

    def __init__(self, folder: Path, parallel: Parallel, keep: int = 2) -> None:
        super().__init__(folder, keep)
        self.parallel = parallel

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """One process's checkpoint."""
        path = self.folder / f"step-{step}.ckpt"
        save_file(path, content, self.before_rename)
        self._prune()
        return path

    def save_sharded(self, step: int, model: nn.Module, optimizer: Optimizer, plain: dict[str, Any]) -> Path:
        """Every process's shards, and ``plain`` values. Raises DiskFullError or CheckpointError on all processes."""
        path = self.folder / f"step-{step}.sharded"
        temporary = self.folder / f".step-{step}{PARTIAL}"
        self._together(self._prepare, temporary)
        self._together(write_tensors, temporary, model, optimizer)
        files = {name: entry for said in self._together(self._own_files, temporary) for name, entry in said.items()}
        names = list(_tensors(model, optimizer.state_dict()["state"]))
        self._together(self._commit, temporary, path, plain, names, files)
        return path

    def _together(self, function: Callable, temporary: Path, *arguments: Any) -> list[Any]:
        """What ``function`` returns on each process; an error of one is raised on all and leaves nothing behind."""
        outcome, problem = None, None
        try:
            outcome = function(temporary, *arguments)
        except (OSError, CheckpointError, LockLost) as error:
            problem = error
        said = self.parallel.gather((outcome, problem))
        problem = next((problem for _, problem in said if problem is not None), None)
        if problem is not None:
            if self.parallel.leader:
                shutil.rmtree(temporary, ignore_errors=True)
            raise problem
        return [outcome for outcome, _ in said]

    def _prepare(self, temporary: Path) -> None:
        if self.parallel.leader:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)

    def _own_files(self, folder: Path) -> dict[str, dict]:
        """Size and digest of the files that this process wrote."""
        rank = self.parallel.rank
        own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
        return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in own}

    def _commit(self, temporary: Path, path: Path, plain: dict, names: list[str], files: dict[str, dict]) -> None:
        """Process 0 writes the manifest and gives the folder its name."""
        if not self.parallel.leader:
            return
        manifest = {"kind": KIND, "format": FORMAT_VERSION, "world": self.parallel.world, "plain": plain}
        manifest |= {"tensors": names, "files": files}
        write_json_atomic(temporary / MANIFEST, manifest | {"digest": digest(manifest)})
        if self.before_rename is not None:
            self.before_rename()
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        self._prune()

    def _prune(self) -> None:
        for old in self.paths()[: -self.keep]:
            _remove(old)

    def load_latest(self, identity: str) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest usable checkpoint of this run (None if there is none), and what was wrong with newer ones.

        Of a sharded one its plain values, and its folder as ``tensors``. All processes get the same.
        """
        self._sweep()
        problems = []
        for path in reversed(self.parallel.share(self.paths())):
            content, wrong = self._load(path)
            said = [text for text in self.parallel.gather(wrong) if text]
            if said:
                problems.append(said[0])
            elif content.get("identity") != identity:
                problems.append(f"{path} belongs to another run or other tokens; it is ignored")
            else:
                return content, problems
        return None, problems

    def _load(self, path: Path) -> tuple[dict[str, Any], str]:
        """Content, or what is wrong."""
        if path.suffix == ".ckpt":
            try:
                return load_file(path), ""
            except (CheckpointError, OSError, RuntimeError) as error:
                return {}, str(error)
        manifest, wrong = None, ""
        try:
            manifest = read_manifest(path)
        except (CheckpointError, OSError) as error:
            wrong = str(error)
        if any(self.parallel.gather(wrong)):
            return {}, wrong
        problems = check_files(path, manifest, self.parallel)
        return manifest["plain"] | {"tensors": path}, "; ".join(problems)

    def _sweep(self) -> None:
        """Remove what killed processes were writing."""
        if self.parallel.leader:
            for partial in self.folder.glob(f".step-*{PARTIAL}"):
                shutil.rmtree(partial, ignore_errors=True)

    def clear(self) -> None:
        """Remove all of them."""
        self._sweep()
        if self.parallel.leader:
            for path in self.paths():
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        # without its manifest it counts no more, should this be interrupted
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink()
