"""The rule that decides: RMS-relative error of each named tensor, by float64 and by PyTorch in the same dtype.

A tensor passes if its error is at most the threshold of the dtype and at most FACTOR times the error of the PyTorch
reference in the same dtype plus SLACK. Where that reference itself misses the threshold, the tensor is ill-conditioned
in this case: then the second condition decides alone, and nothing above CEILING thresholds passes.

A tensor that vanishes, because what it is summed from cancels or because it is zero, has no relative error. It may be
off by SLACK times the scale of what it is summed from: its error is relative to ``noise_floor``, and the threshold
decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: largest RMS-relative error, by compute dtype
THRESHOLDS = {"float32": 2e-5, "bfloat16": 6e-3, "float16": 6e-3}
#: what rounding may add to twice the reference's error: 64 roundings of fp32 (2^-24), two
#: roundings to bf16 (1.7e-3 RMS each), five to fp16
SLACK = {"float32": 4e-6, "bfloat16": 3e-3, "float16": 1e-3}
#: a kernel's error may be this many times the reference's
FACTOR = 2.0
#: no error above this many thresholds passes, whatever the reference does
CEILING = 10.0


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def rms(x: Tensor) -> float:
    """Root mean square; 0 for an empty tensor."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def rms_error(x: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """rms(x - reference) / max(rms(reference), floor); infinite where x is not finite, 0 where both are 0."""
    difference = rms(x.to("cpu", torch.float64) - reference)
    if not math.isfinite(difference):
        return math.inf
    scale = max(rms(reference), floor)
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / scale


@dataclass(frozen=True)
class Check:
    """The verdict on one tensor; ``note`` says what else is to be known about it."""

    error: float
    threshold: float
    reference_error: float
    limit: float
    passed: bool
    ill_conditioned: bool = False
    note: str = ""

    def as_dict(self) -> dict:
        """For JSON: numbers of three digits, infinity as text."""
        entry = {
            "error": number(self.error),
            "threshold": self.threshold,
            "reference_error": number(self.reference_error),
            "limit": number(self.limit),
            "passed": self.passed,
        }
        if self.ill_conditioned:
            entry["ill_conditioned"] = True
        return entry | ({"note": self.note} if self.note else {})


def number(x: float) -> float | str:
    """Three digits; "inf" where JSON has no number."""
    return float(f"{x:.3g}") if math.isfinite(x) else "inf"


def judge(error: float, reference_error: float, dtype: str, note: str = "", vanishes: bool = False) -> Check:
    """The rule of this module on two errors."""
    threshold = THRESHOLDS[dtype]
    ill_conditioned = reference_error > threshold
    limit = FACTOR * reference_error + (threshold if vanishes else SLACK[dtype])
    limit = min(limit, CEILING * threshold if ill_conditioned else threshold)
    return Check(error, threshold, reference_error, limit, error <= limit, ill_conditioned, note)


def noise_floor(scale: float, dtype: str) -> float:
    """What the error of a tensor that vanishes is relative to, so that the threshold allows ``SLACK`` of ``scale``."""
    return SLACK[dtype] / THRESHOLDS[dtype] * scale
