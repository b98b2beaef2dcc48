"""The paper's first three experiments are targets, each with what it alone needs; test_workflow.py runs them."""

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
