"""The cases of the norms and of the gated activation: odd widths, one row, small and large values, strided inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from xlstm_scaling.kernels.certification.operation import Case, Operation, Placed
from xlstm_scaling.kernels.registry import get_kernel


class _Elementwise(Operation):
    """Compared with the form ``reference`` of PyTorch, which also runs in float64."""

    def reference(self, case: Case) -> Callable:
        return get_kernel(self.name, "reference", "torch")

    def yardstick(self, form: str) -> Callable:
        return get_kernel(self.name, "reference", "torch")


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rms_norm(name: str, *shape: int, residual: bool = True, size: float = 1.0, **flags: bool | str) -> Case:
    """``size``: of x and of the residual; far below 1e-3 the eps of the norm counts."""
    cotangents = flags.pop("cotangents", ("y", "sum") if residual else ("y",))
    return Case(name, {"shape": shape, "residual": residual, "size": size, "cotangents": cotangents}, **flags)


class RMSNorm(_Elementwise):
    """x (..., d), weight (d,) fp32, residual like x or None -> y, or y and the sum."""

    name = "rms_norm"
    outputs = ("y", "sum")
    gradients = ("x", "weight", "residual")
    low = frozenset({"x", "residual", "y", "sum"})
    cases = (
        _rms_norm("with a residual", 3, 37, 48, quick=True),
        _rms_norm("without a residual", 3, 37, 48, residual=False, quick=True),
        _rms_norm("odd width", 130, 37, quick=True),
        _rms_norm("one row", 1, 1, 20, residual=False),
        _rms_norm("the sum is not used", 64, 96, cotangents=("y",)),
        _rms_norm("the norm is not used", 64, 96, cotangents=("sum",)),
        _rms_norm("values below the square root of eps", 50, 64, size=3e-4),
        _rms_norm("large values", 50, 64, size=300.0),
        _rms_norm("wide", 70, 4096, interpreted=False),
        _rms_norm("wider than a block", 3, 9001, interpreted=False),
        _rms_norm("many rows", 4, 2048, 4096, device="cuda", interpreted=False),
    )

    def draw(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        s = case.settings
        x = {"x": s["size"] * _normal(generator, *s["shape"])}
        x["weight"] = 1 + 0.3 * _normal(generator, s["shape"][-1])
        if s["residual"]:
            x["residual"] = s["size"] * _normal(generator, *s["shape"])
        return x

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        s = case.settings
        return dict.fromkeys(("y", "sum") if s["residual"] else ("y",), s["shape"])

    def cotangent_names(self, case: Case) -> tuple[str, ...]:
        return case.settings["cotangents"]

    def call(self, function: Callable, form: str, x: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
        if not case.settings["residual"]:
            return {"y": function(x["x"], x["weight"])}
        return dict(zip(("y", "sum"), function(x["x"], x["weight"], x["residual"])))


def _head_norm(name: str, B: int, T: int, H: int, d_v: int, size: float = 1.0, **flags: bool | str) -> Case:
    strided = flags.pop("strided", True)
    return Case(name, {"shape": (B, T, H, d_v), "size": size, "strided": strided}, **flags)


class HeadNormGate(_Elementwise):
    """h (B, T, H, d_v), gate (B, T, H d_v), weight (H d_v,) fp32 -> y (B, T, H d_v)."""

    name = "head_norm_gate"
    outputs = ("y",)
    gradients = ("h", "gate", "weight")
    low = frozenset({"h", "gate", "y"})
    cases = (
        _head_norm("strided, odd length", 2, 37, 2, 48, quick=True),
        _head_norm("contiguous", 2, 37, 3, 32, strided=False, quick=True),
        _head_norm("one head", 2, 33, 1, 40, quick=True),
        _head_norm("odd narrow heads", 1, 51, 4, 20),
        _head_norm("one token", 3, 1, 2, 32),
        _head_norm("values below the square root of eps", 2, 33, 2, 32, size=3e-4),
        _head_norm("heads of 512", 1, 70, 2, 512, interpreted=False),
        _head_norm("heads of 256, many tokens", 4, 4096, 8, 256, device="cuda", interpreted=False),
    )

    def draw(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        B, T, H, d_v = case.settings["shape"]
        h = case.settings["size"] * (0.3 + _normal(generator, B, T, H, d_v))
        gate = 2 * _normal(generator, B, T, H * d_v)
        return {"h": h, "gate": gate, "weight": 1 + 0.3 * _normal(generator, H * d_v)}

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        B, T, H, d_v = case.settings["shape"]
        return {"y": (B, T, H * d_v)}

    def place(self, x: Mapping[str, Tensor], case: Case) -> Placed:
        """h comes from the cell as a transposed (B, H, T, d_v)."""
        placed = Placed()
        for name, value in x.items():
            view = None
            if name == "h" and case.settings["strided"]:
                B, T, H, d_v = value.shape
                view = placed.room((B, H, T, d_v), value).transpose(1, 2)
            placed.put(name, value, view)
        return placed

    def call(self, function: Callable, form: str, x: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
        return {"y": function(x["h"], x["gate"], x["weight"])}


def _gated(name: str, *shape: int, size: float = 1.0, **flags: bool | str) -> Case:
    return Case(name, {"shape": shape, "size": size}, **flags)


class GatedSiLU(_Elementwise):
    """gate_up (..., 2 F) -> silu(gate) · up (..., F)."""

    name = "gated_silu"
    outputs = ("y",)
    gradients = ("gate_up",)
    low = frozenset({"gate_up", "y"})
    cases = (
        _gated("odd width", 3, 37, 54, quick=True),
        _gated("large values", 100, 64, size=30.0, quick=True),
        _gated("one row", 1, 1, 20),
        _gated("small values", 64, 128, size=0.03),
        _gated("wide", 70, 2 * 2730, interpreted=False),
        _gated("many rows", 2, 1024, 2 * 10944, device="cuda", interpreted=False),
    )

    def draw(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        return {"gate_up": case.settings["size"] * _normal(generator, *case.settings["shape"])}

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        *rows, width = case.settings["shape"]
        return {"y": (*rows, width // 2)}

    def call(self, function: Callable, form: str, x: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
        return {"y": function(x["gate_up"])}
