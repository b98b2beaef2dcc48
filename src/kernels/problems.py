"""The problems that kernels are compiled, tuned and measured on: operation, form, dtype and sizes, in one place.

A problem makes its own inputs (on ``meta`` where only launches are wanted) and runs any implementation of its
operation, forward or forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xlstm_scaling.kernels.mlstm.state import MLSTMState
from xlstm_scaling.kernels.registry import get_kernel

SOFT_CAP = 30.0
#: longest chunk of the mLSTM (imported, its module would want Triton)
MAX_CHUNK_SIZE = 1024


@dataclass(frozen=True)
class Problem:
    """One call of an operation.

    ``dtype``: of activations; gates, states and weights are fp32. ``sizes``: dimensions by name, see the makers of
    inputs below. ``backward``: whether gradients are wanted. ``strided``: activations are views with the head as the
    third axis, as the models make them, instead of contiguous (B, H, T, d).
    """

    op: str
    form: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]
    backward: bool = True
    strided: bool = False

    @property
    def size(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def name(self) -> str:
        """``mlstm/chunkwise bfloat16 B=1 H=8 T=8192 d_qk=256 d_v=512``."""
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        strided = " strided" if self.strided else ""
        return f"{self.op}/{self.form} {str(self.dtype).removeprefix('torch.')} {sizes}{strided}"

    def make_inputs(self, device: str | torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Inputs by name; those that get gradients require them."""
        maker = _Maker(torch.device(device), seed)
        inputs = _OPERATIONS[self.op, self.form].inputs(self, maker)
        if self.backward:
            for name in _OPERATIONS[self.op, self.form].differentiable:
                inputs[name].requires_grad_()
        return inputs

    def implementation(self, backend: str, form: str | None = None) -> Callable:
        """The function of this operation on a backend, of this problem's form or of another one."""
        return get_kernel(self.op, self.form if form is None else form, backend)

    def forward(
        self, inputs: Mapping[str, Tensor], backend: str = "triton", form: str | None = None, **options: int
    ) -> dict[str, Tensor]:
        """Outputs by name."""
        return _OPERATIONS[self.op, self.form].call(self.implementation(backend, form), inputs, options)

    def run(
        self, inputs: Mapping[str, Tensor], backend: str = "triton", form: str | None = None, **options: int
    ) -> dict[str, Tensor]:
        """Outputs, and gradients as ``d_<input>`` for fixed gradients of the outputs that models differentiate."""
        outputs = self.forward(inputs, backend, form, **options)
        if not self.backward:
            return outputs
        graded = [outputs[name] for name in _OPERATIONS[self.op, self.form].graded if name in outputs]
        names = [name for name, value in inputs.items() if value.requires_grad]
        gradients = torch.autograd.grad(graded, [inputs[name] for name in names], [gradient_like(y) for y in graded])
        return outputs | {f"d_{name}": gradient for name, gradient in zip(names, gradients)}


def gradient_like(output: Tensor) -> Tensor:
    """Some fixed gradient, not constant over the output."""
    if output.device.type == "meta" or output.dim() == 0:
        return torch.ones_like(output)
    steps = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(0.37 * steps).view(output.shape).to(output.dtype)


@dataclass(frozen=True)
class _Maker:
    """Random tensors, the same for a seed on every kind of device."""

    device: torch.device
    seed: int

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        generator = torch.Generator(self.device).manual_seed(self.seed + sum(shape))
        x = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return x.mul_(scale).add_(mean).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randint(high, shape, generator=generator, device=self.device)


@dataclass(frozen=True)
class _Operation:
    inputs: Callable[[Problem, _Maker], dict[str, Tensor]]
    call: Callable[[Callable, Mapping[str, Tensor], dict], dict[str, Tensor]]
    differentiable: tuple[str, ...]  # inputs
    graded: tuple[str, ...]  # outputs


def _mlstm_inputs(problem: Problem, make: _Maker) -> dict[str, Tensor]:
    """q, k (B, H, T, d_qk), v (B, H, T, d_v), gate pre-activations i, f (B, H, T) fp32."""
    s = problem.size

    def heads(*tail: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0, seed: int) -> Tensor:
        maker = _Maker(make.device, 10 * make.seed + seed)
        if problem.strided:
            return maker.normal(s["B"], s["T"], s["H"], *tail, dtype=dtype, scale=scale, mean=mean).transpose(1, 2)
        return maker.normal(s["B"], s["H"], s["T"], *tail, dtype=dtype, scale=scale, mean=mean)

    return {
        "q": heads(s["d_qk"], dtype=problem.dtype, seed=1),
        "k": heads(s["d_qk"], dtype=problem.dtype, seed=2),
        "v": heads(s["d_v"], dtype=problem.dtype, seed=3),
        "i": heads(dtype=torch.float32, scale=2.0, mean=-2.0, seed=4),
        "f": heads(dtype=torch.float32, mean=4.5, seed=5),
    }


def _mlstm_call(function: Callable, x: Mapping[str, Tensor], options: dict) -> dict[str, Tensor]:
    h, state = function(x["q"], x["k"], x["v"], x["i"], x["f"], **options)
    return {"h": h, **{f"last_{name}": value for name, value in state._asdict().items()}}


def _step_inputs(problem: Problem, make: _Maker) -> dict[str, Tensor]:
    """One token: q, k (B, H, d_qk), v (B, H, d_v), i, f (B, H), state C, n, m fp32."""
    s = problem.size
    B, H, d_qk, d_v = s["B"], s["H"], s["d_qk"], s["d_v"]

    def normal(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, seed: int) -> Tensor:
        return _Maker(make.device, 10 * make.seed + seed).normal(*shape, dtype=dtype, mean=mean)

    return {
        "q": normal(B, H, d_qk, dtype=problem.dtype, seed=1),
        "k": normal(B, H, d_qk, dtype=problem.dtype, seed=2),
        "v": normal(B, H, d_v, dtype=problem.dtype, seed=3),
        "i": normal(B, H, mean=-2.0, seed=4),
        "f": normal(B, H, mean=4.5, seed=5),
        "C": normal(B, H, d_qk, d_v, seed=6),
        "n": normal(B, H, d_qk, seed=7),
        "m": normal(B, H, seed=8),
    }


def _step_call(function: Callable, x: Mapping[str, Tensor], options: dict) -> dict[str, Tensor]:
    h, state = function(x["q"], x["k"], x["v"], x["i"], x["f"], MLSTMState(x["C"], x["n"], x["m"]), **options)
    return {"h": h, **{f"last_{name}": value for name, value in state._asdict().items()}}


def _cross_entropy_inputs(problem: Problem, make: _Maker) -> dict[str, Tensor]:
    """hidden (M, d), weight (V, d) fp32, targets (M,)."""
    s = problem.size
    return {
        "hidden": make.normal(s["M"], s["d"], dtype=problem.dtype),
        "weight": make.normal(s["V"], s["d"], dtype=torch.float32, scale=s["d"] ** -0.5),
        "targets": make.integers(s["V"], s["M"]),
    }


def _cross_entropy_call(function: Callable, x: Mapping[str, Tensor], options: dict) -> dict[str, Tensor]:
    return {"loss": function(x["hidden"], x["weight"], x["targets"], SOFT_CAP, **options)}


def _rms_norm_inputs(problem: Problem, make: _Maker) -> dict[str, Tensor]:
    """x and residual (M, d), weight (d,) fp32."""
    s = problem.size
    inputs = {
        "x": make.normal(s["M"], s["d"], dtype=problem.dtype),
        "weight": make.normal(s["d"], dtype=torch.float32, scale=0.1, mean=1.0),
    }
    return inputs | {"residual": _Maker(make.device, make.seed + 1).normal(s["M"], s["d"], dtype=problem.dtype)}


def _rms_norm_call(function: Callable, x: Mapping[str, Tensor], options: dict) -> dict[str, Tensor]:
    y, total = function(x["x"], x["weight"], x["residual"], **options)
    return {"y": y, "total": total}


def _head_norm_gate_inputs(problem: Problem, make: _Maker) -> dict[str, Tensor]:
    """h (B, T, H, d_v) as the mLSTM kernels lay it out, gate (B, T, H d_v) before its sigmoid, weight (H d_v,) fp32."""
    s = problem.size
    width = s["H"] * s["d_v"]
    return {
        "h": make.normal(s["B"], s["T"], s["H"], s["d_v"], dtype=problem.dtype),
        "gate": _Maker(make.device, make.seed + 1).normal(s["B"], s["T"], width, dtype=problem.dtype),
        "weight": make.normal(width, dtype=torch.float32, scale=0.1, mean=1.0),
    }


def _head_norm_gate_call(function: Callable, x: Mapping[str, Tensor], options: dict) -> dict[str, Tensor]:
    return {"y": function(x["h"], x["gate"], x["weight"], **options)}


def _gated_silu_inputs(problem: Problem, make: _Maker) -> dict[str, Tensor]:
    """gate_up (M, 2 F)."""
    return {"gate_up": make.normal(problem.size["M"], 2 * problem.size["F"], dtype=problem.dtype)}


def _gated_silu_call(function: Callable, x: Mapping[str, Tensor], options: dict) -> dict[str, Tensor]:
    return {"y": function(x["gate_up"], **options)}


_OPERATIONS: dict[tuple[str, str], _Operation] = {
    ("mlstm", "chunkwise"): _Operation(_mlstm_inputs, _mlstm_call, ("q", "k", "v", "i", "f"), ("h",)),
    ("mlstm", "step"): _Operation(_step_inputs, _step_call, (), ()),
    ("linear_cross_entropy", "fused"): _Operation(
        _cross_entropy_inputs, _cross_entropy_call, ("hidden", "weight"), ("loss",)
    ),
    ("rms_norm", "fused"): _Operation(_rms_norm_inputs, _rms_norm_call, ("x", "weight", "residual"), ("y", "total")),
    ("head_norm_gate", "fused"): _Operation(
        _head_norm_gate_inputs, _head_norm_gate_call, ("h", "gate", "weight"), ("y",)
    ),
    ("gated_silu", "fused"): _Operation(_gated_silu_inputs, _gated_silu_call, ("gate_up",), ("y",)),
}


# the sets

#: (B, H, d_qk, d_v) that the mLSTM's speed is judged on, at T = 8,192 and, with B = 1, at T = 65,536
SPEED_SHAPES = ((1, 8, 256, 512), (4, 4, 256, 512), (8, 8, 128, 256), (16, 6, 64, 128))
SPEED_LENGTHS = (8192, 65536)
#: one token of xLSTM-7B: 8 heads of 256 and 512
STEP_BATCHES = (1, 8, 32, 128)
VOCABULARY = 50304
WIDTHS = (768, 1024, 2048, 4096)


def mlstm(
    B: int, H: int, T: int, d_qk: int, d_v: int, dtype: torch.dtype = torch.bfloat16, strided: bool = False
) -> Problem:
    """mLSTM, chunkwise, forward and backward."""
    sizes = (("B", B), ("H", H), ("T", T), ("d_qk", d_qk), ("d_v", d_v))
    return Problem("mlstm", "chunkwise", dtype, sizes, strided=strided)


def step(B: int, H: int, d_qk: int, d_v: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """mLSTM, one token."""
    return Problem("mlstm", "step", dtype, (("B", B), ("H", H), ("d_qk", d_qk), ("d_v", d_v)), backward=False)


def cross_entropy(M: int, d: int, V: int = VOCABULARY, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Linear head and cross entropy of M tokens, forward and backward."""
    return Problem("linear_cross_entropy", "fused", dtype, (("M", M), ("d", d), ("V", V)))


def speed_problems() -> list[Problem]:
    """The mLSTM shapes of the speed targets."""
    short, long = SPEED_LENGTHS
    shapes = [(B, H, short, d_qk, d_v) for B, H, d_qk, d_v in SPEED_SHAPES]
    shapes += [(1, H, long, d_qk, d_v) for _, H, d_qk, d_v in SPEED_SHAPES]
    return [mlstm(*shape) for shape in shapes]


def step_problems() -> list[Problem]:
    """The 7B model's step at several batches."""
    return [step(B, 8, 256, 512) for B in STEP_BATCHES]


def rms_norm(M: int, d: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Root mean square norm of M tokens after the addition of a residual, forward and backward."""
    return Problem("rms_norm", "fused", dtype, (("M", M), ("d", d)))


def head_norm_gate(B: int, T: int, H: int, d_v: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Norm over each head, times the output gate, forward and backward."""
    return Problem("head_norm_gate", "fused", dtype, (("B", B), ("T", T), ("H", H), ("d_v", d_v)))


def gated_silu(M: int, F: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Activation of the gated feed-forward, forward and backward."""
    return Problem("gated_silu", "fused", dtype, (("M", M), ("F", F)))


def elementwise_problems() -> list[Problem]:
    """Norms, gates and activations at the widths of the speed shapes' models."""
    problems = [rms_norm(16384, d) for d in WIDTHS]
    problems += [head_norm_gate(2, 8192, H, d_v) for H, d_v in [(6, 128), (8, 128), (8, 256), (8, 512)]]
    return problems + [gated_silu(16384, F) for F in (2048, 2752, 5504, 10944)]


def _other_mlstm() -> list[Problem]:
    """Small and large heads and the other dtypes; in the models' layout, at a length that no tile divides."""
    problems = [mlstm(2, 6, 1000, d_qk, d_v, strided=True) for d_qk, d_v in [(16, 16), (24, 48), (512, 512)]]
    problems += [mlstm(2, 6, 1000, d_qk, d_v, torch.float32, strided=True) for d_qk, d_v in [(64, 128), (256, 512)]]
    return [*problems, mlstm(2, 6, 1000, 64, 128, torch.float16, strided=True)]


def all_problems() -> list[Problem]:
    """Every kernel at every configured shape."""
    problems = speed_problems() + _other_mlstm() + step_problems()
    others = (torch.float16, torch.float32)
    problems += [step(32, 6, 64, 128, dtype) for dtype in (torch.bfloat16, *others)]
    problems += [cross_entropy(8192, d) for d in WIDTHS] + [cross_entropy(8192, 768, dtype=dtype) for dtype in others]
    problems += elementwise_problems()
    for dtype in others:
        problems += [
            rms_norm(16384, 768, dtype),
            head_norm_gate(2, 8192, 6, 128, dtype),
            gated_silu(16384, 2048, dtype),
        ]
    return problems


def quick_problems() -> list[Problem]:
    """One or two shapes of each kernel."""
    return [
        mlstm(16, 6, 8192, 64, 128),
        mlstm(2, 6, 1000, 64, 128, torch.float32, strided=True),
        step(32, 8, 256, 512),
        cross_entropy(8192, 768),
        rms_norm(16384, 768),
        head_norm_gate(2, 8192, 6, 128),
        gated_silu(16384, 2048),
    ]


SETS: dict[str, Callable[[], list[Problem]]] = {"all": all_problems, "quick": quick_problems}


@dataclass(frozen=True)
class Variant:
    """An mLSTM problem in a chunk length of its own, or from a first state to a last, with the gradients of both."""

    problem: Problem
    chunk_size: int | None = None
    states: bool = False

    @property
    def op(self) -> str:
        return self.problem.op

    @property
    def name(self) -> str:
        chunk = "" if self.chunk_size is None else f" chunk_size={self.chunk_size}"
        return f"{self.problem.name}{chunk}{' states' if self.states else ''}"

    def make_inputs(self, device: str) -> dict[str, Tensor]:
        inputs, s = self.problem.make_inputs(device), self.problem.size
        if self.states:
            shapes = {"C": (s["d_qk"], s["d_v"]), "n": (s["d_qk"],), "m": ()}
            for name, shape in shapes.items():
                inputs[name] = torch.zeros(s["B"], s["H"], *shape, device=device, requires_grad=True)
        return inputs

    def run(self, inputs: Mapping[str, Tensor], backend: str = "triton") -> None:
        function, state = self.problem.implementation(backend), None
        if self.states:
            state = MLSTMState(*(inputs[name] for name in "Cnm"))
        h, last = function(*(inputs[name] for name in "qkvif"), state, self.chunk_size)
        outputs = [h, *last] if self.states else [h]
        torch.autograd.grad(outputs, list(inputs.values()), [torch.ones_like(y) for y in outputs])


def variants() -> list[Variant]:
    """Code of the mLSTM that no problem's defaults reach: the shortest and longest chunks, and states."""
    wide, narrow = mlstm(1, 8, 8192, 256, 512), mlstm(1, 6, 8192, 64, 128)
    in_fp32 = mlstm(2, 6, 1000, 64, 128, torch.float32, strided=True)
    chunks = [Variant(problem, size) for problem in (wide, narrow) for size in (64, MAX_CHUNK_SIZE)]
    return [*chunks, *(Variant(problem, states=True) for problem in (narrow, in_fp32))]
