"""Memory of a device while it trains: item by item, from a model's shape and how the run is laid over devices.

Parameters, gradients and AdamW's two moments are fp32 and sharded (ZeRO stage 3, Rajbhandari et al., 2020, section 5;
torch's FSDP2); what a block keeps for its backward pass is read off its operations, tensor by tensor; with activation
checkpointing (Chen et al., 2016) a block keeps its input alone. ``a`` is the size of an activation, 2 bytes in bf16.

Not counted: what the allocator loses to fragments, libraries' workspaces, the device's context, and temporary tensors
within an operation, other than those under "backward pass of a block" and "loss". `HEADROOM` is left for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from xlstm_scaling.accounting.shapes import ModelShape

FP32 = 4
#: share of a device's memory that a plan may fill
HEADROOM = 0.9
#: logits and their gradients that the loss holds at once on a GPU (kernels/cross_entropy_triton.py)
LOGITS_BYTES = 256 * 1024**2
#: fp32 numbers that the gates keep for each token of each head: soft-capped i and f, their sums, m and normalisers
GATE_NUMBERS = 8


@dataclass(frozen=True)
class Layout:
    """How a run is laid over ``devices``: each parameter over ``shard`` of them, ``micro_batches`` passes a step of
    ``micro_batch_sequences`` sequences each on every device.

    ``activation_bytes``: of an activation, 2 or 4. ``chunk_tokens``: tokens between two states of the mLSTM that are
    kept, None = what the GPU's kernels choose; their numbers have ``state_bytes``, None = those of an activation.
    ``documents``: batches hold several documents, so that attention needs a mask.
    """

    devices: int = 1
    shard: int = 1
    micro_batch_sequences: int = 1
    micro_batches: int = 1
    activation_checkpointing: bool = False
    activation_bytes: int = 2
    chunk_tokens: int | None = None
    state_bytes: int | None = None
    documents: bool = True

    def __post_init__(self) -> None:
        if min(self.devices, self.shard, self.micro_batch_sequences, self.micro_batches) < 1:
            raise ValueError("devices, shard, micro-batches and their sequences must be at least 1")
        if self.devices % self.shard:
            raise ValueError(f"parameters cannot be sharded over {self.shard} of {self.devices} devices")
        if self.activation_bytes not in (2, 4):
            raise ValueError(f"activations have 2 or 4 bytes, not {self.activation_bytes}")


@dataclass(frozen=True)
class Memory:
    """Bytes on a device by item, and the layout that they are for."""

    layout: Layout
    items: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.items.values())


# parameters


def block_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of every parameter of one block, as in the model. ValueError for an unknown architecture."""
    d, H, F = shape.embedding_dim, shape.num_heads, shape.ffn_dim
    qkv, v = H * (2 * shape.head_dim_qk + shape.head_dim_v), H * shape.head_dim_v
    ffn = {"ffn_norm.weight": (d,), "ffn.gate_up.weight": (2 * F, d), "ffn.down.weight": (d, F)}
    if shape.arch == "xlstm":
        return {
            "mlstm_norm.weight": (d,),
            "mlstm.qkv.weight": (qkv, d),
            "mlstm.output_gate.weight": (v, d),
            "mlstm.gates.weight": (2 * H, d),
            "mlstm.gates.bias": (2 * H,),
            "mlstm.norm.weight": (v,),
            "mlstm.out.weight": (d, v),
            **ffn,
        }
    if shape.arch == "transformer":
        attention = {"attention.qkv.weight": (qkv, d), "attention.out.weight": (d, v)}
        return {"attention_norm.weight": (d,), **attention, **ffn}
    raise ValueError(f"no memory of architecture {shape.arch!r}; known: xlstm, transformer")


def root_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of the parameters outside of blocks."""
    table = (shape.vocab_size, shape.embedding_dim)
    return {"embedding.weight": table, "norm.weight": (shape.embedding_dim,), "head.weight": table}


def shard_rows(rows: int, degree: int, rank: int) -> int:
    """Rows of a parameter that a device holds of it: the first ones hold ceil(rows / degree), the last what is left."""
    each = -(-rows // degree)
    return max(0, min(each, rows - rank * each))


def shard_params(shape: ModelShape, degree: int, rank: int = 0) -> int:
    """Numbers of all parameters that a device holds (FSDP2 shards each parameter by its first dimension)."""
    return shape.num_blocks * _held(block_parameters(shape), degree, rank) + _held(root_parameters(shape), degree, rank)


def _held(dimensions: dict[str, tuple[int, ...]], degree: int, rank: int) -> int:
    return sum(shard_rows(rows, degree, rank) * math.prod(rest) for rows, *rest in dimensions.values())


# activations


def block_activations(shape: ModelShape, context_length: int, layout: Layout) -> dict[str, float]:
    """Bytes by item that one block keeps from its forward to its backward pass; M tokens of a micro-batch.

    Linear layers keep their input and, where they compute in another dtype, their weights in that dtype; norms their
    input; the gated activation of the feed-forward its input (``kernels/``: what each ``save_for_backward`` names).
    """
    a, d, F, H = layout.activation_bytes, shape.embedding_dim, shape.ffn_dim, shape.num_heads
    B, T = layout.micro_batch_sequences, context_length
    M, v = B * T, shape.num_heads * shape.head_dim_v
    qkv = H * (2 * shape.head_dim_qk + shape.head_dim_v)
    linear = sum(math.prod(s) for name, s in block_parameters(shape).items() if len(s) == 2 and "gates" not in name)
    items = {
        "block input": a * M * d,
        "norms": a * M * 3 * d,  # both outputs, and the input of the second
        "feed-forward": a * M * 3 * F,
        "weights in bf16": a * linear if a < FP32 else 0,
    }
    if shape.arch == "xlstm":
        L = layout.chunk_tokens or gpu_chunk_tokens(shape)
        state = (layout.state_bytes or a) * shape.head_dim_qk * shape.head_dim_v + FP32 * shape.head_dim_qk
        gates_input = FP32 * M * d if a < FP32 else 0
        return items | {
            "mLSTM": a * M * (qkv + 3 * v),  # q, k, v; h, output gate, gated output
            "gates": gates_input + FP32 * M * H * GATE_NUMBERS,
            "mLSTM states": B * H * (-(-T // L) + 1) * state,
        }
    rotary = (4 if a < FP32 else 2) * a * T * shape.head_dim_v  # cos and sin; rounded for q and for k
    return items | {
        # q, k and v as projected, which v keeps; q and k rotated; the output
        "attention": a * M * (qkv + 2 * H * shape.head_dim_qk + v) + rotary,
        "log-sum-exp": FP32 * M * H,
        "attention mask": a * B * T**2 if layout.documents else 0,
    }


def gpu_chunk_tokens(shape: ModelShape) -> int:
    """Tokens between two states that the Triton kernels keep (kernels/mlstm/chunkwise_triton.py), unless tuned."""
    return 256 if shape.head_dim_qk * shape.head_dim_v >= 128 * 128 else 128


def loss_memory(shape: ModelShape, context_length: int, layout: Layout) -> float:
    """Bytes of the last norm and of the fused loss: gradients of the hidden states and of the head, made in the forward
    pass (``kernels/cross_entropy.py``). No logits but those of a few tokens."""
    M = layout.micro_batch_sequences * context_length
    table = shape.vocab_size * shape.embedding_dim
    a = layout.activation_bytes
    return a * M * shape.embedding_dim * 2 + FP32 * table


def _backward_memory(shape: ModelShape, context_length: int, layout: Layout) -> float:
    """Gradients of activations that live at once in the backward pass of a block: those around the feed-forward's
    activation and of the residual stream, or around sequence mixing, whichever is more. An estimate."""
    a, M, d = layout.activation_bytes, layout.micro_batch_sequences * context_length, shape.embedding_dim
    v = shape.num_heads * shape.head_dim_v
    qkv = shape.num_heads * (2 * shape.head_dim_qk + shape.head_dim_v)
    mixing = a * M * (qkv + 2 * v + 2 * d)
    if shape.arch == "xlstm":  # of the states, and of the gates' input
        mixing += block_activations(shape, context_length, layout)["mLSTM states"]
        mixing += FP32 * M * d if a < FP32 else 0
    return max(a * M * (3 * shape.ffn_dim + 2 * d), mixing)


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
    block = sum(math.prod(s) for s in block_parameters(shape).values())
    root = sum(math.prod(s) for s in root_parameters(shape).values())
    several = layout.devices > 1
    waiting = root + 2 * block if layout.micro_batches == 1 else root + shape.num_blocks * block + block
    kept = block_activations(shape, context_length, layout)
    blocks = shape.num_blocks
    items = {
        "parameters": FP32 * own,
        "gradients": FP32 * own,
        "AdamW moments": 2 * FP32 * own,
        "gathered parameters": FP32 * (root + 2 * block) if several else 0,
        "gradients to reduce": FP32 * waiting if several else 0,
    }
    if layout.activation_checkpointing:
        items["block input"] = blocks * kept["block input"]
        items |= {name: size for name, size in kept.items() if name != "block input"}
    else:
        items |= {name: blocks * size for name, size in kept.items()}
    a, M = layout.activation_bytes, layout.micro_batch_sequences * context_length
    table = shape.vocab_size * shape.embedding_dim
    logits = min(LOGITS_BYTES, (FP32 + a) * M * shape.vocab_size) + (a * table if a < FP32 else 0)
    # on a GPU the gradients of the hidden states are fp32
    items["loss"] = loss_memory(shape, context_length, layout) + (FP32 - a) * M * shape.embedding_dim
    items["backward pass of a block, or logits"] = max(_backward_memory(shape, context_length, layout), logits)
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
