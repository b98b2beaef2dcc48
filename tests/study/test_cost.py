"""What a study will cost: sums, schedules and sizes against brute force, closed forms and what runs really leave."""

import itertools
import json
import math

import pytest

from xlstm_scaling import cli
from xlstm_scaling.accounting.hardware import find_device
from xlstm_scaling.study.config import ConfigError, compose
from xlstm_scaling.study.cost import RECORD_BYTES, Rates, device_speeds, makespan_s, study_cost, training_jobs
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.study.run_spec import find_trunks

H100 = find_device("h100")


@pytest.fixture(scope="module")
def paper_config():
    return compose(["study=paper"])


@pytest.fixture(scope="module")
def paper_cost(paper_config, tmp_path_factory):
    return study_cost(paper_config, tmp_path_factory.mktemp("nothing"), Rates(H100, 64, 0.4, H100.power_w, 2.0))


def row(cost, stage, experiment_set=""):
    return next(r for r in cost.rows if (r.stage, r.experiment_set) == (stage, experiment_set))


def test_the_papers_grid(paper_cost, paper_config):
    training = [row(paper_cost, "train", name) for name in ("isoflop", "tokenparam")]
    flops = sum(r.flops for r in training)
    assert flops == pytest.approx(3.13e23, rel=2e-3)
    assert flops == pytest.approx(sum(run.num_flops for run in plan_runs(paper_config)), rel=1e-12)
    assert [r.runs for r in training] == [574, 66]
    hours = flops / (0.4 * H100.bf16_flops_per_s) / 3600
    assert sum(r.device_hours for r in training) == pytest.approx(hours, rel=1e-12)
    for r in training:
        assert r.energy_j == pytest.approx(r.device_hours * 3600 * H100.power_w)
        assert r.price == pytest.approx(2 * r.device_hours)
    tokens = row(paper_cost, "tokens")
    assert tokens.storage_bytes == 2 * paper_config.corpus.expected_tokens
    assert paper_cost.total.wall_time_s >= paper_cost.longest_run["time_s"]
    assert paper_cost.total.wall_time_s >= hours * 3600 / 64
    assert any("do not fit" in text for text in paper_cost.warnings)
    assert any("40%" in text for text in paper_cost.assumptions)


def test_validation_is_counted_by_hand(paper_cost, paper_config):
    from xlstm_scaling.accounting import count_flops

    each = [
        run.validation["max_tokens"] / run.context_length * count_flops(run.model_shape, run.context_length).forward
        for run in plan_runs(paper_config)
    ]
    evaluations = paper_config.training.validation.evaluations
    assert row(paper_cost, "train", "validation").flops == pytest.approx(evaluations * sum(each), rel=1e-12)


def best_makespan(times, slots):
    """Over all orders in which a list is worked off."""

    def greedy(order):
        free = [0.0] * slots
        for name in order:
            first = min(range(slots), key=free.__getitem__)
            free[first] += times[name]
        return max(free)

    return min(map(greedy, itertools.permutations(times)))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_longest_first_is_near_the_best_order(slots):
    """Graham (1969): longest first takes at most 4/3 - 1/(3 m) of the best."""
    times = {"a": 7.0, "b": 5.0, "c": 4.0, "d": 3.5, "e": 2.0, "f": 1.0, "g": 6.0}
    found, best = makespan_s(times, {}, slots), best_makespan(times, slots)
    assert best <= found <= (4 / 3 - 1 / (3 * slots)) * best
    assert slots > 1 or found == sum(times.values())


def test_runs_wait_for_their_trunk():
    times = {"trunk": 5.0, "a": 1.0, "b": 2.0, "other": 4.0}
    after = {"a": "trunk", "b": "trunk"}
    assert makespan_s(times, after, 2) == 7.0
    assert makespan_s(times, after, 1) == 12.0
    with pytest.raises(ValueError, match="no device"):
        makespan_s(times, after, 0)


def test_trunks_are_paid_once(tiny_overrides):
    cell = "{context_length: 32, sizes: [tiny], ratios: [4, 8, 16], batch_sequences: 4}"
    config = compose([*tiny_overrides, "training.schedule.decay=constant", f"+study.tokenparam.t={cell}"])
    runs = plan_runs(config)
    trunks = find_trunks(runs)
    assert trunks
    saved = sum(trunk.saved_flops for trunk in trunks)
    jobs = training_jobs(runs, trunks)
    assert sum(job.flops for job in jobs) == pytest.approx(sum(run.num_flops for run in runs) - saved, rel=1e-12)
    assert {job.after for job in jobs if job.after} == {trunk.trunk_id for trunk in trunks}


def test_storage_and_speed_are_those_of_finished_runs(tiny_config, tiny_tokens, tmp_path):
    """Two runs, one an architecture: what they left is what was counted, and their speed is what is expected now."""
    from xlstm_scaling.study.cost import device_speeds
    from xlstm_scaling.training.execution import Execution
    from xlstm_scaling.training.run import train

    specs = [run for run in plan_runs(tiny_config) if run.size == "big"]
    for spec in specs:
        folder = tmp_path / "runs" / spec.run_id
        result = train(spec, tiny_tokens / "tokens" / spec.tokens_id, folder, Execution(progress=False))
        left = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 4 * spec.num_params < left < 4 * spec.num_params + RECORD_BYTES
        speed = next(s for s in device_speeds(tmp_path / "runs", None, "cpu") if s.arch == spec.arch)
        assert speed.flops_per_s == pytest.approx(result["mfu"] * result["peak_flops"])
    assert device_speeds(tmp_path / "runs", H100, "cpu") == []
    cost = study_cost(tiny_config, tmp_path, Rates())
    assert cost.finished_runs == len(specs)
    assert all("have finished" in text for text in cost.assumptions[: len(specs)])
    hours = row(cost, "train", "isoflop").device_hours
    runs = plan_runs(tiny_config)
    speeds = {s.arch: s.flops_per_s for s in device_speeds(tmp_path / "runs", None, "cpu")}
    assert hours == pytest.approx(sum(run.num_flops / speeds[run.arch] for run in runs) / 3600)


def test_more_devices_a_run_than_there_are(paper_config, tmp_path):
    config = compose(["study=paper", "hardware.devices_per_run=8"])
    with pytest.raises(ConfigError, match="--count"):
        study_cost(config, tmp_path, Rates(H100, 4))
    assert study_cost(config, tmp_path, Rates(H100, 64)).longest_run["devices"] == 8


def test_a_size_that_is_left_out_costs_nothing(tmp_path):
    """`inference.untrained.<name>: null` takes a size out of what is measured."""
    config = compose(["study=smoke"])
    name = next(iter(config.inference.untrained))
    without, other = compose(["study=smoke", f"inference.untrained.{name}=null"]), f"~inference.untrained.{name}"
    costs = [study_cost(each, tmp_path, Rates()) for each in (config, without, compose(["study=smoke", other]))]
    flops = [row(cost, "inference").flops for cost in costs]
    assert flops[0] > flops[1] == flops[2] > 0


def test_the_command(tmp_path, capsys):
    words = ["cost", "--config", "study=smoke", "--results", str(tmp_path)]
    assert cli.run_command([*words, "--device", "h100", "--count", "2", "--price-per-hour", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["count"]) == ("H100", 2)
    parts = [part for part in found["rows"] if part["stage"] != "total"]
    for name in ("flops", "device_hours", "storage_bytes", "energy_j", "price"):
        assert found["total"][name] == pytest.approx(sum(part[name] for part in parts))
    assert cli.run_command(words) == 0
    text = capsys.readouterr().out
    assert "hardware.flops_per_s" in text
    assert "? (--power-w)" in text
    for wrong, message in (["--device", "abacus"], "known: a100"), (["--utilisation", "2"], "share of the peak"):
        assert cli.run_command([*words, *wrong]) == 1
        assert message in capsys.readouterr().err
    assert math.isnan(Rates().power_w)


def test_runs_of_older_code_say_nothing_of_speed(paper_config, tmp_path):
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    result = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "tokens_per_s": 1e6}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "spec.json").write_text(json.dumps({"setting_of_long_ago": 1}))
    assert device_speeds(tmp_path / "runs", H100, "cuda") == []
