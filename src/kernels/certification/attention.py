"""The cases of causal attention: odd lengths and heads, documents, weights that are nearly one-hot, one token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from xlstm_scaling.kernels.certification.operation import Case, Operation
from xlstm_scaling.kernels.registry import get_kernel
from xlstm_scaling.kernels.rotary_attention import rotate


def _case(name: str, B: int, T: int, H: int, d: int, documents: float = 0.0, size: float = 1.0, **flags: bool) -> Case:
    """``documents``: chance that one begins at a token; ``size``: of queries and keys."""
    return Case(name, {"shape": (B, T, 3, H, d), "documents": documents, "size": size}, **flags)


def plain_attention(qkv: Tensor, cos: Tensor, sin: Tensor, document_starts: Tensor | None = None) -> Tensor:
    """The definition: all pairs of tokens in memory. qkv (B, T, 3, H, d) -> (B, T, H d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT / math.sqrt(qkv.shape[-1])
    T = qkv.shape[1]
    seen = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()
    if document_starts is not None:
        document = document_starts.long().cumsum(-1)
        seen = (seen & (document[:, :, None] == document[:, None, :]))[:, None]
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class RotaryAttention(Operation):
    """qkv (B, T, 3, H, d), cos, sin (T, d), document starts (B, T) -> y (B, T, H d); compared with the definition."""

    name = "rotary_attention"
    outputs = ("y",)
    gradients = ("qkv",)
    low = frozenset({"qkv", "y"})
    cases = (
        _case("odd length", 2, 37, 3, 24, quick=True),
        _case("documents", 2, 200, 2, 20, documents=0.03, quick=True),
        _case("more tokens than a block", 1, 333, 2, 64, quick=True),
        _case("a document a token", 2, 70, 1, 16, documents=0.9),
        _case("one token", 2, 1, 2, 16),
        _case("head of two", 1, 65, 3, 2),
        _case("weights nearly one-hot", 1, 150, 2, 32, size=4.0),
        _case("weights nearly equal", 1, 150, 2, 32, size=0.01),
        _case("wide heads", 1, 140, 1, 256),
        _case("many tokens, documents", 1, 2100, 2, 40, documents=0.002),
    )

    def draw(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        B, T, _, _, d = case.settings["shape"]
        qkv = torch.randn(case.settings["shape"], generator=generator, dtype=torch.float64)
        qkv[:, :, :2] *= case.settings["size"]
        frequency = 1e4 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = (torch.arange(T, dtype=torch.float64)[:, None] * frequency).repeat(1, 2)
        x = {"qkv": qkv, "cos": angle.cos(), "sin": angle.sin()}
        if case.settings["documents"]:
            starts = torch.rand(B, T, generator=generator, dtype=torch.float64) < case.settings["documents"]
            x["document_starts"] = starts.index_fill(1, torch.tensor([0]), True)
        return x

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        B, T, _, H, d = case.settings["shape"]
        return {"y": (B, T, H * d)}

    def call(self, function: Callable, form: str, x: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
        return {"y": function(x["qkv"], x["cos"], x["sin"], x.get("document_starts"))}

    def reference(self, case: Case) -> Callable:
        return plain_attention

    def yardstick(self, form: str) -> Callable:
        return get_kernel(self.name, "reference", "torch")
