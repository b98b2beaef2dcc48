"""The stages in order on a tiny corpus, by hand; the command line's manners."""

import json

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling import stages
from xlstm_scaling.cli import run_command
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.study.runs import TableError, read_runs, validate_runs


@pytest.fixture(scope="module")
def study(tiny_config, tiny_tokens):
    """All runs of the tiny study trained and collected."""
    paths = StudyPaths.of(tiny_config, tiny_tokens)
    stages.plan(tiny_config, paths)
    content, specs = stages.load_plan(paths.plan / "plan.json")
    for spec in specs:
        stages.train(spec, content["hardware"], tiny_tokens, progress=False)
    stages.runs(paths)
    return paths


def test_the_table_of_runs(study, tiny_config):
    runs = read_runs(study.study / "runs.parquet")
    plan = plan_runs(tiny_config)
    assert list(runs.run_id) == [run.run_id for run in plan]
    assert (runs.status == "ok").all()
    assert runs.val_loss.between(0.5, 6).all()
    assert np.allclose(runs.num_flops, [run.num_flops for run in plan])
    bits = runs.val_bits_per_byte / runs.val_loss
    assert np.allclose(bits, bits[0])
    csv = pd.read_csv(study.study / "runs.csv")
    assert np.allclose(csv.val_loss, runs.val_loss)
    curves = pd.read_parquet(study.study / "curves.parquet")
    assert set(curves.run_id) == set(runs.run_id)
    assert (curves.groupby("run_id").step.max().reindex(runs.run_id) == runs.num_train_steps.to_numpy()).all()


def test_every_result_has_its_configuration(study):
    for name in (study.plan / "config.yaml", study.tokens / "config.yaml"):
        assert "vocab_size: 280" in name.read_text()
    run = next(study.runs.iterdir())
    assert json.loads((run / "spec.json").read_text())["seed"] == 0


def test_a_diverged_run_stays_in_the_table_and_out_of_the_fits(study, tiny_config, tiny_tokens):
    from xlstm_scaling.fitting.tables import usable_runs

    runs = read_runs(study.study / "runs.parquet")
    runs.loc[0, ["status", "val_loss", "train_loss", "val_bits_per_byte"]] = ["diverged", np.nan, np.nan, np.nan]
    assert len(validate_runs(runs)) == len(runs)
    assert len(usable_runs(runs)) == len(runs) - 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("val_loss", -1.0, "val_loss"), ("status", "lost", "status"), ("num_params", 0, "num_params"),
     ("val_loss", np.nan, "without val_loss")],
)  # fmt: skip
def test_a_table_that_breaks_its_schema_is_refused(study, column, value, message):
    runs = read_runs(study.study / "runs.parquet")
    runs.loc[1, column] = value
    with pytest.raises(TableError, match=message):
        validate_runs(runs)
    with pytest.raises(TableError, match=column):
        validate_runs(runs.drop(columns=column))


def test_a_run_shared_by_two_studies_is_trained_once(study, tiny_config, tiny_tokens, monkeypatch):
    from xlstm_scaling.training.trainer import Run

    monkeypatch.setattr(Run, "_train", lambda self: pytest.fail("trained again"))
    content, specs = stages.load_plan(study.plan / "plan.json")
    result = stages.train(specs[0], content["hardware"], tiny_tokens, progress=False)
    assert result["status"] == "ok"


def test_status_of_a_study(study, tiny_config):
    table = stages.status(tiny_config, study)
    assert (table.state == "ok").all()
    elsewhere = StudyPaths(study.results / "nowhere", study.name, study.tokens_id)
    assert (stages.status(tiny_config, elsewhere).state == "pending").all()


def test_missing_stages_say_what_to_run(tiny_config, tmp_path):
    paths = StudyPaths.of(tiny_config, tmp_path)
    with pytest.raises(FileNotFoundError, match="run the stage `plan` first"):
        stages.runs(paths)
    stages.plan(tiny_config, paths)
    with pytest.raises(FileNotFoundError, match="run the stage `train` first"):
        stages.runs(paths)
    content, specs = stages.load_plan(paths.plan / "plan.json")
    with pytest.raises(FileNotFoundError, match="run the stage `tokens` first"):
        stages.train(specs[0], content["hardware"], tmp_path)
    with pytest.raises(FileNotFoundError, match="run the stage `runs` first"):
        read_runs(paths.study / "runs.parquet")


def test_a_corpus_too_small_for_the_plan_is_refused(tiny_config, tiny_overrides, tiny_tokens):
    from xlstm_scaling.study.config import compose

    config = compose([*tiny_overrides, "study.isoflop.c32.budget_flops=1e12"])
    with pytest.raises(ValueError, match="corpus too small for the plan"):
        stages.plan(config, StudyPaths.of(config, tiny_tokens))


# the command line


def test_help_lists_the_stages(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for stage in ("tokens", "plan", "train", "runs", "fit", "inference", "figures", "count"):
        assert stage in text


@pytest.mark.parametrize("arch", ["xlstm", "transformer"])
@pytest.mark.parametrize("convention", ["paper", "chinchilla", "tfla", "6nd", "traced"])
def test_count_prints_json(capsys, arch, convention):
    words = f"count --arch {arch} --embedding-dim 128 --num-blocks 2 --num-heads 2 --vocab-size 1000"
    assert run_command([*words.split(), "--context-length", "256", "--convention", convention, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    parts = counts["flops_linear"] + counts["flops_sequence_mixing"] + counts["flops_other"]
    assert counts["flops_forward"] == parts
    assert counts["flops_forward_backward"] == 3 * parts
    assert counts["num_params"] > 256_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan study=nope", "Available options"),
        ("tokens corpus=folder corpus.path=/does/not/exist", "/does/not/exist"),
        ("count --arch xlstm --embedding-dim 10 --num-blocks 1 --num-heads 3 --vocab-size 9 --context-length 4",
         "not divisible"),
        ("train study=smoke", "name a run with --run"),
        ("train study=smoke --run nothing", "no run matches 'nothing'"),
        ("fit study=smoke", "run the stage"),
    ],
)  # fmt: skip
def test_errors_are_one_line_without_a_traceback(capsys, tmp_path, words, message):
    results = [] if words.startswith("count") else ["--results", str(tmp_path)]
    assert run_command([*words.split(), *results]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
