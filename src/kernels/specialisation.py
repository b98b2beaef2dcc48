"""A recorded launch in the terms of Triton's compiler: what its own launcher would derive from the arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from xlstm_scaling.kernels.triton_launch import Launch, Target

_POINTER_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Specialised:
    """A launch in the terms of Triton's compiler: argument types, constants by position, attributes by position."""

    kernel: Any  # triton.JITFunction
    target: Target
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        constants = {name: str(value) for name, value in self.constants.items()}
        kernel = f"{self.kernel.fn.__module__}.{self.kernel.fn.__qualname__}"
        parts = (self.signature, constants, self.attributes, self.options, self.target.backend, self.target.arch)
        return repr((kernel, *parts))


def specialise(launch: Launch, target: Target) -> Specialised:
    """The types, constants and attributes that Triton's launcher derives from the arguments of ``launch``.

    Pointers and integers divisible by 16 are known to be; the integer 1 and None are constants. It is the launcher's
    own to the letter, so that what was compiled ahead is found in Triton's cache when it is launched. ValueError on an
    argument of a type that kernels do not take.
    """
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    values = dict(launch.arguments)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for position, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = values.pop(name) if name in values else parameter.default
        kind, divisible, small = _kind(launch.name, name, value, not parameter.do_not_specialize)
        if parameter.is_constexpr or kind == "constexpr":
            signature[name] = "constexpr"
            constants[position,], attributes[position,] = value, []
            continue
        annotation = parameter.annotation_type
        signature[name] = annotation if annotation and not kind.startswith("*") else kind
        if kind in ("fp32", "u1"):
            continue  # has no attributes
        notes = []
        if divisible and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            notes.append(["tt.divisibility", 16])
        if small and target.backend == "hip":
            notes.append(["tt.pointer_range", 32])
        attributes[position,] = notes
    options.update(values)  # what is no parameter is an option of the compiler
    return Specialised(launch.kernel, target, signature, constants, attributes, options)


def _kind(kernel: str, name: str, value: Any, specialised: bool) -> tuple[str, bool, bool]:
    """(type, divisible by 16, a tensor under 2 GiB) of an argument."""
    if isinstance(value, torch.Tensor):
        return f"*{_POINTER_TYPES[value.dtype]}", value.data_ptr() % 16 == 0, value.untyped_storage().size() < 2**31
    if isinstance(value, bool):
        return "u1", False, False
    if isinstance(value, int):
        if specialised and value == 1:
            return "constexpr", False, False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return kind, value % 16 == 0, False
    if isinstance(value, float):
        return "fp32", False, False
    if value is None or type(value).__module__.startswith("triton"):  # dtypes, constants, functions
        return "constexpr", False, False
    if isinstance(value, str):
        return "constexpr", False, False
    raise ValueError(f"kernel {kernel}: argument {name} is a {type(value).__name__}")
