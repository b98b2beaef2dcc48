"""What is certified: an operation with its cases, and how a kernel is run on one.

Inputs are drawn in float64 and rounded to the dtype that the kernel gets; the float64 reference gets the rounded
values. Every float input lies between guards of NaN, in the memory layout that the models use, and memory that PyTorch
hands out uninitialised is filled with NaN, so that a kernel that reads what it should not read cannot look right by
chance.
"""

from __future__ import annotations

import inspect
import math
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xlstm_scaling.kernels.certification.comparison import (
    Check,
    dtype_name,
    judge,
    noise_floor,
    rms,
    rms_error,
)

#: elements of NaN before and after each input; keeps the alignment of what lies between
GUARD = 64
#: an output that was computed without autograd, as validation and generation do: kernels take another path then
PLAIN = " without autograd"
#: elements of the largest input of cases that are run without autograd too
PLAIN_ELEMENTS = 2**20


@dataclass(frozen=True)
class Case:
    """A named problem. ``settings`` are the operation's: shape, distribution, options.

    ``vanishing``: tensors that cancel to nothing by the mathematics of the case (``Problem.floors``).
    """

    name: str
    settings: Mapping[str, Any]
    quick: bool = False  # also part of the quick certification
    interpreted: bool = True  # small enough for Triton's interpreter
    device: str | None = None  # there only
    float16: bool = True  # its values are within the range of fp16
    vanishing: tuple[str, ...] = ()
    draw: int = 0  # seeds the inputs, with the name


@dataclass
class Placed:
    """Inputs as a kernel gets them, and the guarded buffers they lie in."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    buffers: list[Tensor] = field(default_factory=list)

    def room(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of this shape between two guards."""
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), torch.nan, dtype=like.dtype, device=like.device)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(shape)

    def put(self, name: str, value: Tensor, view: Tensor | None = None) -> None:
        """Enter ``value`` as an input, in ``view`` or in guarded memory of its own; integers as they are."""
        if value.is_floating_point():
            view = self.room(value.shape, value) if view is None else view
            value = view.copy_(value)
        self.tensors[name] = value

    def guards_hold(self) -> bool:
        """Whether nothing was written outside the inputs."""
        return all(bool(torch.isnan(part).all()) for b in self.buffers for part in (b[:GUARD], b[-GUARD:]))


class Operation(ABC):
    """An operation: its inputs, how a kernel of it is called, and what it is compared with."""

    name: str
    cases: tuple[Case, ...]
    outputs: tuple[str, ...]
    #: inputs that have a gradient
    gradients: tuple[str, ...]
    #: inputs and outputs in the compute dtype; the others are fp32
    low: frozenset[str]
    #: fp32 inputs whose values are rounded to the compute dtype first
    rounded: frozenset[str] = frozenset()
    #: inputs that are logarithms: their scale is one, whatever their values
    logarithmic: frozenset[str] = frozenset()
    #: kernels without gradients, by (form, backend)
    without_gradient: frozenset[tuple[str, str]] = frozenset()

    @abstractmethod
    def draw(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        """The inputs in float64; integers in int64."""

    @abstractmethod
    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        """The outputs of the case and their shapes."""

    @abstractmethod
    def call(self, function: Callable, form: str, x: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
        """Run a kernel of this form: named inputs -> named outputs. Form ``whole``: in one piece, for the reference."""

    @abstractmethod
    def reference(self, case: Case) -> Callable:
        """The plainest PyTorch form, for float64."""

    @abstractmethod
    def yardstick(self, form: str) -> Callable:
        """The PyTorch reference that a kernel of this form is compared with in its own dtype."""

    def takes(self, form: str, case: Case) -> bool:
        """Whether a case is for kernels of this form."""
        return True

    def cotangent_names(self, case: Case) -> tuple[str, ...]:
        """The outputs that the loss depends on."""
        return tuple(self.shapes(case))

    def cotangent(self, case: Case, name: str, output: Tensor, generator: torch.Generator) -> Tensor:
        """The gradient of the loss with respect to an output, in float64, random; its shape may be one to expand."""
        return torch.randn(output.shape, generator=generator, dtype=torch.float64)

    def summands(self, name: str, value: Tensor) -> int:
        """Numbers of an input whose products with their gradients a logarithm's gradient is summed from."""
        return 1

    def place(self, x: Mapping[str, Tensor], case: Case) -> Placed:
        """Inputs in the memory layout that the models use."""
        placed = Placed()
        for name, value in x.items():
            placed.put(name, value)
        return placed

    def place_cotangent(self, case: Case, name: str, value: Tensor) -> Tensor:
        """A cotangent in the memory layout that the models give it."""
        return value.expand(self.shapes(case)[name])

    def tensors(self, form: str, backend: str) -> set[str]:
        """Every output and gradient of a kernel: at least one well-conditioned case must test each."""
        if (form, backend) in self.without_gradient:
            return set(self.outputs)
        return {*self.outputs, *(f"{name}{PLAIN}" for name in self.outputs), *(f"d{name}" for name in self.gradients)}


def seed(*words: object) -> int:
    """A seed from names: the same on every machine."""
    return zlib.crc32(" ".join(map(str, words)).encode())


def options(function: Callable, **wanted: Any) -> dict[str, Any]:
    """Those of ``wanted`` that the function takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in known}


@contextmanager
def strict_memory() -> Iterator[None]:
    """Uninitialised memory is NaN and fp32 products are fp32; the settings before are restored."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill, precision = torch.utils.deterministic.fill_uninitialized_memory, torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("highest")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_float32_matmul_precision(precision)


def evaluate(
    operation: Operation,
    case: Case,
    function: Callable,
    form: str,
    x: Mapping[str, Tensor],
    cotangents: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    gradient: bool = True,
) -> dict[str, Tensor | None]:
    """Outputs by name, and gradients by ``d`` + name (None where autograd has none). ``cotangents``: from the outputs.

    Raises RuntimeError where the kernel changes an input or writes beside one.
    """
    placed = operation.place(x, case)
    tensors = placed.tensors
    names = [name for name in operation.gradients if name in tensors] if gradient else []
    for name in names:
        tensors[name].requires_grad_()
    with torch.set_grad_enabled(gradient):
        outputs = operation.call(function, form, tensors, case)
    result: dict[str, Tensor | None] = {name: value.detach() for name, value in outputs.items()}
    given = cotangents(result) if gradient else {}
    used = [name for name in given if outputs[name].requires_grad and outputs[name].shape == given[name].shape]
    if used:
        grads = torch.autograd.grad(
            [outputs[name] for name in used],
            [tensors[name] for name in names],
            [given[name] for name in used],
            allow_unused=True,
        )
    else:
        grads = [None] * len(names)
    result |= {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    changed = [name for name, value in x.items() if not torch.equal(tensors[name].detach(), value)]
    if changed:
        raise RuntimeError(f"the kernel changes its input {', '.join(changed)}")
    if not placed.guards_hold():
        raise RuntimeError("the kernel writes beside its inputs")
    return result


class Problem:
    """A case in one dtype on one device: inputs, cotangents, and what float64 makes of them."""

    def __init__(self, operation: Operation, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        self.operation, self.case, self.dtype = operation, case, dtype_name(dtype)
        generator = torch.Generator().manual_seed(seed(operation.name, case.name, case.draw))

        def rounded(name: str, value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            value = value.to(dtype) if name in operation.low | operation.rounded else value
            return value if name in operation.low else value.float()

        x = {name: rounded(name, value) for name, value in operation.draw(case, generator).items()}
        d: dict[str, Tensor] = {}

        def cotangents(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            for name in operation.cotangent_names(case):
                d[name] = rounded(name, operation.cotangent(case, name, outputs[name], generator))
            return {name: operation.place_cotangent(case, name, value.double()) for name, value in d.items()}

        exact = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
        found = evaluate(operation, case, operation.reference(case), "whole", exact, cotangents)
        self.inputs = {name: value.to(device) for name, value in x.items()}
        self.cotangents = {name: operation.place_cotangent(case, name, value.to(device)) for name, value in d.items()}
        self.reference = {
            name: torch.zeros_like(exact[name[1:]]) if value is None else value for name, value in found.items()
        }
        self.also_plain = max(value.numel() for value in x.values()) <= PLAIN_ELEMENTS
        self.dtypes = {name: dtype if name in operation.low else torch.float32 for name in operation.outputs}
        self.floors = self._floors(exact)
        self._yardsticks: dict[Callable, dict[str, tuple[float, str]]] = {}

    def _floors(self, exact: Mapping[str, Tensor]) -> dict[str, float]:
        """What the errors of tensors that vanish are relative to.

        The scale of an output is 1. That of a gradient is the largest rms(dx) · rms(x) of the case over the rms of its
        input; that of a logarithm's gradient the largest rms(dx) · rms(x) · √summands, as it sums dx · x over features.
        """
        operation, case = self.operation, self.case
        inputs = [name for name in operation.gradients if name in exact]
        products = {n: rms(self.reference[f"d{n}"]) * rms(exact[n]) for n in inputs if n not in operation.logarithmic}
        largest = max(products.values(), default=0.0)
        summed = max((x * math.sqrt(operation.summands(n, exact[n])) for n, x in products.items()), default=0.0)
        floors = {}
        for name, value in self.reference.items():
            if name in case.vanishing or rms(value) == 0:
                of = name[1:]
                gradient = summed if of in operation.logarithmic else largest / max(rms(exact.get(of, value)), 1e-30)
                floors[name] = noise_floor(1.0 if name in operation.outputs else gradient, self.dtype)
        return floors

    def errors(self, function: Callable, form: str, gradient: bool = True) -> dict[str, tuple[float, str]]:
        """Error of every tensor of a kernel, and what is wrong with it beside its values."""
        arguments = (self.operation, self.case, function, form, self.inputs, lambda _: self.cotangents)
        found = evaluate(*arguments, gradient)
        if gradient and self.also_plain:
            found |= {f"{name}{PLAIN}": value for name, value in evaluate(*arguments, gradient=False).items()}
        return {name: self._error(name.removesuffix(PLAIN), value) for name, value in found.items()}

    def yardstick_errors(self, form: str) -> dict[str, tuple[float, str]]:
        """Errors of the PyTorch reference in this dtype; computed once."""
        function = self.operation.yardstick(form)
        if function not in self._yardsticks:
            self._yardsticks[function] = self.errors(function, form)
        return self._yardsticks[function]

    def _error(self, name: str, value: Tensor | None) -> tuple[float, str]:
        reference = self.reference[name]
        if value is None:
            error = rms_error(torch.zeros_like(reference), reference, self.floors.get(name, 0.0))
            return error, "no gradient" if error else ""
        if value.shape != reference.shape:
            return math.inf, f"shape {tuple(value.shape)} instead of {tuple(reference.shape)}"
        if name in self.dtypes and value.dtype != self.dtypes[name]:
            return math.inf, f"{dtype_name(value.dtype)} instead of {dtype_name(self.dtypes[name])}"
        missing = int((~torch.isfinite(value)).sum())
        note = f"{missing} of {value.numel()} values are NaN or infinite" if missing else ""
        return rms_error(value, reference, self.floors.get(name, 0.0)), note

    def check(self, function: Callable, form: str, gradient: bool = True) -> dict[str, Check]:
        """The verdict on every tensor of a kernel."""
        yardstick = self.yardstick_errors(form)
        found = yardstick if function is self.operation.yardstick(form) else self.errors(function, form, gradient)
        names = [name for name in self.reference if gradient or name in self.operation.outputs]
        if gradient and self.also_plain:
            names += [f"{name}{PLAIN}" for name in self.operation.shapes(self.case)]
        return {name: self._judge(name, found[name], yardstick[name][0]) for name in names}

    def _judge(self, name: str, found: tuple[float, str], yardstick: float) -> Check:
        """The verdict on one tensor, by its error, what else is wrong with it, and PyTorch's error."""
        name = name.removesuffix(PLAIN)
        vanishes = name in self.floors and rms(self.reference[name]) < self.floors[name]
        return judge(found[0], yardstick, self.dtype, found[1], vanishes)
