"""A reader of pickles that cannot run code: a small machine for the opcodes and classes that the paper's logs use.

`pickle.loads` imports and calls what a file names. Here nothing is imported and nothing of pandas or numpy is called by
the file: the opcodes are decoded by `pickletools.genops`, each admitted class name stands for a constructor of this
module, which checks what it is given, and data frames are put together with the public constructors of pandas. A name
or an opcode that is not on the list ends the reading. Opcodes: Python's `pickletools`, protocol 4.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

#: no published log comes near it [bytes]
MAX_BYTES = 256 * 2**20
_KINDS = re.compile(r"[?]|b1|[iu][1248]|f[248]|O8?")
_MARK = object()


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
                setattr(self, key, _typed(value, kind, f"WandBRunData.{key}"))
        logs = _typed(state.get("logs") or {}, dict, "WandBRunData.logs")
        self.logs = {key: _typed(value, _Frame, f"log {key!r}").frame for key, value in logs.items()}


class _Type:
    """An admitted class that only occurs as an argument (`ndarray`, `Index`)."""

    def __init__(self, name: str) -> None:
        self.name = name


_NDARRAY, _INDEX, _RANGE_INDEX, _MULTI_INDEX = map(_Type, ("ndarray", "Index", "RangeIndex", "MultiIndex"))


class _Dtype:
    """numpy.dtype of bool, integers, floats or objects."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not _KINDS.fullmatch(code):
            raise PickleError(f"dtype {code!r} is refused: only booleans, integers, floats and objects are read")
        self.value = np.dtype(code)

    def set_state(self, state: Any) -> None:
        state = _typed(state, tuple, "the state of a dtype")
        if len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise PickleError("a dtype with fields or sub-arrays is refused")
        if state[1] in "<>":
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """numpy.ndarray; object arrays may hold strings, numbers, booleans and None only."""

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if kind is not _NDARRAY:
            raise PickleError("numpy's _reconstruct may make arrays only")
        self.value = np.empty(0)

    def set_state(self, state: Any) -> None:
        state = _typed(state, tuple, "the state of an array")
        if len(state) != 5:
            raise PickleError(f"the state of an array has {len(state)} parts instead of 5")
        shape, dtype = _typed(state[1], tuple, "an array's shape"), _typed(state[2], _Dtype, "an array's dtype").value
        if any(not _is_count(size) for size in shape) or len(shape) > 4:
            raise PickleError(f"an array of shape {shape!r} is refused")
        size = math.prod(shape)
        if dtype.hasobject:
            items = _typed(state[4], list, "the content of an object array")
            if len(items) != size:
                raise PickleError(f"an object array of shape {shape} holds {len(items)} items")
            if foreign := [type(item).__name__ for item in items if not _is_scalar(item)]:
                raise PickleError(f"an object array holds a {foreign[0]}: only plain values are read")
            flat = np.empty(size, dtype=object)
            flat[:] = items
            self.value = flat.reshape(shape)  # numpy lists objects in C order whatever their layout
        else:
            content = _typed(state[4], bytes, "the content of an array")
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


class _Frame:
    """pandas.DataFrame."""

    def __init__(self) -> None:
        self.frame = pd.DataFrame()

    def set_state(self, state: Any) -> None:
        manager = _typed(_mapping(state, "DataFrame").get("_mgr"), _Manager, "a DataFrame's content")
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
    array = _typed(values, _Array, "a block's values").value
    if ndim != 2 or array.ndim != 2:
        raise PickleError("a block of a DataFrame must have two dimensions")
    if isinstance(place, _Array) and place.value.ndim == 1 and place.value.dtype.kind in "iu":
        return _Block(array, place.value.tolist())
    return _Block(array, _typed(place, range, "a block's place"))


def _make_manager(blocks: Any, axes: Any) -> _Manager:
    blocks, axes = _typed(blocks, tuple, "a manager's blocks"), _typed(axes, list, "a manager's axes")
    for block in blocks:
        _typed(block, _Block, "a manager's block")
    if len(axes) != 2 or not all(isinstance(axis, pd.Index) for axis in axes):
        raise PickleError("a DataFrame needs two axes")
    return _Manager(blocks, axes)


def _make_index(kind: Any, state: Any) -> pd.Index:
    state = _mapping(state, "an index")
    if kind is _INDEX:
        values = _typed(state.get("data"), _Array, "an index's data").value
        return pd.Index(values, dtype=values.dtype)
    if kind is _RANGE_INDEX:
        values = range(*_make_bounds(state))
        if len(values) > MAX_BYTES:
            raise PickleError(f"a RangeIndex of {len(values)} rows is refused")
        return pd.RangeIndex(values)
    if kind is _MULTI_INDEX:
        levels = _typed(state.get("levels"), list, "a MultiIndex's levels")
        codes = [
            _typed(code, _Array, "a MultiIndex's codes").value for code in _typed(state.get("codes"), list, "codes")
        ]
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
class _Admitted:
    """What stands for a class or function that a file may name; `new` is made by NEWOBJ, `call` by REDUCE."""

    new: Callable[[], Any] | None = None
    call: Callable[..., Any] | None = None
    arity: tuple[int, ...] = ()


_RECONSTRUCT = _Admitted(call=_Array, arity=(3,))
#: the run class, the ten of pandas, numpy and builtins of logs.md, and MultiIndex (inference measurements)
ADMITTED: dict[tuple[str, str], Any] = {
    ("mlstm_scaling_laws.common.wandb_run_data", "WandBRunData"): _Admitted(new=LoggedRun),
    ("pandas.core.frame", "DataFrame"): _Admitted(new=_Frame),
    ("pandas.core.internals.managers", "BlockManager"): _Admitted(call=_make_manager, arity=(2,)),
    ("pandas._libs.internals", "_unpickle_block"): _Admitted(call=_make_block, arity=(3,)),
    ("pandas.core.indexes.base", "Index"): _INDEX,
    ("pandas.core.indexes.base", "_new_Index"): _Admitted(call=_make_index, arity=(2,)),
    ("pandas.core.indexes.range", "RangeIndex"): _RANGE_INDEX,
    ("pandas.core.indexes.multi", "MultiIndex"): _MULTI_INDEX,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Admitted(call=_Dtype, arity=(1, 2, 3)),
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # its name before numpy 2
    ("builtins", "slice"): _Admitted(call=_make_slice, arity=(3,)),
}


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise PickleError(f"{what} is a {type(value).__name__}, not a {kind.__name__.lstrip('_')}")
    return value


def _mapping(value: Any, what: str) -> dict:
    return _typed(value, dict, f"the state of {what}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


class _Machine:
    """Stack, memo and opcodes of one pickle; `run` returns the object at its STOP."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def run(self, content: bytes) -> Any:
        for opcode, argument, position in pickletools.genops(content):
            name = opcode.name
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                if position + 1 != len(content):
                    raise PickleError(f"{len(content) - position - 1} bytes follow the pickle's end: refused")
                result = self.pop()
                if self.stack:
                    raise PickleError("the pickle ends with objects left on its stack")
                return result
            if name in _LITERALS:
                self.stack.append(argument)
                continue
            step = _STEPS.get(name)
            if step is None:
                raise PickleError(f"opcode {name} at byte {position} is refused: plain logs do not use it")
            step(self, argument)
        raise PickleError("the pickle has no end")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("the pickle takes from an empty stack")
        return self.stack.pop()

    def top(self, kind: type, what: str) -> Any:
        if not self.stack:
            raise PickleError("the pickle takes from an empty stack")
        return _typed(self.stack[-1], kind, what)

    def pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise PickleError("the pickle closes a group that it did not open")

    def push_tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.stack.append(tuple(reversed(items)))

    def recall(self, place: int) -> None:
        if place >= len(self.memo):
            raise PickleError(f"the pickle refers to object {place} of {len(self.memo)}")
        self.stack.append(self.memo[place])

    def remember(self, _: Any) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("the pickle takes from an empty stack")
        self.memo.append(self.stack[-1])

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict, "a mapping")
        if len(items) % 2:
            raise PickleError("a mapping has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_typed(key, str, "a mapping's key")] = value

    def name_class(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        key = (_typed(module, str, "a module's name"), _typed(name, str, "a class's name"))
        if key not in ADMITTED:
            raise PickleError(f"{module}.{name} is refused: it is none of the {len(ADMITTED)} names that logs may use")
        self.stack.append(ADMITTED[key])

    def make(self, _: Any) -> None:
        arguments, admitted = _typed(self.pop(), tuple, "arguments"), self.pop()
        if not isinstance(admitted, _Admitted) or admitted.new is None or arguments:
            raise PickleError("NEWOBJ is refused here: only DataFrame and the run class are made by it, empty")
        self.stack.append(admitted.new())

    def call(self, _: Any) -> None:
        arguments, admitted = _typed(self.pop(), tuple, "arguments"), self.pop()
        if not isinstance(admitted, _Admitted) or admitted.call is None:
            raise PickleError("REDUCE is refused here: it calls something that is not an admitted function")
        if len(arguments) not in admitted.arity:
            raise PickleError(
                f"{admitted.call.__name__.lstrip('_')} is called with {len(arguments)} arguments: refused"
            )
        self.stack.append(admitted.call(*arguments))

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, LoggedRun | _Frame | _Array | _Dtype):
            raise PickleError(f"BUILD is refused: it would set attributes of a {type(target).__name__.lstrip('_')}")
        target.set_state(state)


_LITERALS = frozenset(
    (
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "SHORT_BINBYTES",
        "BINBYTES",
    )
)
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "APPENDS": lambda machine, _: _extend(machine, machine.pop_to_mark()),
    "APPEND": lambda machine, _: _extend(machine, [machine.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "MEMOIZE": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "STACK_GLOBAL": _Machine.name_class,
    "NEWOBJ": _Machine.make,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}


def _extend(machine: _Machine, items: list[Any]) -> None:
    machine.top(list, "a list").extend(items)


def read_regular_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Content of a regular file of at most ``max_bytes``.

    Raises:
        FileNotFoundError: there is none. PickleError: it is a folder, a device, a pipe, a symbolic link to such a
            thing, or too large.
    """
    path = Path(path)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}: check the path") from None
    except IsADirectoryError:
        raise PickleError(f"{path} is no regular file but a folder") from None
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PickleError(f"{path} is no regular file: give the log file itself")
        if status.st_size > max_bytes:
            raise PickleError(f"{path} has {status.st_size:,} bytes; at most {max_bytes:,} are read")
        return stream.read()


def loads_pickle(content: bytes) -> Any:
    """The object in a pickle of plain data: dict, list, tuple, str, numbers, and

    `LoggedRun`, `pandas.DataFrame`, `pandas.Index`, `numpy.ndarray` where the file names the classes of `ADMITTED`.

    Raises:
        PickleError: not a pickle of protocol 4, damaged, or asking for a name or an opcode that is not admitted.
    """
    if not content.startswith(b"\x80\x04"):
        raise PickleError("not a Python pickle of protocol 4")
    try:
        return _unwrap(_Machine().run(content))
    except PickleError:
        raise
    except (ValueError, TypeError, IndexError, OverflowError, UnicodeError, MemoryError) as error:
        raise PickleError(f"damaged pickle: {error}") from None


def _unwrap(value: Any) -> Any:
    """The value behind a stand-in, in the containers that logs have: a dict of frames or of lists of runs."""
    if isinstance(value, _Frame):
        return value.frame
    if isinstance(value, _Array | _Dtype):
        return value.value
    if isinstance(value, dict):
        return {
            key: _unwrap(item) if isinstance(item, _Frame | _Array | _Dtype) else item for key, item in value.items()
        }
    return value


def load_pickle(path: Path) -> Any:
    """`loads_pickle` of a file; errors name the file.

    Raises:
        FileNotFoundError, PickleError.
    """
    content = read_regular_file(path)
    try:
        return loads_pickle(content)
    except PickleError as error:
        raise PickleError(f"{Path(path).name}: {error}") from None
