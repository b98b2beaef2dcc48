"""Peaks of devices, for rooflines: dense matrix products and memory bandwidth, by the vendors' data sheets.

Sources: NVIDIA A100 80GB SXM, H100 SXM, H200 SXM data sheets; NVIDIA HGX B200 (its sparse figures halved); AMD
Instinct MI300X data sheet. Rates are without sparsity. What a device reaches in practice is lower and is measured
where it matters (``benchmarks/kernels.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

#: share of a device's bf16 peak that training is assumed to reach where nothing was measured
ASSUMED_UTILISATION = 0.4


@dataclass(frozen=True)
class Device:
    """Peaks of one device: matrix products [FLOP/s] by dtype, memory bandwidth [B/s]; its memory [B], its power [W]
    and the last cache before the memory [B].

    ``tf32_flops_per_s`` is the rate of fp32 operands rounded to tf32; products that keep fp32's digits need three of
    them, or the rate in ``fp32_flops_per_s`` where that is faster.
    """

    name: str
    bf16_flops_per_s: float
    tf32_flops_per_s: float
    fp32_flops_per_s: float
    bytes_per_s: float
    memory_bytes: float = float("nan")
    power_w: float = float("nan")
    cache_bytes: float = float("nan")

    def flops_per_s(self, dtype: str) -> float:
        """Peak of products of ``dtype`` (bfloat16, float16, float32); ValueError names the known ones."""
        if dtype in ("bfloat16", "float16"):
            return self.bf16_flops_per_s
        if dtype == "float32":
            return max(self.tf32_flops_per_s / 3, self.fp32_flops_per_s)
        raise ValueError(f"no peak of {dtype!r}; known: bfloat16, float16, float32")

    def floor_s(self, flops: float, num_bytes: float, dtype: str = "bfloat16") -> float:
        """The least time [s] in which so many FLOPs and bytes can be done, products and transfers overlapping."""
        return max(flops / self.flops_per_s(dtype), num_bytes / self.bytes_per_s)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("A100", 312e12, 156e12, 19.5e12, 2.039e12, 80e9, 400, 40e6),
        Device("H100", 989.4e12, 494.7e12, 66.9e12, 3.35e12, 80e9, 700, 50e6),
        Device("H200", 989.4e12, 494.7e12, 66.9e12, 4.8e12, 141e9, 700, 50e6),
        Device("B200", 2250e12, 1125e12, 75e12, 8.0e12, 180e9, 1000, 126e6),
        Device("MI300X", 1307.4e12, 653.7e12, 163.4e12, 5.3e12, 192e9, 750, 256e6),
    )
}


def find_device(name: str) -> Device | None:
    """The device of which ``name`` (as a driver says it, e.g. "NVIDIA H100 80GB HBM3") contains the name, or None."""
    words = name.upper().replace("-", " ").replace("_", " ").split()
    return next((device for key, device in DEVICES.items() if key in words), None)
