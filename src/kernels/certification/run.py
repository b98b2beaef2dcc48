"""Through all kernels of a device, case by case: the certificate's content."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
from tqdm import tqdm

from xlstm_scaling.kernels import registry
from xlstm_scaling.kernels.certification.attention import RotaryAttention
from xlstm_scaling.kernels.certification.certificate import (
    SCHEMA_VERSION,
    describe_device,
    source_digest,
    versions,
)
from xlstm_scaling.kernels.certification.comparison import (
    CEILING,
    FACTOR,
    SLACK,
    THRESHOLDS,
    Check,
    number,
)
from xlstm_scaling.kernels.certification.cross_entropy import LinearCrossEntropy
from xlstm_scaling.kernels.certification.elementwise import GatedSiLU, HeadNormGate, RMSNorm
from xlstm_scaling.kernels.certification.mlstm import MLSTM
from xlstm_scaling.kernels.certification.operation import Case, Operation, Problem, strict_memory
from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.kernels.registry import Kernel

log = logging.getLogger(__name__)

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (MLSTM(), LinearCrossEntropy(), RMSNorm(), HeadNormGate(), GatedSiLU(), RotaryAttention())
}
#: backends whose kernels run on a device
BACKENDS = {"cpu": ("torch", "cpu", "cpp"), "cuda": ("torch", "triton")}
DTYPES = ("float32", "bfloat16")


@dataclass
class Result:
    """What certification found about one kernel in one dtype: checks by case and tensor, or what it raised."""

    kernel: Kernel
    dtype: str
    checks: dict[str, dict[str, Check]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Every failure in words, the tensor first."""
        found = []
        for case, checks in self.checks.items():
            for name, check in checks.items():
                if not check.passed:
                    note = f", {check.note}" if check.note else ""
                    found.append(
                        f"{name} is off by {number(check.error)} in case {case!r} (at most {number(check.limit)}; "
                        f"PyTorch {number(check.reference_error)}{note})"
                    )
        return found + [f"{text}, in case {case!r}" for case, text in self.problems.items()]

    def untested(self, operation: Operation) -> list[str]:
        """Tensors that no well-conditioned case tested."""
        tested = {n for checks in self.checks.values() for n, check in checks.items() if not check.ill_conditioned}
        return sorted(operation.tensors(self.kernel.form, self.kernel.backend) - tested)

    def worst(self) -> tuple[str, str, Check] | None:
        """Case, tensor and check that come closest to their limit."""
        entries = [(case, name, check) for case, checks in self.checks.items() for name, check in checks.items()]
        return max(entries, key=lambda entry: entry[2].error / entry[2].limit, default=None)

    def as_dict(self, operation: Operation | None) -> dict:
        """For the certificate."""
        failures = self.failures()
        if operation is not None:
            failures += [f"{name} is tested by no well-conditioned case" for name in self.untested(operation)]
        worst = self.worst()
        entry = {
            "op": self.kernel.op,
            "form": self.kernel.form,
            "backend": self.kernel.backend,
            "dtype": self.dtype,
            "passed": not failures,
            "failures": failures,
            "worst": None if worst is None else {"case": worst[0], "tensor": worst[1], **worst[2].as_dict()},
            "cases": {c: {n: check.as_dict() for n, check in checks.items()} for c, checks in self.checks.items()},
        }
        return entry


def select_kernels(
    device: str, ops: Sequence[str] | None = None, backends: Sequence[str] | None = None
) -> tuple[list[Kernel], list[str], dict[tuple[str, str], str]]:
    """Kernels of a device; what is not available (no Triton, no compiler); what cannot be imported, by (op, backend).

    Raises ValueError for unknown names, or kernels that cannot run on this device.
    """
    from xlstm_scaling.kernels.triton_launch import INTERPRETED

    kind = device.split(":")[0]
    if kind not in BACKENDS:
        raise ValueError(f"no kernels are certified on device {device!r}; known: {', '.join(BACKENDS)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --device cpu certifies the kernels of the CPU")
    allowed = (*BACKENDS[kind], "triton") if kind == "cpu" and INTERPRETED else BACKENDS[kind]
    for name in backends or ():
        if name not in allowed:
            hint = "; TRITON_INTERPRET=1 interprets Triton on a CPU" if name == "triton" else ""
            raise ValueError(f"backend {name!r} does not run on {device}; there: {', '.join(allowed)}{hint}")
    for name in ops or ():
        if name not in OPERATIONS:
            raise ValueError(f"no operation {name!r}; known: {', '.join(OPERATIONS)}")
    found: list[Kernel] = []
    unavailable: list[str] = []
    broken: dict[tuple[str, str], str] = {}
    for op, backend in registry._MODULES:
        if backend not in (backends or BACKENDS[kind]) or op not in (ops or OPERATIONS):
            continue
        if backend == "cpp":
            try:
                build.library(registry.CPP_LIBRARIES[op])
            except build.BuildError as error:
                unavailable.append(f"{op} ({backend}): {error}")
                continue
        try:
            found += registry.kernels(op, backend)
        except ModuleNotFoundError as error:
            if error.name == "triton":
                unavailable.append(f"{op} ({backend}): Triton is not installed")
            else:
                broken[op, backend] = f"cannot be imported: {error}"
        except Exception as error:
            broken[op, backend] = f"cannot be imported: {type(error).__name__}: {error}"
    return found, unavailable, broken


def select_cases(operation: Operation, device: str, level: str, interpreted: bool) -> list[Case]:
    """The cases of a level (quick or full) for a device; the small ones where Triton is interpreted."""
    kind = device.split(":")[0]
    return [
        case
        for case in operation.cases
        if (level == "full" or case.quick)
        and (case.device is None or case.device == kind)
        and (case.interpreted or not interpreted)
    ]


def certify_kernels(
    found: Sequence[Kernel],
    device: str = "cpu",
    dtypes: Sequence[str] = DTYPES,
    level: str = "full",
    progress: bool = False,
    interpreted: bool = False,
) -> list[Result]:
    """Run every kernel on every case in every dtype. A kernel that raises fails, and the others go on."""
    results = {(kernel, dtype): Result(kernel, dtype) for kernel in found for dtype in dtypes}
    work: list[tuple[Operation, Case, str, list[Kernel]]] = []
    for name, operation in OPERATIONS.items():
        mine = [kernel for kernel in found if kernel.op == name]
        for case in select_cases(operation, device, level, interpreted) if mine else []:
            takers = [kernel for kernel in mine if operation.takes(kernel.form, case)]
            held = [dtype for dtype in dtypes if dtype != "float16" or case.float16]
            work += [(operation, case, dtype, takers) for dtype in held if takers]
    bar = tqdm(total=sum(len(takers) for *_, takers in work), desc="certify", unit="check", disable=not progress)
    with bar, strict_memory():
        for operation, case, dtype, takers in work:
            bar.set_postfix_str(f"{operation.name}, {case.name}, {dtype}", refresh=False)
            problem = Problem(operation, case, getattr(torch, dtype), device)
            for kernel in takers:
                result = results[kernel, dtype]
                gradient = (kernel.form, kernel.backend) not in operation.without_gradient
                try:
                    result.checks[case.name] = problem.check(kernel.function, kernel.form, gradient)
                except Exception as error:
                    log.debug("%s", kernel, exc_info=True)
                    result.problems[case.name] = (
                        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    )
                bar.update()
    return list(results.values())


def certify(
    device: str,
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = DTYPES,
    level: str = "full",
    progress: bool = True,
) -> dict:
    """Certify the kernels of a device -> the content of its certificate.

    ``device``: cpu or cuda. ``level``: quick or full. Raises ValueError for a selection without kernels.
    """
    from xlstm_scaling.kernels.triton_launch import INTERPRETED

    if unknown := [dtype for dtype in dtypes if dtype not in THRESHOLDS]:
        raise ValueError(f"no thresholds for dtype {unknown[0]!r}; known: {', '.join(THRESHOLDS)}")
    start = time.perf_counter()
    found, unavailable, broken = select_kernels(device, ops, backends)
    if not found and not broken:
        raise ValueError(f"no kernels to certify on {device}" + (f": {'; '.join(unavailable)}" if unavailable else ""))
    interpreted = INTERPRETED and any(kernel.backend == "triton" for kernel in found)
    results = certify_kernels(found, device, dtypes, level, progress, interpreted)
    entries = [result.as_dict(OPERATIONS[result.kernel.op]) for result in results]
    for (op, backend), reason in broken.items():
        nothing = Kernel(op, "any", backend, _not_there)
        entries += [Result(nothing, dtype, problems={"import": reason}).as_dict(None) for dtype in dtypes]
    return {
        "schema_version": SCHEMA_VERSION,
        "level": level,
        "passed": all(entry["passed"] for entry in entries),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": round(time.perf_counter() - start, 1),
        "device": describe_device(device),
        "versions": versions(),
        "interpreted": interpreted,
        "kernel_sources": source_digest(),
        "rule": {"thresholds": THRESHOLDS, "slack": SLACK, "factor": FACTOR, "ceiling": CEILING},
        "unavailable": unavailable,
        "kernels": entries,
    }


def _not_there(*_: object) -> None:
    raise RuntimeError("this kernel could not be imported")
