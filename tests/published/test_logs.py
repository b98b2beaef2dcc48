"""Log files -> runs and training curves."""

import numpy as np
import pandas as pd
import pytest
from logged import dumps, series

from xlstm_scaling.accounting import count_params, make_shape, training_flops
from xlstm_scaling.published.logs import LogError, LogSettings, read_log
from xlstm_scaling.study.runs import CURVE_KEYS, CURVE_VALUES

ISOFLOP = LogSettings("isoflop", diverged_above=4.5, unfinished_below=0.9)
TOKENPARAM = LogSettings("tokenparam", merge_restarts=True)


def read(groups, settings=ISOFLOP):
    return read_log(dumps(groups), settings, "some.pkl")


@pytest.mark.parametrize("arch", ["xlstm", "transformer"])
def test_a_run(make_run, arch):
    name = f"dclm_{arch}_ctx128_gbs4"
    log = read({"tag": [make_run(name, arch=arch, losses=(5.0, 3.25))]})
    shape = make_shape(arch, 64, 2, 2, 256)
    row = log.runs.iloc[0]
    assert {key: row[key] for key in shape.as_dict()} == shape.as_dict()
    assert (row["run_id"], row["tag"], row["name"], row["status"], row["detail"]) == ("abc", "tag", name, "ok", None)
    assert (row["num_params"], row["num_tokens"]) == (count_params(shape), 4 * 128 * 100)
    assert row["num_flops"] == training_flops(shape, 128, 4, 100)
    assert (row["val_loss"], row["train_loss"]) == (3.25, 3.75)
    assert (row["learning_rate"], row["num_lr_warmup_steps"], row["seed"]) == (0.003, 7, 0)
    assert row["tokens_per_s"] == 4 * 128 / 0.25
    assert (log.num_logged, log.num_merged) == (1, 0)


def test_training_curves(make_run):
    run = make_run(losses=(5.0, 3.25))
    run.logs["train/.loss_mean"] = series("train/.loss_mean", [25, 50, 75, 100], [6.0, 5.5, 4.0, 3.5])
    curve = read({"tag": [run]}).curves
    assert list(curve.columns) == CURVE_KEYS + CURVE_VALUES
    assert curve["step"].tolist() == [25, 50, 75, 100]
    np.testing.assert_array_equal(curve["val_loss"], [np.nan, 5.0, np.nan, 3.25])
    assert curve["train_loss"].tolist() == [6.0, 5.5, 4.0, 3.5]
    assert curve["tokens"].tolist() == [step * 4 * 128 for step in (25, 50, 75, 100)]
    flops = training_flops(make_shape("xlstm", 64, 2, 2, 256), 128, 4, 100)
    assert curve["flops"].iloc[-1] == pytest.approx(flops, rel=1e-15)
    assert set(curve["run_id"]) == {"abc"}


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"logged": False}, "failed", "did not start"),
        ({"losses": ()}, "failed", "before its first validation"),
        ({"losses": (5.0, np.nan)}, "diverged", "nan"),
        ({"losses": (3.0, np.inf)}, "diverged", "inf"),
        ({"losses": (5.0, 7.5)}, "diverged", "7.50"),
        ({"losses": (5.0, 4.5)}, "ok", None),
        ({"losses": (4.0, 3.0), "steps": 120}, "failed", "step 100 of 120"),
        ({"losses": (4.0, 3.0), "steps": 110}, "ok", None),
    ],
)
def test_status(make_run, changes, status, reason):
    row = read({"tag": [make_run(**changes)]}).runs.iloc[0]
    assert row["status"] == status
    assert row["detail"] is None if reason is None else reason in row["detail"]
    assert pd.isna(row["num_tokens"]) == (changes.get("logged") is False)
    assert row["embedding_dim"] == 64


def test_an_n_that_the_shape_does_not_have_is_told(make_run):
    run = make_run()
    run.summary["model/"]["num_params"] += 1
    row = read({"tag": [run]}).runs.iloc[0]
    assert "the shape has" in row["detail"] and row["status"] == "ok"


def test_restarts_are_merged_in_order_of_creation(make_run):
    """Logs one after the other; the last value counts, and of a repeated step the later restart's."""
    late = make_run("a", "late", created_at="2025-04-13T00:00:00Z", first_step=100, losses=(2.75, 2.5), steps=150)
    early = make_run("a", "early", created_at="2025-04-12T00:00:00Z", losses=(4.0, 3.0), steps=150)
    unborn = make_run("a", "unborn", created_at="2025-04-14T00:00:00Z", logged=False)
    alone = make_run("b", "alone", losses=(4.0, 2.25))
    log = read({"one": [late, unborn, alone, early], "two": [make_run("a", "other")]}, TOKENPARAM)
    assert log.runs["run_id"].tolist() == ["early-late-unborn", "alone", "other"]
    assert log.runs["val_loss"].tolist() == [2.5, 2.25, 3.0]
    assert (log.num_logged, log.num_merged) == (5, 2)
    curve = log.curves[log.curves["run_id"] == "early-late-unborn"]
    assert curve["val_loss"].tolist() == [4.0, 2.75, 2.5]
    assert curve["step"].tolist() == [50, 100, 150]
    assert len(read({"one": [late, unborn, alone, early]}).runs) == 4


def test_context_length_comes_from_the_name_where_the_configuration_has_none(make_run):
    run = make_run("dclm_llama_ctx2048_lr0.001", arch="transformer")
    assert read({"t": [run]}).runs["context_length"].tolist() == [2048]
    run.name = "dclm_llama"
    with pytest.raises(LogError, match=r"some\.pkl: run 'dclm_llama' of t: no context length"):
        read({"t": [run]})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.model_class", "x.GPT", "neither"),
        ("model.model_config.embedding_dim", "64", "positive integer"),
        ("model.model_config.num_blocks", -2, "positive integer"),
        ("model.model_config.vocab_size", 1e400, "run"),
        ("model.model_config.mlstm_block.mlstm.num_heads", 3, "divisible"),
        ("model.model_config.mlstm_block.mlstm.layer_type", "slstm", "layer type"),
        ("model.model_config.mlstm_block.mlstm.qk_dim_factor", 1.0, "qk_dim_factor"),
        ("model.model_config.num_blocks", None, "lacks"),
    ],
)
def test_fields_that_are_odd_are_named(make_run, key, value, message):
    run = make_run()
    run.config[key] = value
    if value is None:
        del run.config[key]
    with pytest.raises(LogError, match=message):
        read({"t": [run]})


def test_what_is_no_run_log(make_run):
    for value, message in ((["x"], "no run log"), ({}, "no run log"), ({"t": 3}, "list of runs"), ({"t": [3]}, "list")):
        with pytest.raises(LogError, match=message):
            read(value)
    run = make_run()
    run.logs["val/.dclm_loss"] = run.logs["train/.loss_mean"]
    with pytest.raises(LogError, match="not _step and"):
        read({"t": [run]})
