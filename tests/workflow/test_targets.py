"""The paper's first three experiments are targets, each with what it alone needs."""

import json
import os
import shutil

import pandas as pd
import pytest
from calls import planned, snakemake

EXPERIMENTS = ("isoflop_sweep", "latency_profile", "context_scaling")
TRAINING = {"tokens", "plan", "certify", "train_run"}


def rules(target, cwd, *words):
    return planned(snakemake("-n", target, *(words or ("--config", "study=smoke")), cwd=cwd))


def test_isoflop_sweep_trains_the_isoflop_runs_alone(tmp_path):
    jobs = rules("isoflop_sweep", tmp_path)
    assert jobs.keys() == TRAINING | {"isoflop_sweep_tables", "isoflop_sweep"}
    assert jobs["train_run"] == 28  # 4 + 5 + 5 sizes, two architectures; not the 8 of the token/param set


def test_latency_profile_trains_nothing(tmp_path):
    assert rules("latency_profile", tmp_path) == {"latency_profile_tables": 1, "latency_profile": 1}


def test_context_scaling_trains_pairs_and_plans_those_that_the_study_lacks(tmp_path):
    jobs = rules("context_scaling", tmp_path)
    assert jobs.keys() == TRAINING | {"context_plan", "context_scaling_tables", "context_scaling"}
    assert jobs["train_run"] == 12  # three sizes, two contexts, two architectures


def test_the_study_does_not_wait_for_its_experiments(tmp_path):
    assert not set(rules("all", tmp_path)) & {*EXPERIMENTS, "context_plan"}


def test_a_study_without_isoflop_runs_says_so(tmp_path):
    text = snakemake("-n", "context_scaling", "--config", "study=single", cwd=tmp_path, check=False)
    assert "no IsoFLOP runs" in text


TWO_CONTEXTS = "+study.isoflop.c64={context_length: 64, budget_flops: 4.0e+8, sizes: [tiny, small, mid, big]}"


@pytest.mark.slow
def test_experiments_run_and_say_where_their_outputs_are(tiny_overrides, text_folder, tmp_path):
    overrides = [f"corpus.path={text_folder}", TWO_CONTEXTS, "inference.profile.size=d32b1"]
    overrides += ["inference.profile.prefill_lengths=[16,32]", "inference.profile.max_cell_s=1e3"]
    words = ["--config", "study=tiny", f"overrides={json.dumps(overrides)}"]
    conf = os.environ["XLSTM_SCALING_CONF"]
    text = snakemake(*EXPERIMENTS, *words, cwd=tmp_path, conf=conf)
    study = tmp_path / "results" / "tiny"
    for name, figure in zip(EXPERIMENTS, ("isoflop_curves", "latency_profile", "context_scaling")):
        assert f"figure figures/{figure}.svg" in text
        assert (study / name / "figures" / f"{figure}.png").stat().st_size > 1000
    assert not (study / "runs.parquet").exists()  # nothing else was made
    profile = pd.read_parquet(study / "latency_profile" / "inference" / "measurements.parquet")
    assert profile["status"].tolist() == ["ok"] * 4
    twins = pd.read_parquet(study / "context_scaling" / "context_scaling.parquet")
    assert (twins["status"] == "ok").all() and set(twins["source"]) == {"study", "extra"}
    assert (twins["tokens_ratio"] == 1).all()
    assert "Nothing to be done" in snakemake(*EXPERIMENTS, *words, cwd=tmp_path, conf=conf)
    # settings of one experiment concern it alone; drawing again measures nothing
    changed = [*words[:-1], f"overrides={json.dumps([*overrides, 'inference.profile.repeats=1'])}"]
    assert rules("latency_profile", tmp_path, *changed) == {"latency_profile_tables": 1, "latency_profile": 1}
    assert "isoflop_sweep" not in planned(snakemake("-n", *EXPERIMENTS, *changed, cwd=tmp_path, conf=conf))
    shutil.rmtree(study / "latency_profile" / "figures")
    assert rules("latency_profile", tmp_path, *words) == {"latency_profile": 1}
