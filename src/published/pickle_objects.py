"""What a published pickle may name: stand-ins for its classes and functions, which check what they are given.

Nothing of pandas or numpy is called by the file: each admitted name (`ADMITTED`) stands for a constructor of this
module, and data frames are put together with the public constructors of pandas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

#: no published log comes near it [bytes]
MAX_BYTES = 256 * 2**20
_KINDS = re.compile(r"[?]|b1|[iu][1248]|f[248]|O8?")


class PickleError(ValueError):
    """A file that is no pickle, is damaged, or asks for more than plain data; the message names it."""


@dataclass
class LoggedRun:
    """A run as the authors logged it; attributes that a file lacks are empty."""

    name: str = ""
    id: str = ""
    created_at: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, pd.DataFrame] = field(default_factory=dict)

    def set_state(self, state: Any) -> None:
        """Take what a table of runs needs, of the type that it must have; ignore the rest."""
        for key, kind in (("name", str), ("id", str), ("created_at", str), ("config", dict), ("summary", dict)):
            value = _mapping(state, "WandBRunData").get(key)
            if value is not None:
                setattr(self, key, typed(value, kind, f"WandBRunData.{key}"))
        logs = typed(state.get("logs") or {}, dict, "WandBRunData.logs")
        self.logs = {key: typed(value, Frame, f"log {key!r}").frame for key, value in logs.items()}


class _Type:
    """An admitted class that only occurs as an argument (`ndarray`, `Index`)."""

    def __init__(self, name: str) -> None:
        self.name = name


_NDARRAY, _INDEX, _RANGE_INDEX, _MULTI_INDEX = map(_Type, ("ndarray", "Index", "RangeIndex", "MultiIndex"))


class Dtype:
    """numpy.dtype of bool, integers, floats or objects."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not _KINDS.fullmatch(code):
            raise PickleError(f"dtype {code!r} is refused: only booleans, integers, floats and objects are read")
        self.value = np.dtype(code)

    def set_state(self, state: Any) -> None:
        state = typed(state, tuple, "the state of a dtype")
        if len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise PickleError("a dtype with fields or sub-arrays is refused")
        if state[1] in "<>":
            self.value = self.value.newbyteorder(state[1])


class Array:
    """numpy.ndarray; object arrays may hold strings, numbers, booleans and None only."""

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if kind is not _NDARRAY:
            raise PickleError("numpy's _reconstruct may make arrays only")
        self.value = np.empty(0)

    def set_state(self, state: Any) -> None:
        state = typed(state, tuple, "the state of an array")
        if len(state) != 5:
            raise PickleError(f"the state of an array has {len(state)} parts instead of 5")
        shape, dtype = typed(state[1], tuple, "an array's shape"), typed(state[2], Dtype, "an array's dtype").value
        if any(not _is_count(size) for size in shape) or len(shape) > 4:
            raise PickleError(f"an array of shape {shape!r} is refused")
        size = math.prod(shape)
        if dtype.hasobject:
            items = typed(state[4], list, "the content of an object array")
            if len(items) != size:
                raise PickleError(f"an object array of shape {shape} holds {len(items)} items")
            if foreign := [type(item).__name__ for item in items if not _is_scalar(item)]:
                raise PickleError(f"an object array holds a {foreign[0]}: only plain values are read")
            flat = np.empty(size, dtype=object)
            flat[:] = items
            self.value = flat.reshape(shape)  # numpy lists objects in C order whatever their layout
        else:
            content = typed(state[4], bytes, "the content of an array")
            if len(content) != size * dtype.itemsize:
                raise PickleError(f"an array of shape {shape} and {dtype} holds {len(content)} bytes")
            flat = np.frombuffer(content, dtype=dtype).astype(dtype.newbyteorder("="))
            self.value = flat.reshape(shape, order="F" if state[3] else "C")


@dataclass
class _Block:
    """A block of columns: an array (columns, rows), and where the columns are."""

    array: np.ndarray
    columns: Sequence[int]


@dataclass
class _Manager:
    """pandas' BlockManager: blocks, and the axes (columns, rows)."""

    blocks: tuple = ()
    axes: list = field(default_factory=list)


class Frame:
    """pandas.DataFrame."""

    def __init__(self) -> None:
        self.frame = pd.DataFrame()

    def set_state(self, state: Any) -> None:
        manager = typed(_mapping(state, "DataFrame").get("_mgr"), _Manager, "a DataFrame's content")
        columns, rows = manager.axes
        arrays: dict[int, np.ndarray] = {}
        for block in manager.blocks:
            if block.array.shape != (len(block.columns), len(rows)):
                raise PickleError(f"a DataFrame's block has shape {block.array.shape} and {len(rows)} rows")
            arrays |= dict(zip(block.columns, block.array, strict=True))
        if sorted(arrays) != list(range(len(columns))):
            raise PickleError("a DataFrame's blocks do not cover its columns")
        series = {place: pd.Series(arrays[place], rows, arrays[place].dtype) for place in sorted(arrays)}
        self.frame = pd.DataFrame(series, index=rows).set_axis(columns, axis=1)


def _make_slice(*bounds: Any) -> range:
    if len(bounds) != 3 or not all(_is_count(bound) and bound < 2**31 for bound in bounds) or bounds[2] == 0:
        raise PickleError(f"slice{bounds!r} is refused: three small counts are expected")
    return range(*bounds)


def _make_block(values: Any, place: Any, ndim: Any) -> _Block:
    array = typed(values, Array, "a block's values").value
    if ndim != 2 or array.ndim != 2:
        raise PickleError("a block of a DataFrame must have two dimensions")
    if isinstance(place, Array) and place.value.ndim == 1 and place.value.dtype.kind in "iu":
        return _Block(array, place.value.tolist())
    return _Block(array, typed(place, range, "a block's place"))


def _make_manager(blocks: Any, axes: Any) -> _Manager:
    blocks, axes = typed(blocks, tuple, "a manager's blocks"), typed(axes, list, "a manager's axes")
    for block in blocks:
        typed(block, _Block, "a manager's block")
    if len(axes) != 2 or not all(isinstance(axis, pd.Index) for axis in axes):
        raise PickleError("a DataFrame needs two axes")
    return _Manager(blocks, axes)


def _make_index(kind: Any, state: Any) -> pd.Index:
    state = _mapping(state, "an index")
    if kind is _INDEX:
        values = typed(state.get("data"), Array, "an index's data").value
        return pd.Index(values, dtype=values.dtype)
    if kind is _RANGE_INDEX:
        values = range(*_make_bounds(state))
        if len(values) > MAX_BYTES:
            raise PickleError(f"a RangeIndex of {len(values)} rows is refused")
        return pd.RangeIndex(values)
    if kind is _MULTI_INDEX:
        levels = typed(state.get("levels"), list, "a MultiIndex's levels")
        codes = [typed(code, Array, "a MultiIndex's codes").value for code in typed(state.get("codes"), list, "codes")]
        if not all(isinstance(level, pd.Index) for level in levels) or len({code.shape for code in codes}) > 1:
            raise PickleError("a MultiIndex with levels or codes that do not fit is refused")
        try:
            return pd.MultiIndex(levels=levels, codes=codes)
        except (ValueError, TypeError) as error:
            raise PickleError(f"a MultiIndex does not fit together: {error}") from None
    raise PickleError("_new_Index may make Index, RangeIndex and MultiIndex only")


def _make_bounds(state: dict) -> tuple[int, int, int]:
    bounds = tuple(state.get(key) for key in ("start", "stop", "step"))
    if not all(isinstance(bound, int) and abs(bound) < 2**31 for bound in bounds) or bounds[2] == 0:
        raise PickleError(f"a RangeIndex of {bounds!r} is refused")
    return bounds


@dataclass(frozen=True)
class Admitted:
    """What stands for a class or function that a file may name; `new` is made by NEWOBJ, `call` by REDUCE."""

    new: Callable[[], Any] | None = None
    call: Callable[..., Any] | None = None
    arity: tuple[int, ...] = ()


_RECONSTRUCT = Admitted(call=Array, arity=(3,))
#: the run class, the ten of pandas, numpy and builtins of the logs, and MultiIndex (inference measurements)
ADMITTED: dict[tuple[str, str], Any] = {
    ("mlstm_scaling_laws.common.wandb_run_data", "WandBRunData"): Admitted(new=LoggedRun),
    ("pandas.core.frame", "DataFrame"): Admitted(new=Frame),
    ("pandas.core.internals.managers", "BlockManager"): Admitted(call=_make_manager, arity=(2,)),
    ("pandas._libs.internals", "_unpickle_block"): Admitted(call=_make_block, arity=(3,)),
    ("pandas.core.indexes.base", "Index"): _INDEX,
    ("pandas.core.indexes.base", "_new_Index"): Admitted(call=_make_index, arity=(2,)),
    ("pandas.core.indexes.range", "RangeIndex"): _RANGE_INDEX,
    ("pandas.core.indexes.multi", "MultiIndex"): _MULTI_INDEX,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): Admitted(call=Dtype, arity=(1, 2, 3)),
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # its name before numpy 2
    ("builtins", "slice"): Admitted(call=_make_slice, arity=(3,)),
}


def typed(value: Any, kind: type, what: str) -> Any:
    """The value, if it is of a kind; PickleError says what it should have been."""
    if not isinstance(value, kind):
        raise PickleError(f"{what} is a {type(value).__name__}, not a {kind.__name__.lstrip('_')}")
    return value


def _mapping(value: Any, what: str) -> dict:
    return typed(value, dict, f"the state of {what}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
