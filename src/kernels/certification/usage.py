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
from xlstm_scaling.study.run_spec import RunSpec

log = logging.getLogger(__name__)


def used_kernels(spec: RunSpec, device: str) -> list[KernelUse]:
    """The kernels that train a run on a device, with the dtype they compute in: (operation, form, backend, dtype)."""
    from xlstm_scaling.models import MODELS  # models import kernels

    asked = MODELS[spec.arch].operations(**spec.model_options)
    selected = [select(op, device.split(":")[0], form, backend) for op, form, backend in asked]
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
