"""Which kernels a training run uses, and the question whether they are certified."""

from __future__ import annotations

import logging
from pathlib import Path

from xlstm_scaling.kernels.certification.certificate import (
    KernelUse,
    certificate_digest,
    device_name,
    load_certificate,
    require_certified,
)
from xlstm_scaling.kernels.registry import select
from xlstm_scaling.study.plan import RunSpec

log = logging.getLogger(__name__)

#: operations that a model leaves to the fastest kernel of the device, by architecture
OPERATIONS = {
    "xlstm": ("rms_norm", "head_norm_gate", "gated_silu", "linear_cross_entropy"),
    "transformer": ("rms_norm", "gated_silu", "linear_cross_entropy"),
}
#: options of the model that choose its mLSTM, and their defaults
MLSTM_OPTIONS = {"kernel_form": "chunkwise", "kernel_backend": "auto"}


def used_kernels(spec: RunSpec, device: str) -> list[KernelUse]:
    """The kernels that train a run on a device, with the dtype they compute in: (operation, form, backend, dtype)."""
    form, backend = (spec.model_options.get(key, default) for key, default in MLSTM_OPTIONS.items())
    ops = [(op, None, "auto") for op in OPERATIONS[spec.arch]]
    if spec.arch == "xlstm":
        ops.insert(0, ("mlstm", form, backend))
    selected = [select(op, device.split(":")[0], form, backend) for op, form, backend in ops]
    return [(kernel.op, kernel.form, kernel.backend, spec.compute_dtype) for kernel in selected]


def certify_run(spec: RunSpec, path: Path | None, device: str) -> dict[str, str | None]:
    """What a run's result says about its certificate; ``path`` None trains without one.

    CertificateError where the certificate does not cover a kernel of the run on this device, or refuses it.
    """
    if path is None:
        log.warning("%s trains with kernels that no certificate covers", spec.run_id)
        return {"kernel_certificate": None, "kernel_certificate_device": None}
    certificate = load_certificate(path, device)
    require_certified(certificate, used_kernels(spec, device), device, path)
    return {
        "kernel_certificate": certificate_digest(certificate),
        "kernel_certificate_device": device_name(certificate["device"]),
    }
