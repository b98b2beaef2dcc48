"""Runs that share their updates before the cool-down: the same bits as each on its own, and less work."""

import json
from dataclasses import replace

import pytest
import torch

from xlstm_scaling.study.config import compose
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.study.run_spec import TrunkSpec, find_trunks
from xlstm_scaling.training.branch import branch_path
from xlstm_scaling.training.checkpoint import load_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.run import train
from xlstm_scaling.training.schedule import learning_rate
from xlstm_scaling.training.trainer import Trainer
from xlstm_scaling.training.trunk import train_trunk

QUIET = Execution(progress=False)


@pytest.fixture(scope="module")
def trunk(tiny_config, tiny_tokens):
    run = next(run for run in plan_runs(tiny_config) if run.arch == "xlstm" and run.size == "tiny")
    steps = ((20, 4), (40, 8), (60, 12))
    runs = [replace(run, decay="constant", num_train_steps=n, cooldown_steps=c, warmup_steps=3) for n, c in steps]
    return TrunkSpec(runs[0].trunk_id, tuple(runs))


@pytest.fixture(scope="module")
def tokens_folder(tiny_tokens, trunk):
    return tiny_tokens / "tokens" / trunk.spec.tokens_id


@pytest.fixture(scope="module")
def alone(trunk, tokens_folder, tmp_path_factory):
    """Folder of each run trained on its own."""
    folders = {run.run_id: tmp_path_factory.mktemp("alone") for run in trunk.runs}
    for run in trunk.runs:
        train(run, tokens_folder, folders[run.run_id], QUIET)
    return folders


def steps_trained(monkeypatch):
    """The steps of every update that is made from here on."""
    original, seen = Trainer.update, []

    def counting(self, batch):
        seen.append(self.step)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "update", counting)
    return seen


def assert_branches_equal(trunk, tokens_folder, folder, alone, tmp_path):
    for run in trunk.runs:
        result = train(run, tokens_folder, tmp_path / run.run_id, replace(QUIET, trunk=folder))
        mine = load_file(tmp_path / run.run_id / "final.ckpt")
        other = load_file(alone[run.run_id] / "final.ckpt")
        assert result["val_loss"] == other["result"]["val_loss"]
        assert all(torch.equal(mine["model"][name], value) for name, value in other["model"].items())


def test_branches_have_the_bits_of_runs_of_their_own(trunk, tokens_folder, alone, tmp_path, monkeypatch):
    seen = steps_trained(monkeypatch)
    result = train_trunk(trunk, tokens_folder, tmp_path / "trunk", QUIET)
    assert seen == list(range(48))
    assert result["status"] == "ok"
    assert result["steps"] == [16, 32, 48]
    assert json.loads((tmp_path / "trunk" / "trunk.json").read_text()) == result
    seen.clear()
    assert_branches_equal(trunk, tokens_folder, tmp_path / "trunk", alone, tmp_path)
    assert seen == [*range(16, 20), *range(32, 40), *range(48, 60)]
    seen.clear()
    train_trunk(trunk, tokens_folder, tmp_path / "trunk", QUIET)
    assert not seen


def test_another_length_goes_on_where_the_trunk_ends(trunk, tokens_folder, alone, tmp_path, monkeypatch):
    short = TrunkSpec(trunk.trunk_id, trunk.runs[:1])
    train_trunk(short, tokens_folder, tmp_path / "trunk", QUIET)
    seen = steps_trained(monkeypatch)
    train_trunk(trunk, tokens_folder, tmp_path / "trunk", QUIET)
    assert seen == list(range(16, 48))
    assert_branches_equal(trunk, tokens_folder, tmp_path / "trunk", alone, tmp_path)


def test_a_damaged_branch_is_made_again(trunk, tokens_folder, alone, tmp_path, monkeypatch):
    train_trunk(trunk, tokens_folder, tmp_path / "trunk", QUIET)
    damaged = branch_path(tmp_path / "trunk", 32)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    seen = steps_trained(monkeypatch)
    train_trunk(trunk, tokens_folder, tmp_path / "trunk", QUIET)
    assert seen[0] == 16
    assert_branches_equal(trunk, tokens_folder, tmp_path / "trunk", alone, tmp_path)


def test_without_a_trunk_a_run_trains_on_its_own(trunk, tokens_folder, alone, tmp_path, caplog):
    run = trunk.runs[0]
    result = train(run, tokens_folder, tmp_path / "run", replace(QUIET, trunk=tmp_path / "nowhere"))
    assert result["val_loss"] == load_file(alone[run.run_id] / "final.ckpt")["result"]["val_loss"]
    assert "from the start" in caplog.text


def test_other_runs_do_not_branch_off(trunk, tokens_folder, tmp_path, caplog):
    train_trunk(TrunkSpec(trunk.trunk_id, trunk.runs[:1]), tokens_folder, tmp_path / "trunk", QUIET)
    other = replace(trunk.runs[0], seed=5)
    train(other, tokens_folder, tmp_path / "run", replace(QUIET, trunk=tmp_path / "trunk"))
    assert "belongs to other runs" in caplog.text


def test_a_constant_rate_knows_nothing_of_its_end():
    rates = [[learning_rate(s, n, 0.1, 4, n // 5, 0.1, "constant") for s in range(n)] for n in (50, 100)]
    assert rates[0][:40] == rates[1][:40]
    assert rates[0][-1] == pytest.approx(0.1 / 11)
    assert rates[1][79] == 0.1


def test_the_plan_shares_what_can_be_shared():
    cosine = plan_runs(compose(["study=laptop"]))
    assert find_trunks(cosine) == []
    runs = plan_runs(compose(["study=laptop", "training.schedule.decay=constant"]))
    assert len(runs) == len(cosine)
    trunks = find_trunks(runs)
    assert trunks
    for trunk in trunks:
        assert len({run.learning_rate for run in trunk.runs}) == 1
        assert len({(run.batch_sequences, run.warmup_steps) for run in trunk.runs}) == 1
        assert min(trunk.steps) > trunk.runs[0].warmup_steps
        alone = sum(run.branch_step for run in trunk.runs)
        assert trunk.saved_flops == (alone - max(trunk.steps)) * trunk.runs[0].flops_per_step > 0
