"""The registry of kernels: one operation, several implementations, chosen by name.

An implementation registers itself with ``@register("mlstm", form="chunkwise", backend="torch")``; its module is
imported when it is first asked for, so that a machine without Triton never imports it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from xlstm_scaling.kernels.cpp import build


@dataclass(frozen=True)
class Kernel:
    """An implementation of ``op`` in one mathematically equal ``form`` on one ``backend``."""

    op: str
    form: str
    backend: str
    function: Callable


_PACKAGE = "xlstm_scaling.kernels"
#: modules that hold implementations, by (operation, backend); imported on demand. ``torch`` runs anywhere and is the
#: reference, ``cpu`` is PyTorch written for CPUs, ``cpp`` C++ compiled by the machine that runs it, ``triton`` is for
#: GPUs.
_MODULES: dict[tuple[str, str], tuple[str, ...]] = {
    ("mlstm", "torch"): ("mlstm.recurrent", "mlstm.parallel", "mlstm.chunkwise"),
    ("mlstm", "cpu"): ("mlstm.chunkwise_cpu",),
    ("mlstm", "cpp"): ("mlstm.chunkwise_cpp",),
    ("mlstm", "triton"): ("mlstm.chunkwise_triton", "mlstm.step_triton"),
    ("linear_cross_entropy", "torch"): ("cross_entropy",),
    ("linear_cross_entropy", "cpp"): ("cross_entropy_cpp",),
    ("linear_cross_entropy", "triton"): ("cross_entropy_triton",),
    ("rms_norm", "torch"): ("rms_norm",),
    ("rms_norm", "cpu"): ("rms_norm",),
    ("rms_norm", "cpp"): ("rms_norm_cpp",),
    ("rms_norm", "triton"): ("rms_norm_triton",),
    ("head_norm_gate", "torch"): ("head_norm_gate",),
    ("head_norm_gate", "cpu"): ("head_norm_gate",),
    ("head_norm_gate", "cpp"): ("head_norm_gate_cpp",),
    ("head_norm_gate", "triton"): ("head_norm_gate_triton",),
    ("gated_silu", "torch"): ("gated_silu",),
    ("gated_silu", "cpu"): ("gated_silu",),
    ("gated_silu", "cpp"): ("gated_silu_cpp",),
    ("gated_silu", "triton"): ("gated_silu_triton",),
    ("rotary_attention", "torch"): ("rotary_attention",),
    ("rotary_attention", "cpp"): ("rotary_attention_cpp",),
}
#: the C++ library behind an operation
CPP_LIBRARIES = {op: "rows" for op, backend in _MODULES if backend == "cpp"} | {
    "mlstm": "mlstm",
    "rotary_attention": "attention",
}
_REGISTRY: dict[tuple[str, str, str], Kernel] = {}


def register(op: str, form: str, backend: str) -> Callable[[Callable], Callable]:
    """Enter a function into the registry; an entry of the same name is an error."""

    def enter(function: Callable) -> Callable:
        key = (op, form, backend)
        if key in _REGISTRY:
            raise ValueError(f"kernel {key} is registered twice")
        _REGISTRY[key] = Kernel(op, form, backend, function)
        return function

    return enter


def kernels(op: str, backend: str = "torch") -> list[Kernel]:
    """All implementations of an operation on a backend."""
    if (op, backend) not in _MODULES:
        known = ", ".join(f"{o} ({b})" for o, b in _MODULES)
        raise ValueError(f"no kernels for operation {op!r} on backend {backend!r}; known: {known}")
    for module in _MODULES[op, backend]:
        importlib.import_module(f"{_PACKAGE}.{module}")
    return [kernel for (o, _, b), kernel in _REGISTRY.items() if (o, b) == (op, backend)]


def get_kernel(op: str, form: str, backend: str = "torch") -> Callable:
    """The implementation of ``op`` in ``form``; ValueError names the forms there are."""
    found = {kernel.form: kernel.function for kernel in kernels(op, backend)}
    if form not in found:
        raise ValueError(f"no form {form!r} of {op!r} on backend {backend!r}; known: {', '.join(sorted(found))}")
    return found[form]


#: where ``auto`` looks first, by type of device
_PREFERRED = {"cuda": ("triton", "torch"), "cpu": ("cpp", "cpu", "torch")}
#: forms from fast to plain
_FORMS = ("fused", "chunked", "reference")


def _usable(op: str, backend: str, double: bool) -> bool:
    if (op, backend) not in _MODULES:
        return False
    if backend == "cpp":
        return build.usable(CPP_LIBRARIES[op])
    return backend != "triton" or (not double and importlib.util.find_spec("triton") is not None)


@functools.cache
def select(op: str, device_type: str, form: str | None = None, backend: str = "auto", double: bool = False) -> Kernel:
    """The implementation that models use on this type of device (cpu, cuda, meta …).

    ``backend``: auto, or one by name. ``form``: one by name, or the fastest that the backend has. ``double``: the
    inputs are float64, which Triton kernels do not take. ValueError names what there is.
    """
    backends = _PREFERRED.get(device_type, ("torch",)) if backend == "auto" else (backend,)
    for name in backends:
        if backend == "auto" and not _usable(op, name, double):
            continue
        found = {kernel.form: kernel for kernel in kernels(op, name)}
        for wanted in _FORMS if form is None else (form,):
            if wanted in found:
                return found[wanted]
    if backend != "auto":
        get_kernel(op, form or _FORMS[0], backend)  # says which forms there are
    raise ValueError(f"no kernel for {op!r}" + (f" in form {form!r}" if form else "") + f" on {device_type}")
