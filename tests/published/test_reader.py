"""The reader of pickles: plain logs come out as they went in, everything else is refused before anything happens."""

import copyreg
import io
import os
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logged import dumps, objects

from xlstm_scaling.published.pickle_objects import ADMITTED, PickleError
from xlstm_scaling.published.reader import load_pickle, loads_pickle

PROTO, STOP = b"\x80\x04", b"."


def text(value):
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise AssertionError("called")


def test_plain_data():
    value = {"a": [1, -70000, 2**70, 0.5, None, True, False, "é" * 300], "b": (1, (2, "x"), b"y" * 300), "c": {}}
    assert loads_pickle(dumps(value)) == value
    array = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array([True, False])]
    for item in array:
        np.testing.assert_array_equal(loads_pickle(dumps(item)), item)
    np.testing.assert_array_equal(loads_pickle(dumps(array[0].astype(">f4"))), array[0])


def test_frames_are_those_that_pickle_reads():
    mixed = objects(pd.DataFrame({"x": [1.5, np.nan], "n": [1, 2], "flag": [True, False], "y": [0.0, 1.0]}))
    names = np.empty((2, 3), dtype=object)
    names[:] = [["a", 1, None], ["b", 2.5, "c"]]
    levels = [pd.Index(names, dtype=object) for names in (["in", "out"], ["a", "b"])]
    tables = [
        mixed,
        mixed.iloc[:0],
        objects(pd.DataFrame(np.asfortranarray(names), columns=["p", "q", "r"], dtype=object)),
        pd.DataFrame(np.eye(2), columns=pd.MultiIndex(levels, [[0, 1], [1, 0]])),
    ]
    for table in tables:
        content = dumps(table)
        pd.testing.assert_frame_equal(loads_pickle(content), pickle.loads(content))


def test_runs_keep_what_a_table_needs(make_run):
    run = make_run(losses=(4.0, 3.5), metadata={"host": "secret"})
    read = loads_pickle(dumps({"tag": [run, run]}))["tag"]
    assert read[0] is read[1]
    assert (read[0].name, read[0].id, read[0].config) == (run.name, run.id, run.config)
    assert not hasattr(read[0], "metadata")
    pd.testing.assert_frame_equal(read[0].logs["val/.dclm_loss"], run.logs["val/.dclm_loss"])


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(lambda canary: Calls(os.system, f"touch {canary}"), id="os.system"),
        pytest.param(lambda canary: Calls(eval, f"open({str(canary)!r}, 'w')"), id="eval"),
        pytest.param(lambda canary: Calls(exec, f"open({str(canary)!r}, 'w')"), id="exec"),
        pytest.param(lambda canary: Calls(open, str(canary), "w"), id="open"),
        pytest.param(lambda canary: Calls(getattr, pd.DataFrame(), "eval"), id="getattr"),
        pytest.param(
            lambda canary: Calls(Calls(getattr, Calls(__import__, "os"), "system"), "true"), id="getattr-chain"
        ),
        pytest.param(lambda canary: Calls(pd.eval, "1 + 1"), id="pandas.eval"),
        pytest.param(lambda canary: Calls(pd.read_pickle, str(canary)), id="pandas.read_pickle"),
        pytest.param(lambda canary: Calls(np.load, str(canary)), id="numpy.load"),
        pytest.param(lambda canary: Calls(pickle.loads, dumps(Calls(os.system, f"touch {canary}"))), id="nested"),
        pytest.param(lambda canary: Calls(pickle.Unpickler, io.BytesIO(b".")), id="unpickler"),
    ],
)
def test_calls_are_refused_by_name(payload, tmp_path):
    canary = tmp_path / "canary"
    value = payload(canary)
    function = value.call[0]
    content = dumps({"tag": [value]})
    with pytest.raises(PickleError, match="refused"):
        loads_pickle(content)
    assert not canary.exists()
    if isinstance(function, type(len)):
        with pytest.raises(PickleError, match=function.__name__):
            loads_pickle(content)


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("ctypes", "CDLL"),
        ("numpy.ctypeslib", "load_library"), ("numpy", "load"), ("pandas", "read_pickle"), ("this", "s"),
        ("pandas.core.frame", "DataFrame.eval"), ("pandas.core.frame", "DataFrame.to_csv"), ("numpy", "ndarray.tofile"),
        ("builtins", "slice.__class__"), ("builtins", "Slice"), ("", ""), ("pandas", "DataFrame"),
        ("mlstm_scaling_laws.common.wandb_run_data", "WandBRunData.__init__.__globals__"),
    ],
)  # fmt: skip
def test_other_names_are_refused_before_they_are_imported(module, attribute):
    sys.modules.pop("this", None)
    for body in (name(module, attribute), b"(" + name(module, attribute) + b"t"):
        with pytest.raises(PickleError, match=r"is refused: it is none of the"):
            loads_pickle(PROTO + body + b")R" + STOP)
    assert "this" not in sys.modules


def test_names_that_are_no_text():
    for body in (b"K\x01K\x02\x93", b"]" + text("x") + b"\x93", b"\x93", text("x") + b"\x93"):
        with pytest.raises(PickleError):
            loads_pickle(PROTO + body + STOP)


def test_the_extension_registry_is_not_asked(monkeypatch):
    copyreg.add_extension("posix", "system", 240)
    try:
        copyreg._extension_cache[240] = os.system  # what an earlier pickle may have left
        for code in (b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"):
            with pytest.raises(PickleError, match="opcode EXT"):
                loads_pickle(PROTO + code + text("true") + b"\x85R" + STOP)
    finally:
        copyreg.remove_extension("posix", "system", 240)
        copyreg._extension_cache.pop(240, None)


@pytest.mark.parametrize(
    ("body", "opcode"),
    [
        (b"cos\nsystem\n", "GLOBAL"), (b"(ios\nsystem\n", "INST"), (b"(" + text("x") + b"o", "OBJ"),
        (b")}\x92", "NEWOBJ_EX"), (b"P1\n", "PERSID"), (text("x") + b"Q", "BINPERSID"), (b"I7\n", "INT"),
        (b"S'x'\n", "STRING"), (b"N2", "DUP"), (b"Nr\xff\xff\xff\x7f", "LONG_BINPUT"), (b"Nq\x01", "BINPUT"),
        (b"\x97", "NEXT_BUFFER"), (b"N\x98", "READONLY_BUFFER"), (b"\x96\x01\0\0\0\0\0\0\0x", "BYTEARRAY8"),
        (b"\x8f", "EMPTY_SET"), (b"\x8b\x01\0\0\0\x07", "LONG4"), (b"N0", "POP"),
    ],
)  # fmt: skip
def test_opcodes_that_logs_do_not_use(body, opcode):
    with pytest.raises(PickleError, match=rf"opcode {opcode} at byte \d+ is refused|damaged"):
        loads_pickle(PROTO + body + STOP)


@pytest.mark.parametrize("key", [key for key in ADMITTED if key[0] != "numpy.core.multiarray"])
def test_build_sets_no_attributes_of_what_is_admitted(key):
    """Neither by a state of attributes nor by the pair whose second part sets slots."""
    for state in (b"}" + text("__setstate__") + b"K\x01s", b"N}" + text("call") + b"K\x01s\x86", b"N"):
        with pytest.raises(PickleError, match="BUILD is refused"):
            loads_pickle(PROTO + name(*key) + state + b"b" + STOP)


def test_build_takes_known_attributes_of_a_run_only(make_run):
    run = make_run()
    run.__dict__ |= {"set_state": "x", "__class__": "y", "extra": 1}
    read = loads_pickle(dumps({"t": [run]}))["t"][0]
    assert callable(read.set_state) and type(read).__name__ == "LoggedRun" and not hasattr(read, "extra")
    for odd in ({"config": ["x"]}, {"name": 3}, {"logs": {"k": 1}}, {"logs": {"k": {"_step": [1]}}}):
        run.__dict__ |= odd
        with pytest.raises(PickleError, match="not a"):
            loads_pickle(dumps({"t": [run]}))
        run = make_run()


ARRAY = name("numpy._core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"


def array(shape, code, content, order="<"):
    dtype = (
        name("numpy", "dtype")
        + text(code)
        + b"\x89\x88\x87R(K\x03"
        + text(order)
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return PROTO + ARRAY + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb" + STOP


EIGHT = b"C\x08" + bytes(8)


def test_array_helper_makes_arrays():
    np.testing.assert_array_equal(loads_pickle(array(b"K\x01\x85", "f8", EIGHT)), [0.0])
    np.testing.assert_array_equal(loads_pickle(array(b"K\x01\x85", "O8", b"](K\x05e", "|")), [5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array(b"K\x02\x85", "f8", EIGHT), "holds 8 bytes"),
        (array(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", "f8", EIGHT), "holds 8 bytes"),
        (array(b"J\xff\xff\xff\xff\x85", "f8", EIGHT), "shape"),
        (array(b"K\x01", "f8", EIGHT), "shape is a int"),
        (array(b"K\x01\x85", "O8", EIGHT, "|"), "object array is a bytes"),
        (array(b"K\x02\x85", "O8", b"](K\x05e", "|"), "holds 1 items"),
        (array(b"K\x01\x85", "O8", b"](" + name("pandas.core.frame", "DataFrame") + b"e", "|"), "holds a"),
        (array(b"K\x01\x85", "O8", b"]()e", "|"), "holds a tuple"),
        (array(b"K\x01\x85", "O8", b"](}e", "|"), "holds a dict"),
        (array(b"K\x01\x85", "V8", EIGHT), "dtype"),
        (array(b"K\x01\x85", "M8[ns]", EIGHT), "dtype"),
        (array(b"K\x01\x85", "f8,O8", EIGHT), "dtype"),
        (array(b"K\x01\x85", "f8", b"](K\x05e"), "array is a list"),
        (array(b"K\x01\x85", "f8", EIGHT, "?"), "fields"),
    ],
)
def test_arrays_with_a_content_that_is_not_theirs(content, message):
    with pytest.raises(PickleError, match=message):
        loads_pickle(content)


@pytest.mark.parametrize(
    "body",
    [
        name("builtins", "slice") + b"J\0\0\0\x80K\x01K\x01\x87R",  # negative
        name("builtins", "slice") + b"K\x00K\x05K\x00\x87R",  # no step
        name("builtins", "slice") + b"K\x05\x85R",
        name("pandas.core.frame", "DataFrame") + text("x") + b"\x85\x81",  # NEWOBJ with arguments
        name("pandas.core.frame", "DataFrame") + b")R",
        name("numpy", "ndarray") + b")\x81",
        name("numpy", "ndarray") + b"K\x05\x85R",
        b"}" + b")R",
        b"K\x05" + b")\x81",
        name("numpy._core.multiarray", "_reconstruct") + name("pandas.core.frame", "DataFrame") + b"K\0\x85C\x01b\x87R",
        name("pandas.core.indexes.base", "_new_Index") + name("numpy", "ndarray") + b"}\x86R",
        name("pandas.core.indexes.base", "_new_Index") + name("pandas.core.indexes.range", "RangeIndex") + b"}("
        + text("start") + b"K\0" + text("stop") + b"J\xff\xff\xff\x7f" + text("step") + b"K\x01u\x86R",
        b"}K\x01K\x02s",  # a key that is no text
        b"})Ks",
        b"}(" + text("a") + b"u",
        b"]" + b"NNe",
        b"Na",
        b"h\x05",
        b"j\xff\xff\xff\x7f",
        b"(",
        b"NN",
        b"",
        b"\x94",
    ],
)  # fmt: skip
def test_malformed_programs(body):
    with pytest.raises(PickleError):
        loads_pickle(PROTO + body + STOP)


@pytest.mark.parametrize(
    "content",
    [
        PROTO + b"X\xff\xff\xff\x7fabc" + STOP, PROTO + b"B\xff\xff\xff\xffabc" + STOP,
        PROTO + b"\x8d" + b"\xff" * 7 + b"\x7fabc" + STOP, PROTO + b"\x8e" + b"\xff" * 8 + b"abc" + STOP,
        PROTO + b"\x95" + b"\xff" * 8 + b"X\x10\0\0\0abc" + STOP, PROTO + b"\x8a\xffabc" + STOP,
    ],
)  # fmt: skip
def test_lengths_beyond_the_file_cost_no_memory(content):
    with pytest.raises(PickleError):
        loads_pickle(content)


def test_depth_does_not_exhaust_the_stack():
    deep = PROTO + b")" + b"\x85" * 200_000
    with pytest.raises(PickleError, match="key"):
        loads_pickle(PROTO + b"}" + deep[2:] + b"Ns" + STOP)
    assert len(loads_pickle(deep + STOP)) == 1
    loop = loads_pickle(PROTO + b"]\x94h\x00a" + STOP)
    assert loop[0] is loop


def test_damaged_files(make_run):
    content = dumps({"tag": [make_run()]})
    assert loads_pickle(content)
    for end in range(0, len(content), 61):
        with pytest.raises(PickleError):
            loads_pickle(content[:end])
    with pytest.raises(PickleError, match="follow the pickle's end"):
        loads_pickle(content + dumps(Calls(os.system, "true")))
    for other in (b"", b"run_id,arch\n", b"PAR1", b"\x1f\x8b\x08", b"cos\nsystem\n(S'true'\ntR."):
        with pytest.raises(PickleError, match="not a Python pickle"):
            loads_pickle(other)
    for protocol in (0, 1, 2, 3, 5):
        with pytest.raises(PickleError, match="protocol 4"):
            loads_pickle(pickle.dumps({}, protocol))


@pytest.fixture(scope="module")
def small_pickle():
    return dumps({"x": objects(pd.DataFrame({"a": [1.0, 2.0], "b": [1, 2]})), "y": [("s", 1.5, None)] * 3})


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutations_are_read_or_refused(small_pickle, data):
    """Whatever bytes are changed, the answer is plain data or PickleError."""
    content = bytearray(small_pickle)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        value = loads_pickle(bytes(content))
    except PickleError:
        return
    assert isinstance(value, dict | list | tuple | str | bytes | int | float | None | pd.Index | np.ndarray)


def test_only_regular_files_are_opened(tmp_path, make_run):
    path = tmp_path / "log.pkl"
    path.write_bytes(dumps({"tag": [make_run()]}))
    link = tmp_path / "link.pkl"
    link.symlink_to(path)
    assert load_pickle(link)["tag"][0].id == load_pickle(path)["tag"][0].id == "abc"
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_pickle(tmp_path / "absent.pkl")
    (tmp_path / "device.pkl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.pkl")
    (tmp_path / "folder.pkl").mkdir()
    for odd in ("device.pkl", "pipe.pkl", "folder.pkl"):
        with pytest.raises((PickleError, IsADirectoryError), match=r"regular file|directory"):
            load_pickle(tmp_path / odd)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PickleError, match=r"log\.pkl"):
        load_pickle(path)
    with path.open("wb") as stream:
        stream.truncate(2**40)  # sparse
    with pytest.raises(PickleError, match="at most"):
        load_pickle(path)
