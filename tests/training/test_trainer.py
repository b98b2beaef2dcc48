"""Training runs: learning, exact resume, equal bits wherever they run, and bad luck of every kind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from xlstm_scaling.models import LanguageModel
from xlstm_scaling.study.errors import EXIT_PREEMPTED, Preempted
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.training.checkpoint import load_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.run import Run, train
from xlstm_scaling.training.trainer import Trainer, load_trained
from xlstm_scaling.warmstart import open_session

QUIET = Execution(progress=False)


@pytest.fixture(scope="module", params=["xlstm", "transformer"])
def spec(request, tiny_config):
    return next(r for r in plan_runs(tiny_config) if r.arch == request.param and r.size == "tiny")


@pytest.fixture(scope="module")
def tokens_folder(tiny_tokens, spec):
    return tiny_tokens / "tokens" / spec.tokens_id


@pytest.fixture(scope="module")
def uninterrupted(spec, tokens_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, train(spec, tokens_folder, folder, QUIET)


def losses(folder):
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [(line["step"], line["train_loss"], line["val_loss"]) for line in map(json.loads, lines)]


def weights(folder):
    return load_file(folder / "final.ckpt")["model"]


def assert_same(folder, other):
    assert losses(folder) == losses(other)
    for name, value in weights(other).items():
        assert torch.equal(weights(folder)[name], value), name


def test_a_run_learns_and_leaves_its_result(spec, uninterrupted):
    folder, result = uninterrupted
    assert result["status"] == "ok"
    assert result["steps_done"] == spec.num_train_steps
    assert result["val_loss"] < math.log(spec.shape["vocab_size"]) - 1
    assert json.loads((folder / "result.json").read_text()) == result
    assert losses(folder)[-1][0] == spec.num_train_steps
    assert not list((folder / "checkpoints").glob("*"))
    entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert entries[-1]["flops"] == pytest.approx(spec.num_flops)
    assert all(0 < e["mfu"] < 1.5 and e["tokens_per_s"] > 0 and e["learning_rate"] > 0 for e in entries)


def test_the_held_out_tokens_are_read_as_often_as_is_said(spec, tokens_folder, tmp_path, monkeypatch):
    """`evaluations` times, the last at the end: what costs and times of jobs count (`RunSpec.validation_flops`)."""
    spec = replace(spec, num_train_steps=30, validation=spec.validation | {"evaluations": 3})
    validate, read = Trainer.validate, []
    monkeypatch.setattr(Trainer, "validate", lambda self: read.append(self.step) or validate(self))
    train(spec, tokens_folder, tmp_path, QUIET)
    assert read == [10, 20, 30]


def test_the_trained_model_loads_and_has_the_loss(spec, tokens_folder, uninterrupted):
    folder, result = uninterrupted
    trainer = Trainer(spec, Run(spec, tokens_folder, folder, QUIET).dataset, QUIET)
    trainer.model = load_trained(folder)
    assert trainer.validate() == result["val_loss"]


def test_a_finished_run_is_not_trained_again(spec, tokens_folder, uninterrupted, monkeypatch):
    folder, result = uninterrupted
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained again"))
    (folder / "result.json").unlink()  # what a workflow does before it starts a job
    assert train(spec, tokens_folder, folder, QUIET) == result
    assert (folder / "result.json").exists()


@pytest.mark.parametrize("stop_at", [1, 17, 41])
def test_resume_equals_uninterrupted(spec, tokens_folder, uninterrupted, tmp_path, monkeypatch, stop_at):
    original = Trainer.update

    def stopping(self, batch):
        if self.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "update", stopping)
    with pytest.raises(Preempted, match=f"saved at step {stop_at + 1}"):
        train(spec, tokens_folder, tmp_path, QUIET)
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(Trainer, "update", original)
    result = train(spec, tokens_folder, tmp_path, QUIET)
    assert result["val_loss"] == uninterrupted[1]["val_loss"]
    assert_same(tmp_path, uninterrupted[0])


def test_killed_between_checkpoints(spec, tokens_folder, uninterrupted, tmp_path, monkeypatch):
    """A run that dies like from SIGKILL goes on from its last checkpoint, also where the newest one is damaged."""
    original = Trainer.update

    def dying(self, batch):
        if self.step == 30:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Trainer, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        train(spec, tokens_folder, tmp_path, replace(QUIET, checkpoint_interval_s=0.0))
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda p: int(p.stem.split("-")[1]))
    newest.write_bytes(newest.read_bytes()[:-7])
    with (tmp_path / "history.jsonl").open("a") as history:
        history.write('{"step": 31, "torn')
    monkeypatch.setattr(Trainer, "update", original)
    train(spec, tokens_folder, tmp_path, QUIET)
    assert_same(tmp_path, uninterrupted[0])


@pytest.mark.parametrize("spec", ["xlstm", pytest.param("transformer", marks=pytest.mark.exhaustive)], indirect=True)
def test_same_bits_in_another_process_with_a_busy_neighbour(spec, tokens_folder, uninterrupted, tmp_path, tiny_tokens):
    """As a fresh process, forked from a warm one, two at once."""
    plan = tmp_path / "plan.json"
    from dataclasses import asdict

    from omegaconf import OmegaConf

    from xlstm_scaling.study.schemas import HardwareConfig

    hardware = OmegaConf.to_container(OmegaConf.structured(HardwareConfig))
    plan.write_text(json.dumps({"hardware": hardware, "runs": [asdict(spec)], "study": "t", "corpus": "c"}))
    environment = dict(os.environ)
    open_session(environment)
    children = []
    for name, env in (("fresh", os.environ), ("warm", environment), ("warm2", environment)):
        results = tmp_path / name
        results.mkdir()
        (results / "tokens").symlink_to(tiny_tokens / "tokens")
        command = [sys.executable, "-m", "xlstm_scaling.cli", "train", "--results", str(results), "--plan", str(plan)]
        command += ["--run", spec.run_id, "--quiet", "--uncertified"]
        children.append(subprocess.Popen(command, env=dict(env), stdout=subprocess.PIPE, text=True))
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        assert "validation loss" in output
    for name in ("fresh", "warm", "warm2"):
        assert_same(tmp_path / name / "runs" / spec.run_id, uninterrupted[0])


def test_micro_batches_change_rounding_only(spec, tokens_folder, uninterrupted, tmp_path):
    result = train(spec, tokens_folder, tmp_path, replace(QUIET, micro_batch_sequences=2))
    assert result["identity"] == uninterrupted[1]["identity"]
    assert result["val_loss"] == pytest.approx(uninterrupted[1]["val_loss"], rel=1e-3)


def poison(monkeypatch, steps, factor):
    """Multiply the loss of these training steps."""
    original = LanguageModel.loss
    calls = iter(range(10**9))

    def poisoned(self, *args):
        loss = original(self, *args)
        return loss * factor if torch.is_grad_enabled() and next(calls) in steps else loss

    monkeypatch.setattr(LanguageModel, "loss", poisoned)


@pytest.mark.parametrize("factor", [math.nan, math.inf, 4.0])
def test_a_bad_step_is_skipped_and_counted(spec, tokens_folder, tmp_path, monkeypatch, uninterrupted, factor):
    poison(monkeypatch, {8, 20, 21}, factor)
    result = train(spec, tokens_folder, tmp_path, QUIET)
    assert result["status"] == "ok"
    assert result["skipped_steps"] == 3
    assert result["steps_done"] == spec.num_train_steps
    assert result["val_loss"] == pytest.approx(uninterrupted[1]["val_loss"], rel=0.15)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert history[-1]["skipped_steps"] == 3
    assert all(entry["train_loss"] is None or entry["train_loss"] < 6 for entry in history)


def test_losses_that_stay_nan_mark_the_run_as_diverged(spec, tokens_folder, tmp_path, monkeypatch):
    poison(monkeypatch, range(8, 1000), math.nan)
    result = train(spec, tokens_folder, tmp_path, QUIET)
    assert result["status"] == "diverged"
    assert "6 steps in a row" in result["detail"]
    assert "step 13" in result["detail"]
    assert result["steps_done"] < spec.num_train_steps
    assert math.isnan(result["val_loss"])


def test_a_runaway_loss_marks_the_run_as_diverged(spec, tokens_folder, tmp_path):
    wild = replace(spec, learning_rate=30.0, warmup_steps=0, guard=spec.guard | {"loss_factor": 1.05})
    result = train(wild, tokens_folder, tmp_path, QUIET)
    assert result["status"] == "diverged"
    assert "times its start" in result["detail"] or "skipped" in result["detail"]


def test_truncated_shard_is_refused(spec, tokens_folder, tmp_path):
    import shutil

    from xlstm_scaling.corpus import CorpusError

    copy = tmp_path / "tokens"
    shutil.copytree(tokens_folder, copy)
    shard = copy / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorpusError, match=r"train-00000\.bin"):
        train(spec, copy, tmp_path / "run", QUIET)


def test_other_tokens_are_another_run(spec, tokens_folder, tmp_path, uninterrupted, monkeypatch):
    """The digest of the tokens is part of the identity: the folder's old result does not count."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[0], folder)
    run = Run(spec, tokens_folder, folder, QUIET)
    assert run.finished_result() is not None
    run.identity = "other tokens"
    assert run.finished_result() is None


def test_sigterm_saves_and_exits_with_its_code(tiny_config, tiny_tokens, tmp_path):
    """A long run as a process: SIGTERM -> checkpoint and exit status 85; started again it goes on."""
    import time
    from dataclasses import asdict

    from omegaconf import OmegaConf

    from xlstm_scaling.study.schemas import HardwareConfig

    long = next(r for r in plan_runs(tiny_config) if r.arch == "transformer")
    long = replace(long, num_train_steps=100_000)
    hardware = OmegaConf.to_container(OmegaConf.structured(HardwareConfig))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"hardware": hardware, "runs": [asdict(long)], "study": "t", "corpus": "c"}))
    (tmp_path / "tokens").symlink_to(tiny_tokens / "tokens")
    command = [sys.executable, "-m", "xlstm_scaling.cli", "train", "--results", str(tmp_path), "--plan", str(plan)]
    command += ["--run", long.run_id, "--quiet", "--uncertified"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs" / long.run_id
    deadline = time.monotonic() + 60
    while not (folder / "history.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == EXIT_PREEMPTED, errors
    assert "run it again to go on" in errors
    assert len(list((folder / "checkpoints").glob("*.ckpt"))) == 1


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_blocks_learn_the_same_and_fill_the_cache(spec, tokens_folder, tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # and not where an earlier test compiled
    folder, result = uninterrupted
    compiled = train(spec, tokens_folder, tmp_path / "run", replace(QUIET, compile_cache=tmp_path / "cache"))
    assert compiled["val_loss"] == pytest.approx(result["val_loss"], rel=1e-3)
    assert any((tmp_path / "cache").rglob("*.so")) or any((tmp_path / "cache").rglob("*.cpp"))
    assert weights(tmp_path / "run").keys() == weights(folder).keys()
