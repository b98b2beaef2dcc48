"""Memory of a device while it trains: item by item, from a model's shape and how the run is laid over devices.

Parameters, gradients and AdamW's two moments are fp32 and sharded (ZeRO stage 3, Rajbhandari et al., 2020, section 5;
torch's FSDP2); what a block keeps for its backward pass is read off its operations, tensor by tensor; with activation
checkpointing (Chen et al., 2016) a block keeps its input alone. ``a`` is the size of an activation, 2 bytes in bf16.

Not counted: what the allocator loses to fragments, libraries' workspaces, the device's context, and temporary tensors
within an operation, other than those under "backward pass of a block" and "loss". `HEADROOM` is left for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from xlstm_scaling.accounting.counts import architecture, parts
from xlstm_scaling.accounting.dtypes import FP32_BYTES
from xlstm_scaling.accounting.layout import Layout
from xlstm_scaling.accounting.shapes import ModelShape

#: share of a device's memory that a plan may fill
HEADROOM = 0.9
#: logits and their gradients that the loss holds at once on a GPU (kernels/cross_entropy_triton.py)
LOGITS_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Memory:
    """Bytes on a device by item, and the layout that they are for."""

    layout: Layout
    items: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes of all items."""
        return sum(self.items.values())


# parameters


def root_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of the parameters outside of blocks."""
    table = (shape.vocab_size, shape.embedding_dim)
    return {"embedding.weight": table, "norm.weight": (shape.embedding_dim,), "head.weight": table}


def model_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of every parameter, as in the model."""
    entry = architecture(shape.arch)
    kinds = entry.kinds()
    blocks = {
        f"blocks.{index}.{name}": dimensions
        for index, one in enumerate(entry.block_shapes(shape))
        for name, dimensions in kinds[one.arch].block_parameters(one).items()
    }
    return root_parameters(shape) | blocks


def shard_rows(rows: int, degree: int, rank: int) -> int:
    """Rows of a parameter that a device holds of it: the first ones hold ceil(rows / degree), the last what is left."""
    each = -(-rows // degree)
    return max(0, min(each, rows - rank * each))


def shard_params(shape: ModelShape, degree: int, rank: int = 0) -> int:
    """Numbers of all parameters that a device holds (FSDP2 shards each parameter by its first dimension)."""
    return sum(shard_rows(rows, degree, rank) * math.prod(rest) for rows, *rest in model_parameters(shape).values())


# activations


def kept_activations(shape: ModelShape, context_length: int, layout: Layout) -> dict[str, float]:
    """Bytes by item that all blocks keep from their forward to their backward pass."""
    items: dict[str, float] = {}
    for part in parts(shape):
        for name, size in part.kind.kept_activations(part.shape, context_length, layout).items():
            items[name] = items.get(name, 0) + part.blocks * size
    return items


def loss_memory(shape: ModelShape, context_length: int, layout: Layout) -> float:
    """Bytes of the last norm and of the fused loss: gradients of the hidden states and of the head, made in the forward
    pass (``kernels/cross_entropy.py``). No logits but those of a few tokens."""
    M = layout.micro_batch_sequences * context_length
    table = shape.vocab_size * shape.embedding_dim
    a = layout.activation_bytes
    return a * M * shape.embedding_dim * 2 + FP32_BYTES * table


def _largest(sizes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By item the largest of several kinds of block."""
    largest: dict[str, float] = {}
    for items in sizes:
        for name, size in items.items():
            largest[name] = max(size, largest.get(name, 0))
    return largest


# all of it


def training_memory(shape: ModelShape, context_length: int, layout: Layout) -> Memory:
    """Bytes by item that a device needs at the peak of a step, as a sum: an upper bound of what is counted, as not all
    of it lives at once. The first device's, which holds the largest shards.

    Parameters are gathered in fp32: those outside of blocks from forward to backward, and two blocks, the one that
    computes and the one fetched ahead. Gradients that wait to be summed over devices: of two blocks and of the
    parameters outside; of all parameters where several micro-batches are summed first. Logits are gone when the
    backward pass begins.
    """
    own = shard_params(shape, layout.shard)
    kinds = parts(shape)
    sizes = [sum(map(math.prod, part.parameters.values())) for part in kinds]
    block, all_blocks = max(sizes), sum(part.blocks * size for part, size in zip(kinds, sizes))
    root = sum(math.prod(s) for s in root_parameters(shape).values())
    several = layout.devices > 1
    waiting = root + 2 * block if layout.micro_batches == 1 else root + all_blocks + block
    items = {
        "parameters": FP32_BYTES * own,
        "gradients": FP32_BYTES * own,
        "AdamW moments": 2 * FP32_BYTES * own,
        "gathered parameters": FP32_BYTES * (root + 2 * block) if several else 0,
        "gradients to reduce": FP32_BYTES * waiting if several else 0,
    }
    if layout.activation_checkpointing:
        largest = _largest(part.kind.kept_activations(part.shape, context_length, layout) for part in kinds)
        items["block input"] = shape.num_blocks * largest.pop("block input")
        items |= largest
    else:
        items |= kept_activations(shape, context_length, layout)
    a, M = layout.activation_bytes, layout.micro_batch_sequences * context_length
    table = shape.vocab_size * shape.embedding_dim
    logits = min(LOGITS_BYTES, (FP32_BYTES + a) * M * shape.vocab_size) + (a * table if a < FP32_BYTES else 0)
    # on a GPU the gradients of the hidden states are fp32
    items["loss"] = loss_memory(shape, context_length, layout) + (FP32_BYTES - a) * M * shape.embedding_dim
    backward = max(part.kind.backward_bytes(part.shape, context_length, layout) for part in kinds)
    items["backward pass of a block, or logits"] = max(backward, logits)
    return Memory(layout, items)


def micro_batch_sizes(rows: int) -> Iterator[int]:
    """Sequences of a micro-batch that need each number of passes but once: rows, about half of them, … 1."""
    seen = set()
    for passes in range(1, rows + 1):
        size = -(-rows // passes)
        if size not in seen:
            seen.add(size)
            yield size


@dataclass(frozen=True)
class MemoryPlan:
    """The most sequences at once that fit a device, without and with activation checkpointing; None where not even one
    does. ``chosen``: without it, if that fits, as it computes every forward pass once."""

    without: Memory | None
    checkpointed: Memory | None

    @property
    def chosen(self) -> Memory:
        """The one of the two to take."""
        return self.without or self.checkpointed


def plan_memory(
    shape: ModelShape,
    context_length: int,
    batch_sequences: int,
    devices: int,
    device_memory: float,
    shard: int | None = None,
    activation_bytes: int = 2,
    documents: bool = True,
) -> MemoryPlan:
    """The micro-batches with which a global batch fits devices of ``device_memory`` bytes; ``shard`` None = over all.

    Raises ValueError, with what is needed at least, where nothing fits; and on a batch smaller than the devices.
    """
    if batch_sequences < devices:
        raise ValueError(f"a batch of {batch_sequences} sequences leaves some of {devices} devices without any")
    rows, limit = -(-batch_sequences // devices), HEADROOM * device_memory
    found: dict[bool, Memory | None] = {}
    least: Memory | None = None
    for again in (False, True):
        found[again] = None
        for size in micro_batch_sizes(rows):
            layout = Layout(
                devices, shard or devices, size, -(-rows // size), again, activation_bytes, documents=documents
            )
            memory = training_memory(shape, context_length, layout)
            least = memory if least is None or memory.total < least.total else least
            if memory.total <= limit:
                found[again] = memory
                break
    if not any(found.values()):
        again = "on" if least.layout.activation_checkpointing else "off"
        raise ValueError(
            f"nothing fits: {devices} devices that shard over {shard or devices} need at least {least.total / 1e9:.1f} "
            f"GB each ({least.layout.micro_batch_sequences} sequences at once, activation checkpointing {again}), and "
            f"{HEADROOM:.0%} of {device_memory / 1e9:.1f} GB may be filled: take more devices, shard over more of "
            "them, or a shorter context"
        )
    return MemoryPlan(found[False], found[True])
