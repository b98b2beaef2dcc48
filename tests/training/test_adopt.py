"""Results folders that are moved and adopted elsewhere: verified, taken over, never overwritten."""

import json
import shutil
from pathlib import Path

import pytest

from xlstm_scaling import cli
from xlstm_scaling.study.locks import folder_locked
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.training.adopt import ADOPTED, HERE, REFUSED, WOULD, adopt
from xlstm_scaling.training.checkpoint import load_file, save_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.run import train


@pytest.fixture(scope="module")
def specs(tiny_config):
    return [run for run in plan_runs(tiny_config) if run.size == "tiny"]


@pytest.fixture(scope="module")
def trained(specs, tiny_tokens, tmp_path_factory):
    """A results folder with tokens and two runs."""
    results = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_tokens / "tokens", results / "tokens")
    for spec in specs:
        train(spec, results / "tokens" / spec.tokens_id, results / "runs" / spec.run_id, Execution(progress=False))
    return results


@pytest.fixture
def source(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "source"))


def states(said):
    return {one.name: one.state for one in said}


def run_folder(results, spec):
    return results / "runs" / spec.run_id


@pytest.mark.parametrize("way", ["copy", "link", "move"])
def test_runs_and_tokens_are_taken_over(source, specs, tmp_path, way):
    names = {path.name for kind in ("tokens", "runs") for path in (source / kind).iterdir()}
    results = tmp_path / "results"
    before = {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    planned = adopt(source, results, way, dry_run=True, progress=False)
    assert states(planned) == dict.fromkeys(names, WOULD)
    assert not results.exists()
    assert states(adopt(source, results, way, progress=False)) == dict.fromkeys(names, ADOPTED)
    after = {path.relative_to(results): path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert after == before
    if way == "move":
        assert not any(path.is_file() for path in source.rglob("*"))
    else:
        assert states(adopt(source, results, way, progress=False)) == dict.fromkeys(names, HERE)
    tokens = max(path.stat().st_mtime_ns for path in (results / "tokens").rglob("*") if path.is_file())
    assert all((run_folder(results, spec) / "result.json").stat().st_mtime_ns >= tokens for spec in specs)


def test_an_adopted_run_is_not_trained_again(source, specs, tmp_path, monkeypatch):
    from xlstm_scaling.training.run import Run

    adopt(source, tmp_path / "results", progress=False)
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained again"))
    folder = run_folder(tmp_path / "results", specs[0])
    train(specs[0], tmp_path / "results" / "tokens" / specs[0].tokens_id, folder, Execution(progress=False))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate_curve(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


DAMAGES = {
    "weights": (lambda folder: flip(folder / "final.ckpt"), "digest does not match"),
    "result": (lambda folder: edit(folder / "result.json", val_loss=1.0), "not what was saved with the weights"),
    "identity": (lambda folder: edit(folder / "result.json", tokens_digest="x"), "identity is not that of its plan"),
    "plan": (lambda folder: edit(folder / "spec.json", seed=77), "its plan belongs to"),
    "curve": (lambda folder: truncate_curve(folder / "history.jsonl"), "history.jsonl does not end"),
    "no weights": (lambda folder: (folder / "final.ckpt").unlink(), "final.ckpt"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_run_is_refused_and_the_others_are_not(source, specs, tmp_path, what):
    damage, message = DAMAGES[what]
    damage(run_folder(source, specs[0]))
    said = {one.name: one for one in adopt(source, tmp_path / "results", progress=False)}
    assert said[specs[0].run_id].state == REFUSED
    assert message in said[specs[0].run_id].reason
    assert said[specs[1].run_id].state == ADOPTED
    assert not run_folder(tmp_path / "results", specs[0]).exists()


def test_damaged_tokens_are_refused(source, specs, tmp_path):
    flip(next((source / "tokens" / specs[0].tokens_id).glob("train-*.bin")))
    assert states(adopt(source, tmp_path / "results", progress=False))[specs[0].tokens_id] == REFUSED


def test_a_finished_run_is_never_overwritten(source, trained, specs, tmp_path):
    """Another result of the same run, intact in itself: as from hardware that rounds differently."""
    folder = run_folder(source, specs[0])
    content = load_file(folder / "final.ckpt")
    content["result"]["val_loss"] += 1e-3
    save_file(folder / "final.ckpt", content)
    edit(folder / "result.json", val_loss=content["result"]["val_loss"])
    results = Path(shutil.copytree(trained, tmp_path / "results"))
    before = (run_folder(results, specs[0]) / "result.json").read_bytes()
    said = {one.name: one for one in adopt(source, results, "move", progress=False)}
    assert said[specs[0].run_id].state == REFUSED
    assert "val_loss" in said[specs[0].run_id].reason
    assert said[specs[1].run_id].state == HERE
    assert (run_folder(results, specs[0]) / "result.json").read_bytes() == before
    assert (folder / "result.json").exists()


def test_runs_of_other_tokens_are_refused(source, specs, tmp_path):
    results = tmp_path / "results"
    meta = results / "tokens" / specs[0].tokens_id / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"digest": "of another text"}))
    said = {one.name: one for one in adopt(source / "runs", results, progress=False)}
    assert all("other tokens" in said[spec.run_id].reason for spec in specs)


def test_a_run_at_work_is_left_alone(source, specs, tmp_path):
    with folder_locked(run_folder(source, specs[0]), "the run"):
        said = {one.name: one for one in adopt(run_folder(source, specs[0]), tmp_path / "results", progress=False)}
    assert "at work" in said[specs[0].run_id].reason


def test_an_unfinished_run_goes_on_elsewhere(specs, trained, tmp_path, caplog):
    """With a checkpoint it is adopted; where it has been begun already, that stays."""
    from xlstm_scaling.study.errors import Preempted
    from xlstm_scaling.training.run import Run

    spec, tokens = specs[0], trained / "tokens" / specs[0].tokens_id
    folder = tmp_path / "source" / "runs" / spec.run_id
    run = Run(spec, tokens, folder, Execution(progress=False, checkpoint_interval_s=0))
    run.stop = True  # as by SIGTERM: after the first step
    with pytest.raises(Preempted):
        run.execute()
    shutil.copytree(trained / "tokens", tmp_path / "results" / "tokens")
    (said,) = adopt(tmp_path / "source", tmp_path / "results", progress=False)
    assert said.state == ADOPTED
    assert "goes on from step-1" in said.reason
    (said,) = adopt(tmp_path / "source", tmp_path / "results", progress=False)
    assert said.state == HERE
    with caplog.at_level("INFO"):
        result = train(spec, tokens, run_folder(tmp_path / "results", spec), Execution(progress=False))
    assert "resumes at step 1" in caplog.text
    assert result["val_loss"] == json.loads((run_folder(trained, spec) / "result.json").read_text())["val_loss"]


def test_the_command(source, specs, tmp_path, capsys):
    words = ["adopt", str(source), "--results", str(tmp_path / "results"), "--quiet"]
    assert cli.run_command([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {ADOPTED: 3}
    assert cli.run_command(words) == 0
    assert "3 already here" in capsys.readouterr().out
    flip(run_folder(source, specs[0]) / "final.ckpt")
    assert cli.run_command(words) == 1
    assert cli.run_command(["adopt", str(tmp_path / "nowhere")]) == 1
    assert "no folder" in capsys.readouterr().err
