"""Training on several devices: the rows each reads, how the model is laid over them, what they agree on.

A process a device, started by torchrun. Every parameter is sharded over ``shard`` devices and replicated over the rest
(torch's FSDP2; Zhao et al., 2023). Losses are weighted by their share of the global batch and gradients are summed, so
that neither the number of devices nor how rows fall on them changes a step by more than rounding.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xlstm_scaling.models.language_model import LanguageModel
from xlstm_scaling.models.layers import HeadNormGate, RMSNorm

if TYPE_CHECKING:  # FSDP takes a second to import, which one device has no use for
    from torch.distributed.device_mesh import DeviceMesh


class ParallelError(ValueError):
    """Devices that cannot train together as asked; the message says what to change."""


def shard_degree(shard: str | int, world: int) -> int:
    """Devices over which each parameter is sharded: ``none`` 1, ``full`` all, or a number that divides them.

    Raises ParallelError.
    """
    degree = {"none": 1, "full": world}.get(shard, shard)
    if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
        raise ParallelError(f"hardware.shard must be none, full or a number of devices, got {shard!r}")
    if world % degree:
        raise ParallelError(f"hardware.shard = {degree} does not divide the {world} devices of the run")
    return degree


@functools.cache
def _mesh(device_type: str, world: int, degree: int) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    if degree == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // degree, degree), mesh_dim_names=("replicate", "shard"))


def _join(device_type: str, local_rank: int) -> None:
    """Enter the process group that torchrun's environment describes, once a process."""
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ParallelError(
                f"process {local_rank} of this node has no GPU of its own, there are {torch.cuda.device_count()}: "
                "lower torchrun's --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    if dist.is_initialized():
        return
    device = torch.device("cuda", local_rank) if device_type == "cuda" else None
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", device_id=device)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Parallel:
    """This process among the ``world`` that train a run; without torchrun the only one, which needs no process group.

    ``rank``: of this process; ``local_rank``: on its node; ``degree``: devices over which a parameter is sharded.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    degree: int = 1
    device_type: str = "cpu"

    @classmethod
    def start(cls, device: str, shard: str | int = "none") -> Parallel:
        """This process's place by torchrun's environment; joins the others. Raises ParallelError."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        degree = shard_degree(shard, world) if world > 1 else 1
        if world == 1:
            return cls(device_type=device.split(":")[0])
        if not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
            raise ParallelError("WORLD_SIZE is set, but not by torchrun: start the command with torchrun, or unset it")
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        parallel = cls(rank, world, local_rank, degree, device.split(":")[0])
        _join(parallel.device_type, local_rank)
        if not parallel.leader:
            logging.getLogger("xlstm_scaling").setLevel(logging.ERROR)
        return parallel

    @property
    def leader(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    # rows

    def rows(self, count: int) -> slice:
        """This process's rows of ``count``, as even as it goes; the first one, for no share, where it has none."""
        each, more = divmod(count, self.world)
        first = self.rank * each + min(self.rank, more)
        own = each + (self.rank < more)
        return slice(first, first + own) if own else slice(0, 1)

    def parts(self, count: int, at_once: int) -> Iterator[tuple[slice, int]]:
        """Micro-batches of this process's ``rows(count)``, ``at_once`` rows at most, and how many rows each counts.

        As many on every process, as all take part in every pass: one that has run out of rows reads its first again,
        for 0 rows.
        """
        each, more = divmod(count, self.world)
        own, most = each + (self.rank < more), each + (more > 0)
        for first in range(0, most, at_once):
            counted = max(0, min(at_once, own - first))
            yield (slice(first, first + counted) if counted else slice(0, 1)), counted

    # what the processes tell each other

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place: the same bits on each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """What process 0 says."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process says, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def require_same(self, what: str, value: Any) -> None:
        """Raise ParallelError on all processes unless all say the same."""
        values = self.gather(value)
        if any(other != value for other in values):
            other = next(rank for rank, said in enumerate(values) if said != values[0])
            raise ParallelError(f"{what} differs between processes 0 and {other}: do all nodes see the same files?")

    def use_device(self) -> None:
        """Make this process's GPU the current one of the calling thread."""
        if self.world > 1 and self.device_type == "cuda":
            torch.cuda.set_device(self.local_rank)

    # the model

    @property
    def mesh(self) -> DeviceMesh:
        """The devices by (replica, shard), or by shard alone."""
        return _mesh(self.device_type, self.world, self.degree)

    def materialise(self, model: LanguageModel, seed: int | None) -> LanguageModel:
        """Initialise a model that was built on the meta device and lay it over the devices.

        The weights are those of one device with this seed. A process holds one whole block at a time, and the
        embedding and the head, on the host.
        """
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        for part in (model.embedding, model.norm, model.head):
            _allocate(part)

        @contextmanager
        def laid_out(block: nn.Module) -> Iterator[None]:
            _allocate(block)
            yield
            self._lay_out(block)

        model.reset_parameters(seed, laid_out)
        self._lay_out(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # sums, not means: losses are weighted by their share of the batch
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "loss")
        return model

    def _lay_out(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        # embedding and head stay whole from the first block's forward to its backward
        fully_shard(module, mesh=self.mesh, reshard_after_forward=not isinstance(module, LanguageModel))

    def release(self, model: nn.Module) -> None:
        """Free what a forward pass without a backward pass leaves whole."""
        if self.world > 1:
            model.reshard()

    def reduce_gradients(self, model: nn.Module, now: bool) -> None:
        """Whether the next backward pass sums gradients over the processes, or keeps them for a later one to."""
        if self.world > 1:
            model.set_requires_gradient_sync(now)


def _allocate(module: nn.Module) -> None:
    """Memory on the host for a module of the meta device; norms, which no initialisation touches, become one."""
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, RMSNorm | HeadNormGate):
            nn.init.ones_(part.weight)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is laid over devices (a DTensor)."""
    return hasattr(tensor, "full_tensor")
