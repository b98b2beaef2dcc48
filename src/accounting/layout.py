"""How a training run is laid over devices: what its memory depends on besides the shape."""

from __future__ import annotations

from dataclasses import dataclass

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
