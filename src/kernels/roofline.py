"""The roofline of each operation on paper: FLOPs, bytes, and the least time a device needs for them.

mLSTM counts are the accounting module's: ``tfla`` FLOPs and the bytes of a two-pass chunkwise kernel; a backward pass
costs twice its forward, in FLOPs and in bytes (each of its two recurrences and its parallel part reads and writes
what the forward's does, for three gradients instead of one output). FLOPs that are compared between implementations
are always counted at chunks of ``COUNTED_CHUNK`` tokens, whatever chunks an implementation works in; a floor is the
least over the chunk lengths of ``FLOOR_CHUNKS``, since longer chunks trade products for states in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from xlstm_scaling.accounting import ModelShape, architecture, count_flops
from xlstm_scaling.accounting.hardware import DEVICES, Device
from xlstm_scaling.kernels.problems import Problem

COUNTED_CHUNK = 64
FLOOR_CHUNKS = (64, 128, 256, 512)
#: the accounting's scalar factor of a norm, per element
NORM_FLOPS = 3
FP32_BYTES = 4


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one call; ``chunk`` [tokens] that they are counted at, 0 where there are no chunks."""

    flops: float
    num_bytes: float
    chunk: int = 0

    def __mul__(self, factor: float) -> Work:
        return Work(factor * self.flops, factor * self.num_bytes, self.chunk)

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.num_bytes


def mlstm_shape(H: int, d_qk: int, d_v: int, chunk: int = COUNTED_CHUNK) -> ModelShape:
    """One mLSTM layer as the accounting module sees it; what is no mixing does not matter here."""
    return ModelShape(
        arch="xlstm", embedding_dim=H * d_v, num_blocks=1, num_heads=H, head_dim_qk=d_qk, head_dim_v=d_v, ffn_dim=1,
        vocab_size=1, chunk_size=chunk,
    )  # fmt: skip


def chunkwise_work(problem: Problem, chunk: int = COUNTED_CHUNK) -> Work:
    """Forward of the mLSTM in chunks of ``chunk`` tokens; states lie in memory in the dtype of the activations."""
    s, act = problem.size, problem.dtype.itemsize
    shape = mlstm_shape(s["H"], s["d_qk"], s["d_v"], chunk)
    flops = count_flops(shape, s["T"], "tfla").sequence_mixing
    moved = architecture("xlstm").block_prefill_mixing_bytes(shape, s["T"], act, act)
    return Work(flops, moved, chunk) * s["B"]


def work(problem: Problem, backward: bool | None = None, chunk: int = COUNTED_CHUNK) -> Work:
    """FLOPs and bytes of one call of a problem; with its backward by default where it has one.

    Linear cross entropy: products of the head (2 M d V), three times with gradients; hidden and weights are read once
    for each product that needs them, gradients written once, and logits never reach memory. Norms, gates and
    activations: every input read and every output written once, 3 FLOPs an element. ValueError names an operation
    that has no roofline.
    """
    backward = problem.backward if backward is None else backward
    s, act = problem.size, problem.dtype.itemsize
    if (problem.op, problem.form) == ("mlstm", "chunkwise"):
        return chunkwise_work(problem, chunk) * (3 if backward else 1)
    if (problem.op, problem.form) == ("mlstm", "step"):
        shape, entry = mlstm_shape(s["H"], s["d_qk"], s["d_v"]), architecture("xlstm")
        moved = entry.block_step_mixing_bytes(shape, 0, act, FP32_BYTES)
        return Work(entry.block_step_mixing_flops(shape, 0), moved) * s["B"]
    if problem.op == "linear_cross_entropy":
        M, d, V = s["M"], s["d"], s["V"]
        flops, moved = 2 * M * d * V, act * M * d + FP32_BYTES * V * d + 8 * M
        if backward:  # hidden again for the weights' gradient, weights again for the hidden's
            flops, moved = 3 * flops, 2 * moved + act * M * d + FP32_BYTES * V * d
        return Work(flops, moved)
    if problem.op in ELEMENTWISE:
        elements, reads, writes, grad_reads, grad_writes = ELEMENTWISE[problem.op](s)
        moved, passes = reads + writes, 1
        if backward:
            moved, passes = moved + grad_reads + grad_writes, 3
        return Work(passes * NORM_FLOPS * elements, act * moved)
    raise ValueError(f"no roofline of {problem.op}/{problem.form}")


def _rms_norm(s: dict[str, int]) -> tuple[int, int, int, int, int]:
    n = s["M"] * s["d"]
    return n, 2 * n, 2 * n, 3 * n, n  # x, residual -> y, sum; dy, d sum, sum -> one gradient for both


def _head_norm_gate(s: dict[str, int]) -> tuple[int, int, int, int, int]:
    n = s["B"] * s["T"] * s["H"] * s["d_v"]
    return n, 2 * n, n, 3 * n, 2 * n  # h, gate -> y; dy, h, gate -> dh, d gate


def _gated_silu(s: dict[str, int]) -> tuple[int, int, int, int, int]:
    n = s["M"] * s["F"]
    return n, 2 * n, n, 3 * n, 2 * n  # gate, up -> y; dy, gate, up -> d gate, d up


#: (elements, read, written, read by the backward, written by it); weights and statistics are nothing beside them
ELEMENTWISE = {"rms_norm": _rms_norm, "head_norm_gate": _head_norm_gate, "gated_silu": _gated_silu}


def floor_s(problem: Problem, device: Device, backward: bool | None = None) -> tuple[float, Work]:
    """The least time [s] of a problem on a device and the work it was computed from."""
    chunks = FLOOR_CHUNKS if problem.form == "chunkwise" else (COUNTED_CHUNK,)
    dtype = str(problem.dtype).removeprefix("torch.")
    options = [work(problem, backward, chunk) for chunk in chunks]
    return min(((device.floor_s(w.flops, w.num_bytes, dtype), w) for w in options), key=lambda pair: pair[0])


def attention_flops(B: int, T: int, heads: int, head_dim: int, backward: bool) -> float:
    """FLOPs of causal attention, the paper's convention (half the square)."""
    shape = ModelShape(
        arch="transformer", embedding_dim=heads * head_dim, num_blocks=1, num_heads=heads, head_dim_qk=head_dim,
        head_dim_v=head_dim, ffn_dim=1, vocab_size=1,
    )  # fmt: skip
    return B * (3 if backward else 1) * count_flops(shape, T, "paper").sequence_mixing


def table(problems: list[Problem], devices: list[Device] | None = None) -> list[dict[str, object]]:
    """Rows of the paper roofline: problem, pass, FLOPs, bytes, FLOPs per byte, and a floor [ms] per device."""
    devices = [DEVICES["H100"], DEVICES["H200"]] if devices is None else devices
    rows = []
    for problem in problems:
        for backward in (False, True) if problem.backward else (False,):
            counted = work(problem, backward)
            row: dict[str, object] = {
                "problem": problem.name, "pass": "forward + backward" if backward else "forward",
                "flops": counted.flops, "bytes": counted.num_bytes, "flops_per_byte": counted.intensity,
            }  # fmt: skip
            for device in devices:
                row[f"floor_ms_{device.name}"] = 1e3 * floor_s(problem, device, backward)[0]
            rows.append(row)
    return rows
