"""The benchmark: its table, what it leaves out and says so, and that it goes on where it stopped."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from xlstm_scaling.accounting import count_params, make_shape, prefill_flops, step_flops
from xlstm_scaling.inference import cells, timing
from xlstm_scaling.inference.benchmark import BenchmarkModel, measure, untrained_models
from xlstm_scaling.inference.counts import COUNT_COLUMNS, add_counts
from xlstm_scaling.inference.records import MEASUREMENT_COLUMNS
from xlstm_scaling.models import build_model

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"d16b1": {"embedding_dim": 16, "num_blocks": 1, "num_heads": {"xlstm": 2, "transformer": 2}}}


@pytest.fixture
def config():
    settings = {"prefill_lengths": [16, 5], "batch_sizes": [2, 1], "generate_steps": 3, "repeats": 2, "warmup": 1}
    return settings | {"max_cell_s": 30.0, "num_threads": 1, "dtype": "float32"}


def tiny(name="tiny", arch="transformer", build=None):
    shape = make_shape(arch, 16, 1, 2, 32)
    return BenchmarkModel(name, arch, shape, trained=True, build=build or (lambda: build_model(shape, seed=0)))


def test_table_has_a_row_for_every_cell_with_ordered_quartiles(config, tmp_path):
    models = [tiny(), *untrained_models(SIZES, ["xlstm", "transformer"], 32)]
    threads = torch.get_num_threads()
    table = measure(models, config, tmp_path, progress=False)
    assert torch.get_num_threads() == threads
    assert list(table.columns) == list(MEASUREMENT_COLUMNS)
    cells_seen = {tuple(row) for row in table[["model", "batch_size", "prefill_length"]].itertuples(index=False)}
    names = ("tiny", "xlstm-d16b1", "transformer-d16b1")
    assert cells_seen == {(name, batch, length) for name in names for batch in (1, 2) for length in (5, 16)}
    assert (table["status"] == "ok").all()
    for quantity in ("ttft_s", "step_time_s"):
        assert (table[quantity] > 0).all()
        assert (table[f"{quantity}_lo"] <= table[quantity]).all() and (table[quantity] <= table[f"{quantity}_hi"]).all()
    assert np.allclose(table["decode_tokens_per_s"], table["batch_size"] / table["step_time_s"])
    parameters = [4 * count_params(model.shape) for model in models for _ in range(4)]
    assert (table["peak_memory_bytes"] >= parameters).all()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "measurements.parquet"), table)
    assert len(pd.read_csv(tmp_path / "measurements.csv")) == len(table)
    assert table["trained"].tolist() == [True] * 4 + [False] * 8


def test_an_interrupted_stage_goes_on_where_it_stopped(config, tmp_path):
    first = measure([tiny()], config, tmp_path, progress=False)
    lines = (tmp_path / "measurements.jsonl").read_text().splitlines()
    (tmp_path / "measurements.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # cut in a line
    built = []

    def build():
        built.append(1)
        return build_model(tiny().shape, seed=0)

    again = measure([tiny(build=build)], config, tmp_path, progress=False)
    assert len(built) == 1
    kept = {json.loads(line)["row"]["ttft_s"] for line in lines[:3]}
    assert kept <= set(again["ttft_s"])
    assert len(set(again["ttft_s"]) & set(first["ttft_s"])) == 3
    measure([tiny(build=build)], config, tmp_path, progress=False)
    assert len(built) == 1  # complete: nothing is built
    measure([tiny(build=build)], config | {"repeats": 3}, tmp_path, progress=False)
    assert len(built) == 2  # other settings are other cells


def test_a_cell_that_takes_too_long_is_skipped_and_longer_ones_not_tried(config, tmp_path):
    table = measure([tiny()], config | {"max_cell_s": 1e-6}, tmp_path, progress=False)
    assert (table["status"] == "skipped").all()
    assert table["detail"].str.contains("max_cell_s").sum() == 2  # the first prefill of each batch
    assert table["detail"].str.contains("not tried").sum() == 2
    assert table["ttft_s"].isna().all() and (table["repeats"] == 0).all()


def test_a_cell_predicted_to_take_too_long_is_never_run(config, tmp_path, monkeypatch):
    run = []

    def pass_memory(model, prompt, steps):
        run.append(prompt.shape[1])
        return 1.0, 1000

    monkeypatch.setattr(cells, "pass_memory", pass_memory)
    lengths = {"prefill_lengths": [4, 4096], "batch_sizes": [1], "max_cell_s": 3.5}
    table = measure([tiny()], config | lengths, tmp_path, progress=False)
    assert run == [4]
    assert table["status"].tolist() == ["ok", "skipped"] and "predicted" in table["detail"][1]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]
)
def test_memory_that_runs_out_is_a_result(config, tmp_path, monkeypatch, error):
    real = timing.pass_memory

    def pass_memory(model, prompt, steps):
        if prompt.shape == (2, 16):
            raise error
        return real(model, prompt, steps)

    monkeypatch.setattr(cells, "pass_memory", pass_memory)
    table = measure([tiny()], config, tmp_path, progress=False)
    assert table["status"].tolist() == ["ok", "ok", "ok", "out_of_memory"]


def test_other_errors_are_not_swallowed(config, tmp_path):
    def build():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure([tiny(build=build)], config, tmp_path, progress=False)


@pytest.mark.parametrize(
    "change", [{"repeats": 0}, {"warmup": 0}, {"prefill_lengths": []}, {"batch_sizes": [0]}, {"max_cell_s": 0}]
)
def test_settings_out_of_range_are_refused(config, tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        measure([tiny()], config | change, tmp_path, progress=False)


def test_models_need_distinct_names(config, tmp_path):
    for models in ([], [tiny(), tiny()]):
        with pytest.raises(ValueError, match="distinct names"):
            measure(models, config, tmp_path, progress=False)


def test_prepare_keeps_what_is_computed_in_fp32(arch):
    shape = make_shape(arch, 16, 1, 2, 32)
    reference = build_model(shape, seed=0, compute_dtype=torch.bfloat16)
    model = timing.prepare(build_model(shape, seed=0), torch.bfloat16)
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens), reference(tokens))  # cast once or in every pass: the same bits


def test_counts_are_those_of_accounting(config, tmp_path):
    table = add_counts(measure([tiny()], config, tmp_path, progress=False), generate_steps=3)
    shape = tiny().shape
    for row in table.itertuples():
        assert row.ttft_flops == prefill_flops(shape, row.prefill_length, row.batch_size)
        steps = [step_flops(shape, row.prefill_length + k, row.batch_size) for k in range(3)]
        assert row.step_time_flops == pytest.approx(np.mean(steps), rel=1e-12)
    half = add_counts(table.assign(dtype="bfloat16"), generate_steps=3)
    assert list(half.columns) == list(table.columns)
    for column in COUNT_COLUMNS:
        expected = table[column] / (2 if column.endswith("bytes") else 1)  # a Transformer has no fp32 state
        assert np.allclose(half[column], expected)
    with pytest.raises(ValueError, match="dtype"):
        add_counts(table.assign(dtype="int3"))


@pytest.mark.parametrize("name", ["default", "smoke"])
def test_configured_sizes_make_models(name):
    config = yaml.safe_load((ROOT / "conf" / "inference" / f"{name}.yaml").read_text())
    models = untrained_models(config["untrained"], ["xlstm", "transformer"], 1024)
    assert len(models) == 2 * len(config["untrained"])
    for a, b in zip(models[: len(models) // 2], models[len(models) // 2 :], strict=True):
        assert abs(count_params(a.shape) / count_params(b.shape) - 1) < 0.1  # sizes are compared side by side


def test_one_slow_pass_does_not_lose_a_cell(config, tmp_path, monkeypatch):
    times = iter([10.0, 0.001])  # 3 passes of 10 s would exceed max_cell_s, 3 of the second look do not

    def pass_memory(model, prompt, steps):
        return next(times), 1000

    monkeypatch.setattr(cells, "pass_memory", pass_memory)
    one = {"prefill_lengths": [4], "batch_sizes": [1], "max_cell_s": 15.0}
    assert measure([tiny()], config | one, tmp_path, progress=False)["status"].tolist() == ["ok"]
