"""How a run is carried out on this machine; nothing here changes its result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Execution:
    """``threads``: of the CPU. ``peak_flops``: of a device, that MFU is relative to, None = measured.

    ``micro_batch_sequences``: sequences in memory at once, None = all. ``prefetch_batches``: prepared ahead.
    ``certificate``: that must cover the kernels of the run. ``compile_cache``: where torch.compile keeps what it made,
    for other runs too; None = no compiling. ``shard``: none, full, or devices over which parameters are sharded.
    ``activation_checkpointing``: keep only the inputs of blocks for the backward pass. ``trackers``: tensorboard,
    wandb. ``trunk``: the folder of what the run shares with longer and shorter ones, None = nothing.
    """

    device: str = "cpu"
    threads: int = 1
    peak_flops: float | None = None
    micro_batch_sequences: int | None = None
    checkpoint_interval_s: float = 30.0
    prefetch_batches: int = 2
    progress: bool = True
    certificate: Path | None = None
    compile_cache: Path | None = None
    trackers: tuple[str, ...] = ()
    shard: str | int = "none"
    activation_checkpointing: bool = False
    trunk: Path | None = None


def measure_peak_flops(dtype: torch.dtype, device: str = "cpu", size: int = 768, seconds: float = 0.03) -> float:
    """FLOP/s of square matrix products in ``dtype`` on this device with the threads torch has now."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    end = time.perf_counter() + seconds
    for attempt in range(1000):
        start = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        if attempt:
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
        if attempt >= 3 and time.perf_counter() > end:
            break
    return best
