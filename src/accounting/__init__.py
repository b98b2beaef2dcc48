"""Parameters, FLOPs and bytes: the one place where they are computed. Imports nothing else of this package."""

from xlstm_scaling.accounting.architecture import CONVENTIONS, Architecture, Flops
from xlstm_scaling.accounting.counts import (
    ARCHITECTURES,
    architecture,
    count_flops,
    count_params,
    label,
    make_shape,
    ordered,
    parts,
    prefill_bytes,
    prefill_flops,
    step_bytes,
    step_flops,
    training_flops,
    weight_bytes,
)
from xlstm_scaling.accounting.dtypes import DTYPE_BYTES, dtype_bytes
from xlstm_scaling.accounting.shapes import ModelShape, shape_of_row
from xlstm_scaling.accounting.work import Work, prefill_work, step_work

__all__ = [
    "ARCHITECTURES",
    "CONVENTIONS",
    "DTYPE_BYTES",
    "Architecture",
    "Flops",
    "ModelShape",
    "Work",
    "architecture",
    "count_flops",
    "count_params",
    "dtype_bytes",
    "label",
    "make_shape",
    "ordered",
    "parts",
    "prefill_bytes",
    "prefill_flops",
    "prefill_work",
    "shape_of_row",
    "step_bytes",
    "step_flops",
    "step_work",
    "training_flops",
    "weight_bytes",
]
