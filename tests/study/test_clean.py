"""What `clean` removes, and above all what it does not."""

import json
from dataclasses import asdict, replace

import pytest

from xlstm_scaling import cli
from xlstm_scaling.study import run_spec
from xlstm_scaling.study.clean import leftovers
from xlstm_scaling.study.locks import Owner, folder_locked, lock_path
from xlstm_scaling.study.plan import plan_runs


@pytest.fixture
def specs(tiny_config):
    return plan_runs(tiny_config)


def leave(folder, spec, finished=True):
    """A run's folder as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(asdict(spec)))
    if finished:
        for name in ("result.json", "final.ckpt"):
            (folder / name).write_text("{}")
    return folder


@pytest.fixture
def results(tmp_path, specs, monkeypatch):
    """A study that plans two runs; a third one of this code; and one of older code with its log."""
    results = tmp_path / "results"
    (results / "one" / "plan").mkdir(parents=True)
    (results / "one" / "plan" / "plan.json").write_text(json.dumps({"runs": [asdict(spec) for spec in specs[:2]]}))
    for spec in specs[:3]:
        leave(results / "runs" / spec.run_id, spec)
    with monkeypatch.context() as patched:
        patched.setattr(run_spec, "BEHAVIOUR_VERSION", run_spec.BEHAVIOUR_VERSION - 1)
        old = replace(specs[0])
        leave(results / "runs" / old.run_id, old)
    log = results / "logs" / "runs" / f"{old.run_id}.log"
    log.parent.mkdir(parents=True)
    log.touch()
    return results, old.run_id


def names(results):
    return {path.name for path in (results / "runs").iterdir()}


def clean(results, *words):
    assert cli.run_command(["clean", "--results", str(results), *words]) == 0


def test_runs_of_older_code_go_and_those_of_this_code_stay(results, specs, capsys):
    folder, old = results
    before = names(folder)
    clean(folder, "--dry-run")
    assert old in capsys.readouterr().out
    assert names(folder) == before
    clean(folder)
    assert names(folder) == before - {old}
    assert not (folder / "logs" / "runs" / f"{old}.log").exists()
    clean(folder)
    assert "0 leftovers" in capsys.readouterr().out


def test_runs_of_this_code_go_only_if_asked_and_not_planned(results, specs):
    folder, _ = results
    clean(folder, "--unneeded")
    assert names(folder) == {spec.run_id for spec in specs[:2]}


def test_a_run_of_older_code_stays_while_a_plan_names_it(results, capsys):
    folder, old = results
    (folder / "one" / "plan" / "plan.csv").write_text(f"run_id,size\n{old},tiny\n")
    clean(folder)
    assert old in names(folder)
    assert "plan that study again" in capsys.readouterr().out


def test_without_a_plan_nothing_whole_goes(results):
    folder, _ = results
    (folder / "one" / "plan" / "plan.json").unlink()
    before = names(folder)
    clean(folder, "--unneeded")
    assert names(folder) == before


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(results, specs):
    folder, _ = results
    dead, alive = (folder / "runs" / spec.run_id for spec in specs[:2])
    lock_path(dead, 1).write_text(json.dumps(asdict(replace(Owner.here(), started="1"))))
    for run in (dead, alive):
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / ".step-3.ckpt.x.tmp").touch()
        (run / "checkpoints" / "step-2.ckpt").touch()
    with folder_locked(alive, "the run"):
        clean(folder)
        assert lock_path(alive, 1).exists()
        assert (alive / "checkpoints" / ".step-3.ckpt.x.tmp").exists()
    assert sorted(path.name for path in dead.iterdir()) == ["final.ckpt", "result.json", "spec.json"]


def test_an_unfinished_runs_checkpoints_stay(results, specs):
    folder, _ = results
    run = leave(folder / "runs" / specs[3].run_id, specs[3], finished=False)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-2.ckpt").touch()
    assert not any(run in (one.path, *one.path.parents) for one in leftovers(folder))
