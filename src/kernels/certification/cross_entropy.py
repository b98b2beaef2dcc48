"""The cases of the linear head with cross entropy: odd sizes, with and without a cap, at the cap."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.kernels.certification.operation import Case, Operation
from xlstm_scaling.kernels.cross_entropy import linear_cross_entropy_reference, soft_cap


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Plain PyTorch with its matrix products in the dtype of ``hidden``, the rest in fp32.

    The reference of the registry takes the products in the dtype of the weights, fp32: no yardstick for bf16.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(weight.dtype)
    return F.cross_entropy(soft_cap(logits, cap), targets)


def _case(
    name: str,
    M: int,
    V: int,
    d: int,
    cap: float | None = 30.0,
    size: float = 1.0,
    loud: int = 0,
    **flags: bool | str,
) -> Case:
    """``size``: of the logits, about. ``loud``: so many tokens have logits far above the cap."""
    return Case(name, {"M": M, "V": V, "d": d, "cap": cap, "size": size, "loud": loud}, **flags)


CASES = (
    _case("odd numbers", 301, 1003, 48, quick=True),
    _case("without a cap", 130, 517, 40, cap=None, size=2.0, quick=True),
    _case("one token", 1, 17, 16, size=2.0, quick=True),
    _case("more words than a chunk of tokens", 70, 5003, 32, size=3.0),
    _case("logits at the cap", 200, 257, 32, size=8.0, loud=20, quick=True),
    _case("low cap", 64, 128, 64, cap=5.0, size=3.0),
    _case("more tokens than a chunk", 1500, 512, 24),
    _case("a large vocabulary", 65, 50304, 64, size=2.0, interpreted=False),
    _case("a wide model", 514, 50304, 512, size=2.0, device="cuda", interpreted=False),
)


class LinearCrossEntropy(Operation):
    """hidden (M, d), weight (V, d) fp32, targets (M,), cap -> mean loss [nat/token], fp32.

    The weights are rounded to the compute dtype, so that casting them costs nothing.
    """

    name = "linear_cross_entropy"
    cases = CASES
    outputs = ("loss",)
    gradients = ("hidden", "weight")
    low = frozenset({"hidden"})
    rounded = frozenset({"weight"})

    def draw(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        s = case.settings
        hidden = torch.randn(s["M"], s["d"], generator=generator, dtype=torch.float64)
        hidden[: s["loud"]] *= 100
        weight = s["size"] * s["d"] ** -0.5 * torch.randn(s["V"], s["d"], generator=generator, dtype=torch.float64)
        targets = torch.randint(0, s["V"], (s["M"],), generator=generator)
        targets[0], targets[-1] = 0, s["V"] - 1
        return {"hidden": hidden, "weight": weight, "targets": targets}

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        return {"loss": ()}

    def cotangent(self, case: Case, name: str, output: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full((), -1.75, dtype=torch.float64)  # a gradient that takes it for 1 is wrong

    def call(self, function: Callable, form: str, x: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
        return {"loss": function(x["hidden"], x["weight"], x["targets"], case.settings["cap"])}

    def reference(self, case: Case) -> Callable:
        return linear_cross_entropy_reference

    def yardstick(self, form: str) -> Callable:
        return plain_cross_entropy
