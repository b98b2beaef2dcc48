"""Published tables of runs, by a mapping with units."""

import math

import numpy as np
import pandas as pd
import pytest
import yaml

from xlstm_scaling.published.tables import (
    MappingError,
    TableMapping,
    choose_mapping,
    load_mapping,
    parse_pairs,
    read_frame,
    read_table,
)

CONSTANTS = {"arch": "transformer", "context_length": 2048}
THEIRS = {"num_params": "Model Size", "num_tokens": "Training Tokens", "val_loss": "loss"}


def read(text, **mapping):
    mapping = {"columns": THEIRS, "constants": CONSTANTS} | mapping
    return read_table(read_frame(text.encode(), ".csv", "theirs.csv"), TableMapping(**mapping), "theirs.csv")


def test_columns_units_and_constants():
    table, ignored = read(
        "Model Size,Training Tokens,loss,colour\n70,1.4,3.5,red\n 400.25 ,0.5,3,\n",
        units={"num_params": "million", "num_tokens": 1e9, "val_loss": "bit"},
    )
    assert table["num_params"].tolist() == [70_000_000, 400_250_000]
    assert table["num_tokens"].tolist() == [1_400_000_000, 500_000_000]
    assert table["val_loss"].tolist() == [3.5 * math.log(2), 3 * math.log(2)]
    assert set(table["arch"]) == {"transformer"} and set(table["context_length"]) == {2048}
    assert set(table["experiment_set"]) == {"other"} and set(table["source"]) == {"published"}
    assert table["status"].tolist() == ["ok", "ok"]
    assert ignored == ["colour"]


def test_columns_of_the_same_name_need_no_entry(tmp_path):
    frame = pd.DataFrame({"num_params": [10], "num_tokens": [200.0], "val_loss": [3.0], "arch": ["xlstm"], "T": [64]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame = read_frame((tmp_path / "t.parquet").read_bytes(), ".parquet", "t.parquet")
    table, _ = read_table(frame, TableMapping(columns={"context_length": "T"}), "t.parquet")
    assert table[["num_params", "num_tokens", "context_length"]].to_numpy().tolist() == [[10, 200, 64]]


def test_numbers_of_a_csv_are_exact():
    value = 0.1 + 0.2
    table, _ = read(f"Model Size,Training Tokens,loss\n123456789012345677,1e3,{value!r}\n")
    assert table["val_loss"].tolist() == [value]
    assert table["num_params"].tolist() == [int(float(123456789012345677))]


def test_tokens_from_flops():
    table, _ = read(
        "Model Size,H,loss\n2e8,1.2e19,3\n", columns={"num_params": "Model Size", "val_loss": "loss", "num_flops": "H"}
    )
    assert table["num_tokens"].tolist() == [10**10]
    assert table["flops_convention"].tolist() == ["6nd"]


def test_runs_without_a_loss_are_marked():
    table, _ = read("Model Size,Training Tokens,loss\n1,2,\n1,2,nan\n1,2,NaN\n1,2,inf\n1,,3\n,2,3\n1,2,3\n")
    assert table["status"].tolist() == ["failed"] * 3 + ["diverged"] + ["failed"] * 2 + ["ok"]
    assert table["detail"].tolist()[:4] == ["no validation loss published"] * 3 + ["validation loss inf"]
    assert len(table) == 7 and np.isinf(table["val_loss"][3])


ROW = "Model Size,Training Tokens,loss\n1,2,3\n"


@pytest.mark.parametrize(
    ("text", "mapping", "message"),
    [
        ("Model Size,Training Tokens,loss\n1,2,3\n1,2,three\n", {}, r"column 'loss', row 2: 'three' is no number"),
        ("Model Size,Training Tokens,loss\n-1,2,3\n", {}, r"'Model Size', row 1: -1 is not positive"),
        ("Model Size,Training Tokens,loss\n1,0,3\n", {}, r"'Training Tokens', row 1: 0 is not positive"),
        ("Model Size,Training Tokens,loss\n1,2,-3\n", {}, r"'loss', row 1: -3 is not positive"),
        ("Model Size,Training Tokens,loss\n1,2,-inf\n", {}, "not positive"),
        ("Model Size,Training Tokens,loss\ninf,2,3\n", {}, "infinite"),
        ("Model Size,Training Tokens,loss\n70.5,2,3\n", {}, "no whole number; is its unit right"),
        ("Model Size,loss\n1,3\n", {}, r"no column 'Training Tokens'; it has: 'Model Size', 'loss'"),
        (ROW, {"columns": {}}, r"nothing gives num_params, num_tokens, val_loss; .*--columns num_params"),
        (ROW, {"constants": {"context_length": 2048}}, r"nothing gives arch; .*--set arch="),
        (ROW, {"constants": CONSTANTS | {"arch": "mamba"}}, r"arch is 'mamba'; known: xlstm, transformer"),
        (ROW, {"constants": CONSTANTS | {"context_length": "long"}}, r"constant context_length, row 1: 'long' is no"),
        (
            ROW,
            {"columns": THEIRS | {"n_params": "Model Size"}},
            "n_params is no column of the table of runs; there are",
        ),
        (ROW, {"units": {"num_params": "dozen"}}, r"unit 'dozen' is neither .* thousand, million"),
        (ROW, {"units": {"num_params": 0}}, "unit 0"),
        (ROW, {"units": {"arch": 2}}, "has no unit"),
        ("", {}, "cannot be read as CSV"),
    ],
)
def test_bad_tables_and_mappings(text, mapping, message):
    with pytest.raises(MappingError, match=message):
        read(text, **mapping)


def test_a_damaged_parquet():
    with pytest.raises(MappingError, match="cannot be read as PARQUET"):
        read_frame(b"PAR1 and nothing else", ".parquet", "x.parquet")


def test_pairs():
    assert parse_pairs(["a=b", "c=Model Size=x"], "--columns") == {"a": "b", "c": "Model Size=x"}
    assert parse_pairs(None, "--columns") == {}
    for pair in ("a", "=b", "a="):
        with pytest.raises(MappingError, match=r"--columns .* NAME=VALUE"):
            parse_pairs([pair], "--columns")


def test_mappings_from_a_file(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"columns": THEIRS, "constants": CONSTANTS, "when": ["loss"]}))
    mapping = load_mapping(path)
    frame = read_frame(ROW.encode(), ".csv", "x.csv")
    assert choose_mapping(frame, [TableMapping(when=("other",)), mapping]) is mapping
    assert choose_mapping(frame, [TableMapping()]) is None
    merged = mapping.merged(TableMapping(columns={"val_loss": "other"}, units={"num_params": 2}))
    assert merged.columns == THEIRS | {"val_loss": "other"} and merged.units == {"num_params": 2}
    for text, message in (
        ("a: [", "valid YAML"), ("[1]", "keys of a mapping"), ("column: {}", "'column'"), ("columns: [a]", "a mapping"),
        ("when: {a: b}", "a list"), ("columns: {n: x}", "n is no column"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(MappingError, match=message):
            load_mapping(path)
    with pytest.raises(FileNotFoundError, match="no mapping"):
        load_mapping(tmp_path / "absent.yaml")
