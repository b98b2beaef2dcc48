"""Several processes that want the same run or the same tokens: made once, taken over from the dead, never mixed."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from xlstm_scaling import stages
from xlstm_scaling.study import locks
from xlstm_scaling.study.locks import LockLost, lock_path, lock_state
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.training.checkpoint import load_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.run import Run, train
from xlstm_scaling.training.trainer import Trainer

SAVING = Execution(progress=False, checkpoint_interval_s=0)  # a checkpoint after every step
STEP = 3


@pytest.fixture(scope="module")
def spec(tiny_config):
    return next(run for run in plan_runs(tiny_config) if run.size == "tiny")


@pytest.fixture(scope="module")
def tokens_folder(tiny_tokens, spec):
    return tiny_tokens / "tokens" / spec.tokens_id


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch):
    monkeypatch.setattr(locks, "POLL_S", 0.02)
    monkeypatch.setattr("xlstm_scaling.training.run.POLL_S", 0.02)


def start(function, *arguments):
    """A process of its own; a fork, so that torch need not be imported again."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    return child


def wait_for(path):
    for _ in range(60_000):
        if path.exists():
            return
        time.sleep(0.001)
    pytest.fail(f"{path} did not come")


def train_noted(spec, tokens_folder, folder, notes):
    """Train, and note it where a training really begins."""
    began = Run.train

    def noting(self):
        (notes / f"trained-by-{os.getpid()}").touch()
        return began(self)

    Run.train = noting
    torch.set_num_threads(1)
    result = train(spec, tokens_folder, folder, SAVING)
    (notes / f"result-{os.getpid()}").write_text(json.dumps(result))


def train_until(spec, tokens_folder, folder, notes):
    """Train, and hold at a step until told to go on; note how it ended."""
    update = Trainer.update

    def holding(self, batch):
        if self.step == STEP:
            (notes / "holding").touch()
            wait_for(notes / "go")
        return update(self, batch)

    Trainer.update = holding
    torch.set_num_threads(1)
    try:
        train(spec, tokens_folder, folder, SAVING)
    except LockLost as error:
        (notes / "lost").write_text(str(error))


def outcome(folder):
    entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    curve = [(entry["step"], entry["train_loss"], entry["val_loss"]) for entry in entries]
    result = json.loads((folder / "result.json").read_text())
    return curve, result["val_loss"], load_file(folder / "final.ckpt")["model"]


def assert_same(folder, other):
    (curve, loss, weights), (curve_too, loss_too, weights_too) = outcome(folder), outcome(other)
    assert (curve, loss) == (curve_too, loss_too)
    for name, value in weights_too.items():
        assert torch.equal(weights[name], value), name


@pytest.fixture(scope="module")
def alone(spec, tokens_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(spec, tokens_folder, folder, SAVING)
    return folder


def test_two_starters_of_a_run_train_it_once(spec, tokens_folder, alone, tmp_path):
    notes, folder = tmp_path / "notes", tmp_path / "run"
    notes.mkdir()
    children = [start(train_noted, spec, tokens_folder, folder, notes) for _ in range(3)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(list(notes.glob("trained-by-*"))) == 1
    results = [path.read_text() for path in notes.glob("result-*")]
    assert len(results) == 3
    assert len(set(results)) == 1
    assert_same(folder, alone)
    assert lock_state(folder) is None


def test_a_killed_starters_run_is_taken_over(spec, tokens_folder, alone, tmp_path, caplog):
    folder = tmp_path / "run"
    child = start(train_until, spec, tokens_folder, folder, tmp_path)
    wait_for(tmp_path / "holding")
    assert lock_state(folder).owner.pid == child.pid
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with caplog.at_level("INFO"):
        train(spec, tokens_folder, folder, SAVING)
    assert f"process {child.pid}" in caplog.text
    assert f"resumes at step {STEP}" in caplog.text
    assert_same(folder, alone)


def contents(folder):
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_starter_that_wakes_after_the_take_over_writes_nothing(spec, tokens_folder, alone, tmp_path):
    folder = tmp_path / "run"
    child = start(train_until, spec, tokens_folder, folder, tmp_path)
    wait_for(tmp_path / "holding")
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    before = time.time() - 10 * locks.STALE_S
    os.utime(lock_path(folder, 1), (before, before))  # as if it had been silent for long
    train(spec, tokens_folder, folder, SAVING)
    left = contents(folder)
    (tmp_path / "go").touch()
    os.kill(child.pid, signal.SIGCONT)
    child.join()
    assert child.exitcode == 0
    assert "stops without writing" in (tmp_path / "lost").read_text()
    assert contents(folder) == left
    assert_same(folder, alone)


def make_tokens(config, results, notes):
    meta = stages.tokens(config, StudyPaths.of(config, results), progress=False, workers=1)
    (notes / f"meta-{os.getpid()}").write_text(json.dumps(meta))


def test_a_shared_corpus_is_tokenized_once(tiny_config, tiny_tokens, tmp_path, monkeypatch):
    from xlstm_scaling.corpus import build

    whole = build.build_tokens

    def noting(*arguments, **options):
        (tmp_path / f"built-by-{os.getpid()}").touch()
        wait_for(tmp_path / "go")
        return whole(*arguments, **options)

    monkeypatch.setattr(build, "build_tokens", noting)
    children = [start(make_tokens, tiny_config, tmp_path / "results", tmp_path) for _ in range(2)]
    folder = StudyPaths.of(tiny_config, tmp_path / "results").tokens
    wait_for(folder / "lock-1.json")
    (tmp_path / "go").touch()
    for child in children:
        child.join()
        assert child.exitcode == 0
    # the second starter may have come when the first was done: then the tokens are made anew, with the same bytes
    metas = {path.read_text() for path in tmp_path.glob("meta-*")}
    assert len(metas) == 1
    expected = StudyPaths.of(tiny_config, tiny_tokens).tokens
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made.keys() == {path.name for path in Path(expected).iterdir()}
    assert all(content == (expected / name).read_bytes() for name, content in made.items() if name.endswith(".bin"))
