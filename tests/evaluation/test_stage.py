"""The stage `evaluate`: which runs it takes, what it needs and writes, and its settings."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling import stages
from xlstm_scaling.cli import run_command
from xlstm_scaling.corpus import TokenDataset
from xlstm_scaling.evaluation.length import COLUMNS
from xlstm_scaling.evaluation.selection import best_runs, evaluated_runs
from xlstm_scaling.study.config import ConfigError, compose, to_dict
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import plan_runs


def test_the_settings_are_typed_and_unknown_ones_refused():
    assert to_dict(compose(["evaluation=smoke"]))["evaluation"]["max_documents"] == 8
    for override, message in (
        ("+evaluation.extra=1", "extra"),
        ("evaluation.num_runs=some", "could not be converted to Integer"),
    ):
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            compose([override])


def test_runs_of_the_largest_budget_are_evaluated_at_each_context():
    def spec(arch, context, budget, size):
        run_id = f"{arch}-{context}-{budget}-{size}"
        return SimpleNamespace(run_id=run_id, arch=arch, context_length=context, isoflop_tag=budget, num_params=size)

    runs = [spec(a, 64, h, n) for a in ("xlstm", "transformer") for h in (1e9, 3e9, None) for n in (10, 30, 20)]
    runs += [spec("xlstm", 128, None, n) for n in (5, 7)]

    def config(choose, num_runs=1):
        evaluation = SimpleNamespace(choose=choose, num_runs=num_runs)
        return SimpleNamespace(evaluation=evaluation, study=SimpleNamespace(architectures=["xlstm", "transformer"]))

    def names(found):
        return [run.run_id for run in found]

    largest = evaluated_runs(config("largest"), runs)
    assert names(largest) == [f"{a}-64-{3e9}-30" for a in ("xlstm", "transformer")] + ["xlstm-128-None-7"]
    candidates = evaluated_runs(config("best"), runs)
    assert len(candidates) == 8
    results = {run.run_id: {"status": "ok", "val_loss": 4 - run.num_params / 100} for run in candidates}
    results[f"xlstm-64-{3e9}-30"] = {"status": "diverged", "val_loss": np.nan}
    expected = [f"xlstm-64-{3e9}-20", f"transformer-64-{3e9}-30", "xlstm-128-None-7"]
    assert names(best_runs(candidates, results, 1)) == expected
    assert len(best_runs(candidates, results, 2)) == 6
    with pytest.raises(ConfigError, match=r"evaluation\.choose must be best or largest"):
        evaluated_runs(config("some"), runs)


def test_the_stage_writes_the_table_and_its_settings(tiny_overrides, tiny_tokens):
    """Two tiny runs trained for it; a context of 32 tokens, documents of hundreds."""
    settings = {"choose": "largest", "multiple": 4, "max_documents": 3, "min_tokens": 5}
    overrides = [*tiny_overrides, *(f"evaluation.{key}={value}" for key, value in settings.items())]
    config = compose([*overrides, "training.seed=11"])
    paths = StudyPaths.of(config, tiny_tokens)
    with pytest.raises(FileNotFoundError, match="run the stage `train` first"):
        stages.evaluate(config, paths, progress=False)
    hardware = to_dict(config.hardware)
    chosen = evaluated_runs(config, plan_runs(config))
    assert [run.size for run in chosen] == ["big", "big"]
    for run in chosen:
        stages.train(run, hardware, tiny_tokens, progress=False, uncertified=True)
    words = [*overrides, "training.seed=11", "--results", str(tiny_tokens), "--quiet"]
    assert run_command(["evaluate", *words]) == 0
    table = pd.read_parquet(paths.evaluation / "length.parquet")
    assert list(table.columns) == list(COLUMNS)
    assert len(pd.read_csv(paths.evaluation / "length.csv")) == len(table)
    assert list(table.run_id.unique()) == [run.run_id for run in chosen]
    assert "multiple: 4.0" in (paths.evaluation / "config.yaml").read_text()
    near = table[(table.position_max <= 32) & (table.position_min > 8)]
    for run_id, rows in near.groupby("run_id"):
        mean = (rows.loss * rows.num_targets).sum() / rows.num_targets.sum()
        assert mean == pytest.approx(rows.val_loss.iloc[0], rel=0.15), run_id


def test_documents_of_a_split(tiny_config, tiny_tokens):
    split = TokenDataset.open(StudyPaths.of(tiny_config, tiny_tokens).tokens).split("validation")
    offsets = split.document_offsets
    assert offsets.size == split.num_documents + 1
    assert offsets[0] == 0 and offsets[-1] == split.num_tokens and offsets.dtype == np.int64
    marks = split.document_starts(np.array([0]), split.num_tokens)[0]
    assert np.array_equal(np.flatnonzero(marks), offsets[:-1])


def test_published_runs_have_nothing_to_evaluate(tmp_path):
    config = compose(["runs=published", "study=paper", f"runs.folder={tmp_path}"])
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        stages.evaluate(config, StudyPaths.of(config, tmp_path))
