"""The benchmark: its table, what it leaves out and says so, that a dead process is a result, and that it goes on."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from dying import Build, Dying, never

from xlstm_scaling.accounting import count_params, make_shape, prefill_flops, step_flops
from xlstm_scaling.experiments import profile_settings
from xlstm_scaling.inference.benchmark import BenchmarkError, BenchmarkModel, measure, untrained_models
from xlstm_scaling.inference.cells import MOST_ROUND_PASSES, PREDICTION_MARGIN, Cell, expect, predicted_memory
from xlstm_scaling.inference.counts import COUNT_COLUMNS, add_counts
from xlstm_scaling.inference.records import MEASUREMENT_COLUMNS, Records
from xlstm_scaling.inference.timing import prepare
from xlstm_scaling.models import build_model
from xlstm_scaling.study.config import ConfigError, compose, to_dict

SIZES = {"d16b1": {"embedding_dim": 16, "num_blocks": 1, "num_heads": {"xlstm": 2, "transformer": 2}}, "none": None}
SHAPE = make_shape("transformer", 16, 1, 2, 32)


@pytest.fixture
def config():
    settings = {"prefill_lengths": [16, 5], "batch_sizes": [2, 1], "generate_steps": 3, "repeats": 2, "warmup": 1}
    return settings | {"max_cell_s": 100.0, "num_threads": 1, "dtype": "float32", "prefill_chunk": None}


def tiny(name="tiny", build=None):
    return BenchmarkModel(name, "transformer", SHAPE, trained=True, build=build or Build(SHAPE))


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
    assert (table["predicted_memory_bytes"] > parameters).all()
    assert table["load"].between(0, 1).all()
    without = table["decode_energy_j_per_token"].isna()
    assert (table.loc[without, "energy_detail"] != "").all()  # no number without a reason
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "measurements.parquet"), table)
    assert len(pd.read_csv(tmp_path / "measurements.csv")) == len(table)
    assert table["trained"].tolist() == [True] * 4 + [False] * 8


def test_an_interrupted_stage_goes_on_where_it_stopped(config, tmp_path):
    ledger = tmp_path / "ledger"
    model = tiny(build=Build(SHAPE, str(ledger)))
    first = measure([model], config, tmp_path, progress=False)
    records = tmp_path / "measurements.jsonl"
    lines = records.read_text().splitlines()
    assert len(lines) == 4 * (1 + 2)  # after the warm-up and after each repeat of every cell
    kept, cut = lines[:7], lines[7]  # warm-ups, the first repeat of three cells, and the fourth cut in a line
    records.write_text("\n".join(kept) + "\n" + cut[:20])
    again = measure([model], config, tmp_path, progress=False)
    assert ledger.read_text().count("built") == 4  # a process a round
    passes = [json.loads(line) for line in records.read_text().splitlines() if line[:20] != cut[:20] or line == cut]
    done = {cell["key"]: cell for cell in passes}
    before = {cell["key"]: cell for cell in map(json.loads, kept)}
    for key, cell in done.items():
        assert len(cell["ttft_s"]) == 2 and len(cell["step_times_s"]) == 2 * 3
        assert cell["ttft_s"][: len(before[key]["ttft_s"])] == before[key]["ttft_s"]  # never measured twice
    assert (again["status"] == "ok").all() and not again["ttft_s"].equals(first["ttft_s"])
    measure([model], config, tmp_path, progress=False)
    assert ledger.read_text().count("built") == 4  # complete: nothing is built
    measure([model], config | {"repeats": 3}, tmp_path, progress=False)
    assert ledger.read_text().count("built") == 7  # other settings are other cells


def test_short_passes_are_repeated_within_a_round(config, tmp_path):
    """As many as ``round_s`` allows, one after another, and never more than a record should hold."""
    long_rounds = config | {"round_s": 1e6, "prefill_lengths": [5], "batch_sizes": [1]}
    table = measure([tiny()], long_rounds, tmp_path, progress=False)
    assert table["repeats"].tolist() == [2 * MOST_ROUND_PASSES]
    lines = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    assert [len(cell["ttft_s"]) for cell in lines] == [0, MOST_ROUND_PASSES, 2 * MOST_ROUND_PASSES]
    # interrupted after a round, it takes the passes of the other as they were planned
    (tmp_path / "measurements.jsonl").write_text(json.dumps(lines[1] | {"round_passes": 3}) + "\n")
    again = measure([tiny()], long_rounds, tmp_path, progress=False)
    assert again["repeats"].tolist() == [MOST_ROUND_PASSES]  # more than two rounds of three: nothing is left to do
    (tmp_path / "measurements.jsonl").write_text(json.dumps(lines[1] | {"round_passes": 5}) + "\n")
    assert measure([tiny()], long_rounds, tmp_path, progress=False)["repeats"].tolist() == [10]


KILLED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dying import Dying
from test_benchmark import SHAPE, tiny
from xlstm_scaling.inference.benchmark import measure

if __name__ == "__main__":
    how = f"parent:{sys.argv[3]}/measurements.jsonl:9"  # four warm-ups, four first repeats and a second one
    measure([tiny(build=Dying(SHAPE, 16, how))], json.loads(sys.argv[2]), sys.argv[3], progress=False)
"""


def test_a_stage_that_is_killed_goes_on_with_what_it_had(config, tmp_path):
    """SIGKILL in the second round of the first batch's longer prefill."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    words = [sys.executable, str(script), str(Path(__file__).parent), json.dumps(config), str(tmp_path)]
    assert subprocess.run(words, capture_output=True).returncode == -signal.SIGKILL
    before = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    known = {cell["key"]: cell for cell in before}
    assert len(known) == 4 and sorted(len(cell["ttft_s"]) for cell in known.values()) == [1, 1, 1, 2]
    table = measure([tiny()], config, tmp_path, progress=False)
    after = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    assert after[: len(before)] == before
    for cell in after[len(before) :]:
        assert cell["ttft_s"][: len(known[cell["key"]]["ttft_s"])] == known[cell["key"]]["ttft_s"]
    assert (table["status"] == "ok").all() and (table["repeats"] == 2).all()
    # the cell that was complete was not begun again
    (complete,) = (key for key, cell in known.items() if len(cell["ttft_s"]) == 2)
    assert complete not in {cell["key"] for cell in after[len(before) :]}


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [("SIGKILL", "out_of_memory", "SIGKILL"), ("SIGABRT", "failed", "SIGABRT"), ("error", "failed", "a bug"),
     ("memory", "out_of_memory", "8 bytes")],
)  # fmt: skip
def test_a_process_that_dies_is_a_result_and_the_rest_goes_on(config, tmp_path, how, status, words):
    lengths = {"prefill_lengths": [5, 16, 24], "batch_sizes": [1]}
    models = [tiny("dying", Dying(SHAPE, 16, how)), tiny("after")]
    table = measure(models, config | lengths, tmp_path, progress=False)
    dying, after = table[table["model"] == "dying"], table[table["model"] == "after"]
    assert (after["status"] == "ok").all()
    assert dying["status"].tolist()[:2] == ["ok", status] and words in dying["detail"].iloc[1]
    if status == "out_of_memory":  # it would need more still
        assert "not tried" in dying["detail"].iloc[2]
    else:
        assert dying["status"].iloc[2] == "ok"
    # a process that failed is tried again, memory that did not suffice is not
    again = Records(tmp_path / "measurements.jsonl")
    keys = {json.loads(line)["key"] for line in (tmp_path / "measurements.jsonl").read_text().splitlines()}
    lost = [again.find(Cell(1, 16, key)) for key in keys]
    assert sum(cell.status == "out_of_memory" for cell in lost) == (2 if status == "out_of_memory" else 0)
    assert sum(not cell.ttft_s and cell.status == "ok" for cell in lost) == (0 if status == "out_of_memory" else 1)


def test_a_pass_without_end_is_ended_and_skipped(config, tmp_path):
    lengths = {"prefill_lengths": [16], "batch_sizes": [1], "max_cell_s": 0.5}
    table = measure([tiny("hanging", Dying(SHAPE, 16, "hang"))], config | lengths, tmp_path, progress=False)
    assert table["status"].tolist() == ["skipped"] and "max_cell_s = 0.5: ended" in table["detail"][0]


def test_where_every_process_fails_the_stage_does(config, tmp_path):
    with pytest.raises(BenchmarkError, match="RuntimeError: a bug"):
        measure([tiny(build=never)], config, tmp_path, progress=False)
    assert not (tmp_path / "measurements.parquet").exists()


def test_a_cell_that_takes_too_long_is_skipped_and_longer_ones_not_tried(config, tmp_path):
    table = measure([tiny()], config | {"max_cell_s": 1e-4}, tmp_path, progress=False)
    assert (table["status"] == "skipped").all()
    assert "max_cell_s" in table["detail"].iloc[0]
    not_tried = table["detail"].str.contains("not tried").tolist()
    assert not_tried[0] is False
    assert all(not_tried[2:])  # a pass that is ended with its process says nothing of the next length
    assert table["ttft_s"].isna().all() and (table["repeats"] == 0).all()
    again = measure([tiny()], config, tmp_path, progress=False)  # in the same folder, on a machine that has the time
    assert (again["status"] == "ok").all()


def test_a_cell_that_memory_cannot_hold_is_never_run(config, tmp_path):
    """By the accounting alone: reading a trillion tokens here would be the end of the machine."""
    lengths = {"prefill_lengths": [4, 10**12], "batch_sizes": [1], "max_cell_s": 1e30}
    table = measure([tiny()], config | lengths, tmp_path, progress=False)
    assert table["status"].tolist() == ["ok", "out_of_memory"] and "predicted" in table["detail"][1]


def test_predicted_times_follow_the_flops(config):
    """pass time x FLOPs x passes, against max_cell_s and a margin: the longest prefill that is tried is so found."""
    before = Cell(1, 100, "a", pass_s=0.5)
    for length in (200, 1000, 5000, 20_000):
        cell = Cell(1, length, "b")
        predicted_s = 0.5 * prefill_flops(SHAPE, length) / prefill_flops(SHAPE, 100) * 3
        tried = expect(cell, [before], SHAPE, config, 1e12)
        assert tried == (predicted_s <= PREDICTION_MARGIN * config["max_cell_s"])
        assert tried or (cell.status == "skipped" and f"{predicted_s:.3g} s" in cell.detail)
    assert not expect(Cell(2, 20_000, "c"), [before, Cell(1, 20_000, "b", status="skipped")], SHAPE, config, 1e12)
    assert expect(Cell(1, 200, "c"), [Cell(1, 100, "b", status="failed")], SHAPE, config, 1e12)
    # a larger batch, by the smaller one at its prefill
    slow = Cell(1, 100, "a", pass_s=40.0)
    assert expect(Cell(1, 100, "b"), [], SHAPE, config, 1e12)
    assert not expect(Cell(4, 100, "b"), [slow], SHAPE, config, 1e12)


def test_memory_is_judged_by_accounting_and_by_what_was_measured(config):
    items = predicted_memory(SHAPE, 1, 1000, config)
    needed = sum(items.values()) - items["parameters"]
    assert expect(Cell(1, 1000, "a"), [], SHAPE, config, needed / 0.89)
    assert not expect(Cell(1, 1000, "a"), [], SHAPE, config, needed / 0.91)
    # the previous prefill took twice what accounting says: so will this one
    items = predicted_memory(SHAPE, 1, 500, config)
    half = sum(items.values()) - items["parameters"]
    before = Cell(1, 500, "a", pass_s=1e-6, extra_memory_bytes=2 * half)
    assert not expect(Cell(1, 1000, "b"), [before], SHAPE, config, 2 * needed / 0.91)
    assert expect(Cell(1, 1000, "b"), [before], SHAPE, config, 2 * needed / 0.89)


@pytest.mark.parametrize(
    "change",
    [{"repeats": 0}, {"warmup": 0}, {"prefill_lengths": []}, {"batch_sizes": [0]}, {"max_cell_s": 0},
     {"prefill_chunk": 0}, {"round_s": -1.0}],
)  # fmt: skip
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
    model = prepare(build_model(shape, seed=0), torch.bfloat16)
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
    assert set(half.columns) == set(table.columns)
    for column in COUNT_COLUMNS:
        expected = table[column] / (2 if column.endswith("bytes") else 1)  # a Transformer has no fp32 state
        assert np.allclose(half[column], expected)
    with pytest.raises(ValueError, match="dtype"):
        add_counts(table.assign(dtype="int3"))


@pytest.mark.parametrize("name", ["default", "smoke", "long"])
def test_configured_sizes_make_models(name):
    settings = to_dict(compose([f"inference={name}"]).inference)
    models = untrained_models(settings["untrained"], ["xlstm", "transformer"], 1024)
    assert len(models) == 2 * sum(size is not None for size in settings["untrained"].values()) >= 4
    for a, b in zip(models[: len(models) // 2], models[len(models) // 2 :], strict=True):
        assert abs(count_params(a.shape) / count_params(b.shape) - 1) < 0.1  # sizes are compared side by side


def test_records_hold_cells_as_they_were(tmp_path):
    cell = Cell(2, 5, "k", pass_s=0.1, peak_memory_bytes=3.0, ttft_s=[0.2], step_times_s=[0.1, 0.3], others=[0.0])
    records = Records(tmp_path / "x.jsonl")
    records.keep(cell)
    found = Records(tmp_path / "x.jsonl").find(Cell(2, 5, "k"))
    assert asdict(found) == asdict(cell) and not found.complete(2) and found.complete(1)


def test_builders_can_be_sent_to_another_process():
    import pickle

    from xlstm_scaling.training.trainer import load_trained

    for model in untrained_models(SIZES, ["xlstm"], 32):
        assert pickle.loads(pickle.dumps(model)) == model
    pickle.dumps(partial(load_trained, Path("x")))


@pytest.mark.parametrize(
    ("override", "words"), [("+inference.prefil_chunk=3", "prefil_chunk"), ("inference.repeats=many", "many")]
)
def test_a_setting_that_does_not_exist_or_has_no_number_is_refused(override, words):
    with pytest.raises(ConfigError, match=words):
        compose([override])


def test_the_profile_is_of_one_size_that_exists():
    settings, size = profile_settings(compose(["inference=long", "inference.profile.repeats=null"]))
    assert list(size) == ["d192b3"] and settings["repeats"] == 2  # of the group itself
    assert max(settings["prefill_lengths"]) >= 2**15 and "profile" not in settings
    with pytest.raises(ConfigError, match=r"profile.size = 'd384b4' .* known: d192b3, d256b4"):
        profile_settings(compose(["inference=long", "inference.profile.size=d384b4"]))
