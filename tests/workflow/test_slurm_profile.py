"""The profile for Slurm: what a scheduler would see. On a real one: tests/cluster."""

import re
from collections import Counter

import pytest
import yaml
from calls import REPOSITORY, planned, snakemake
from omegaconf import OmegaConf

from xlstm_scaling.study.config import check, compose, to_dict
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.study.resources import PACKS, JobResources

FOLDER = REPOSITORY / "workflow" / "profiles" / "slurm"
PROFILE = ["--workflow-profile", str(FOLDER)]


@pytest.fixture(scope="module")
def profile():
    return yaml.safe_load((FOLDER / "config.yaml").read_text())


@pytest.fixture(scope="module")
def paper_study():
    return compose(["study=paper"])


def packs(config, profile, folder):
    """Kind of short run, None for those with a job of their own -> jobs that the scheduler sees."""
    runs = {run.run_id: run for run in plan_runs(config)}
    resources = JobResources(runs, {}, OmegaConf.to_object(config.hardware), folder)
    sizes = profile["group-components"] | {None: 1}
    return {kind: -(-count // sizes[kind]) for kind, count in Counter(map(resources.pack, runs)).items()}


def test_every_kind_of_short_run_is_packed_for_about_an_hour(profile):
    assert set(profile["group-components"]) == set(PACKS)
    assert all(PACKS[kind] * count <= 3600 for kind, count in profile["group-components"].items())
    assert profile["set-resource-scopes"] == {"runs_at_once": "local"}
    assert profile["resources"] == {"runs_at_once": 1}


def test_a_scheduler_sees_hundreds_of_jobs_whatever_the_study(paper_study, profile, tmp_path):
    assert packs(paper_study, profile, tmp_path) == {None: 640}  # hours each
    plain = to_dict(compose(["study=smoke"]))
    sizes = {f"d{16 * d}b{b}": {"embedding_dim": 16 * d, "num_blocks": b} for d in range(1, 11) for b in range(1, 6)}
    lengths = {"num_train_steps": [100 + 10 * number for number in range(50)], "batch_sequences": 4}
    cells = {"c128": {"context_length": 128, "sizes": list(sizes), **lengths}}
    plain["study"] |= {"sizes": sizes, "isoflop": {}, "tokenparam": cells}
    config = check(OmegaConf.create(plain))
    assert len(plan_runs(config)) == 5000
    assert sum(packs(config, profile, tmp_path).values()) < 500


def test_snakemake_packs_and_adds_up(profile, tmp_path):
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="make env-cluster installs it")
    text = snakemake("-n", *PROFILE, "--config", "study=smoke", "--group-components", "runs_15s=4", cwd=tmp_path)
    runs = planned(text)["train_run"]
    expected = packs(compose(["study=smoke"]), profile | {"group-components": dict.fromkeys(PACKS, 4)}, tmp_path)
    assert Counter(re.findall(r"Group job (\w+) ", text)) == {"runs_15s": expected["runs_15s"]}
    assert runs > 3 * expected["runs_15s"]


def test_the_papers_study_is_a_job_a_run_with_computed_resources(paper_study, tmp_path):
    hardware = OmegaConf.to_object(paper_study.hardware)
    runs = {run.run_id: run for run in plan_runs(paper_study)}
    resources = JobResources(runs, {}, hardware, tmp_path)
    minutes = {resources.minutes(run) for run in runs}
    assert len(minutes) > 20
    assert max(minutes) * 60 == hardware.max_job_time_s  # and longer runs go on in the next job
    by_size = sorted(runs, key=lambda run: runs[run].num_params)
    memory = [resources.memory_mb(run) for run in by_size]
    assert memory == sorted(memory)  # of the host; one GPU each
    assert resources.devices == {"gres": "gpu:1"}
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="make env-cluster installs it")
    text = snakemake("-n", *PROFILE, "--config", "study=paper", cwd=tmp_path)
    assert planned(text)["train_run"] == 640
    assert "Group job" not in text
