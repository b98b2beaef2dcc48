"""A reader of pickles that cannot run code: a small machine for the opcodes that the paper's logs use.

`pickle.loads` imports and calls what a file names. Here nothing is imported: the opcodes are decoded by
`pickletools.genops`, and a name stands for a constructor of `pickle_objects`. A name or an opcode that is not on the
list ends the reading. Opcodes: Python's `pickletools`, protocol 4.
"""

from __future__ import annotations

import os
import pickletools
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xlstm_scaling.published.pickle_objects import (
    ADMITTED,
    MAX_BYTES,
    Admitted,
    Array,
    Dtype,
    Frame,
    LoggedRun,
    PickleError,
    typed,
)

_MARK = object()


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
        return typed(self.stack[-1], kind, what)

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
            target[typed(key, str, "a mapping's key")] = value

    def name_class(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        key = (typed(module, str, "a module's name"), typed(name, str, "a class's name"))
        if key not in ADMITTED:
            raise PickleError(f"{module}.{name} is refused: it is none of the {len(ADMITTED)} names that logs may use")
        self.stack.append(ADMITTED[key])

    def make(self, _: Any) -> None:
        arguments, admitted = typed(self.pop(), tuple, "arguments"), self.pop()
        if not isinstance(admitted, Admitted) or admitted.new is None or arguments:
            raise PickleError("NEWOBJ is refused here: only DataFrame and the run class are made by it, empty")
        self.stack.append(admitted.new())

    def call(self, _: Any) -> None:
        arguments, admitted = typed(self.pop(), tuple, "arguments"), self.pop()
        if not isinstance(admitted, Admitted) or admitted.call is None:
            raise PickleError("REDUCE is refused here: it calls something that is not an admitted function")
        if len(arguments) not in admitted.arity:
            raise PickleError(
                f"{admitted.call.__name__.lstrip('_')} is called with {len(arguments)} arguments: refused"
            )
        self.stack.append(admitted.call(*arguments))

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, LoggedRun | Frame | Array | Dtype):
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
    if isinstance(value, Frame):
        return value.frame
    if isinstance(value, Array | Dtype):
        return value.value
    if isinstance(value, dict):
        return {key: _unwrap(item) if isinstance(item, Frame | Array | Dtype) else item for key, item in value.items()}
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
