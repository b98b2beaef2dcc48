"""What `accounting` counts of many shapes, as coefficients of lengths and batches that a page can evaluate.

No formula of an architecture is repeated: the counts are asked for at some lengths, coefficients are solved for, and
they have to give the counts at other lengths to `RTOL`. This works for every architecture whose counts are sums of
constants, lengths, their squares and begun chunks.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlstm_scaling.accounting import ModelShape, Work, count_flops, count_params, prefill_work, step_work
from xlstm_scaling.accounting.serving import serving_memory
from xlstm_scaling.planning.errors import PlanningError

Array = NDArray[np.float64]
RTOL = 1e-9
#: a coefficient whose part of every count is below this share is none
NEGLIGIBLE = 1e-12
FLOP_COUNTS = ("linear_flops", "mixing_flops", "scores")
BYTE_COUNTS = ("weight_bytes", "activation_bytes", "state_bytes")
#: lengths [tokens] that coefficients are solved at, and those that they are checked at; L is a chunk
SOLVED = ("1", "L", "L + 1", "3 L - 1", "1000", "8192", "65541", "1048579")
CHECKED = ("2", "2 L + 1", "5000", "131071", "4194305")


def pack(values: Any) -> dict[str, Any]:
    """An array as JSON: little-endian float64 in base64, and its shape."""
    array = np.ascontiguousarray(values, dtype="<f8")
    return {"f64": base64.b64encode(array.tobytes()).decode(), "shape": list(array.shape)}


@dataclass(frozen=True)
class Form:
    """A sum of basis functions of a length; ``inverse``: it is 1 / count that is such a sum."""

    names: tuple[str, ...]
    inverse: bool = False


#: 1, length T, its square, begun chunks, 1 / T
BASIS: dict[str, Callable[[Array, int], Array]] = {
    "1": lambda length, chunk: np.ones_like(length),
    "T": lambda length, chunk: length,
    "TT": lambda length, chunk: length**2,
    "chunks": lambda length, chunk: np.ceil(length / chunk),
    "1/T": lambda length, chunk: 1.0 / length,
}
LENGTH = Form(("1", "T", "TT", "chunks"))
#: independent streams of several kinds of block add up, or their inverses do
STREAMS = (Form(("1", "T")), Form(("1", "1/T"), inverse=True))


def _lengths(names: Sequence[str], chunk: int) -> Array:
    known = {"L": chunk, "L + 1": chunk + 1, "3 L - 1": 3 * chunk - 1, "2 L + 1": 2 * chunk + 1}
    return np.array(sorted({float(known.get(name) or name) for name in names}))


def solve(design: Array, counts: Array) -> Array:
    """Coefficients (K, b) with which ``design`` (n, b) gives ``counts`` (K, n), by relative least squares."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = design[None] / counts[:, :, None]  # (K, n, b)
    empty = ~(counts > 0).all(axis=1)
    rows[empty] = 0.0
    scale = np.abs(rows).max(axis=1, keepdims=True)
    scale[scale == 0] = 1.0
    found = np.linalg.pinv(rows / scale, rcond=1e-14) @ np.ones(len(design))
    share = np.abs(rows / scale * found[:, None, :]).max(axis=1)
    found[share < NEGLIGIBLE] = 0.0
    return found / scale[:, 0]


def coefficients(what: str, count: Callable[[Array], Array], forms: Sequence[Form], chunk: int) -> dict[str, Any]:
    """The first form that gives the counts exactly, as ``{"inverse": …, "terms": {basis: packed (K,)}}``.

    ``count``: lengths (n,) -> counts (K, n). Raises PlanningError where no form does.
    """
    at, checked = _lengths(SOLVED, chunk), _lengths(CHECKED, chunk)
    counts, expected = count(at), count(checked)
    if not counts.any():
        return {"inverse": False, "terms": {}}
    error = np.inf
    for form in forms:
        given = 1.0 / counts if form.inverse else counts
        found = solve(_design(form, at, chunk), given)
        values = found @ _design(form, checked, chunk).T
        wanted = 1.0 / expected if form.inverse else expected
        # a model may have none where others of its family do: a hybrid of one block has no scores
        error = float(np.max(np.abs(values - wanted) / np.where(wanted == 0, 1.0, np.abs(wanted))))
        if error <= RTOL:
            terms = {name: pack(column) for name, column in zip(form.names, found.T) if column.any()}
            return {"inverse": form.inverse, "terms": terms}
    raise PlanningError(
        f"{what} is no sum of {', '.join(BASIS)}: the explorer would miss it by {error:.1e}; add its form in "
        "src/explorer/costs.py and src/explorer/js/costs.js"
    )


def _design(form: Form, length: Array, chunk: int) -> Array:
    return np.column_stack([BASIS[name](length, chunk) for name in form.names])


def shape_costs(shapes: Sequence[ModelShape], widths: Sequence[int]) -> dict[str, Any]:
    """Everything that `planning.choose.Candidates` knows of K shapes of one architecture, as coefficients.

    Args:
        shapes: of one architecture and chunk size.
        widths: bytes of a weight and of an activation, of the runtime models in use.

    Returns:
        ``train`` [FLOPs a token of the context], ``prefill`` and ``step`` [of one sequence, by count], and in
        ``widths`` those that go in bytes, with ``memory`` [bytes: of 1, batch, batch x prompt, batch x all tokens].
    """
    arch, chunk = shapes[0].arch, shapes[0].chunk_size or 1
    train = coefficients(
        f"training FLOPs of {arch}",
        lambda at: np.array([[count_flops(s, int(T)).forward_backward / T for T in at] for s in shapes]),
        (Form(("1", "T")),),
        chunk,
    )
    parts: dict[str, Any] = {"chunk": chunk, "num_params": pack([count_params(s) for s in shapes]), "train": train}
    for phase, work in (("prefill", prefill_work), ("step", step_work)):
        counted = _counted(work, shapes)
        parts[phase] = {
            name: coefficients(
                f"{name} of {arch}, {phase}", counted(name, 2), STREAMS if name == "streams" else (LENGTH,), chunk
            )
            for name in (*FLOP_COUNTS, "streams")
        }
    parts["widths"] = {str(width): _in_bytes(shapes, width, chunk) for width in widths}
    return parts


def _counted(work: Callable[..., Work], shapes: Sequence[ModelShape]) -> Callable[..., Callable[[Array], Array]]:
    """(count, bytes of a number) -> the function from lengths (n,) to the counts (K, n) of one sequence."""

    def of(name: str, width: int) -> Callable[[Array], Array]:
        def count(at: Array) -> Array:
            rows = [getattr(work(shape, at, 1.0, width, width), name) for shape in shapes]
            return np.array([np.broadcast_to(np.asarray(row, dtype=np.float64), at.shape) for row in rows])

        return count

    return of


def _in_bytes(shapes: Sequence[ModelShape], width: int, chunk: int) -> dict[str, Any]:
    arch = shapes[0].arch
    found: dict[str, Any] = {"memory": _memory(shapes, width)}
    for phase, work in (("prefill", prefill_work), ("step", step_work)):
        counted = _counted(work, shapes)
        found[phase] = {
            name: coefficients(f"{name} of {arch}, {phase}", counted(name, width), (LENGTH,), chunk)
            for name in BYTE_COUNTS
        }
    return found


#: (prompt, generated, batch) that memory is solved and checked at
LOADS = ((1, 1, 1), (1000, 1, 1), (1000, 300, 1), (7, 2, 64), (65536, 4096, 3), (128, 100000, 16))
CHECKED_LOADS = ((4096, 17, 5), (131072, 1, 2))
MEMORY_TERMS = ("1", "B", "B P", "B (P + G)")


def _memory(shapes: Sequence[ModelShape], width: int) -> Mapping[str, Any]:
    """Serving memory as coefficients of `MEMORY_TERMS`."""

    def total(loads: Sequence[tuple[int, int, int]]) -> Array:
        return np.array([[sum(serving_memory(s, *load, width, width).values()) for load in loads] for s in shapes])

    def design(loads: Sequence[tuple[int, int, int]]) -> Array:
        return np.array([[1, B, B * P, B * (P + G)] for P, G, B in loads], dtype=np.float64)

    found = solve(design(LOADS), total(LOADS))
    wanted = total(CHECKED_LOADS)
    error = float(np.max(np.abs(found @ design(CHECKED_LOADS).T / wanted - 1.0)))
    if error > RTOL:
        raise PlanningError(
            f"serving memory of {shapes[0].arch} is no sum of {', '.join(MEMORY_TERMS)}: missed by {error:.1e}"
        )
    return {name: pack(column) for name, column in zip(MEMORY_TERMS, found.T)}
