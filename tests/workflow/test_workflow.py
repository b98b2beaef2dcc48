"""The DAG: what reruns when something changes, in dry runs; a whole tiny study, twice, and its experiments."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from calls import planned, session, snakemake

EXPERIMENTS = ("isoflop_sweep", "latency_profile", "context_scaling")
TWO_CONTEXTS = "+study.isoflop.c64={context_length: 64, budget_flops: 4.0e+8, sizes: [tiny, small, mid, big]}"


def test_the_papers_study_dry_runs(tmp_path):
    jobs = planned(snakemake("-n", "--config", "study=paper", cwd=tmp_path))
    assert jobs["train_run"] == 640
    assert jobs["certify"] == 1


def test_every_stage_is_a_target(tmp_path):
    stages = (
        "tokens",
        "plan",
        "certify",
        "train",
        "runs",
        "fit",
        "inference",
        "evaluate",
        "figures",
        "findings",
        "report",
        "workflow_report",
    )
    text = snakemake("-n", *stages, "--config", "study=smoke", cwd=tmp_path)  # a name that is no target is an error
    assert set(stages) <= planned(text).keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [("study=nope", "Available options"), ("stdy=smoke", "stdy"), ("overrides=[training.sed=2]", "training.sed")],
)
def test_bad_configuration_stops_before_any_work(tmp_path, config, message):
    text = snakemake("-n", "--config", config, cwd=tmp_path, check=False)
    assert message in text
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def finished(tiny_overrides, text_folder, quick_certificate, tmp_path_factory):
    """A tiny study run to its report, its kernels certified -> folder, configuration folder, `--config` words."""
    folder = tmp_path_factory.mktemp("study")
    certificate = folder / "results" / "certificates" / "auto.json"
    certificate.parent.mkdir(parents=True)
    shutil.copy(quick_certificate, certificate)
    text = folder / "text"
    shutil.copytree(text_folder, text)
    conf = Path(os.environ["XLSTM_SCALING_CONF"])
    words = ["--config", "study=tiny", f"overrides=[corpus.path={text}]"]
    snakemake(*words, cwd=folder, conf=conf, **session())
    return folder, conf, words


@pytest.mark.slow
def test_a_study_runs_to_its_report_and_then_rests(finished):
    folder, conf, words = finished
    results = folder / "results"
    for name in ("report.html", "workflow-report.html"):
        assert (results / "tiny" / name).stat().st_size > 300_000, name
    for name in ("loss_vs_flops", "isoflop_curves", "ttft"):
        assert (results / "tiny" / "figures" / f"{name}.svg").stat().st_size > 1000
    runs = [json.loads(path.read_text()) for path in (results / "runs").glob("*/result.json")]
    assert len(runs) == 8
    assert len({run["kernel_certificate"] for run in runs} - {None}) == 1
    certificate = json.loads((results / "certificates" / "auto.json").read_text())
    assert certificate["level"] == "quick"
    assert {kernel["op"] for kernel in certificate["kernels"]} >= {"mlstm", "linear_cross_entropy"}
    assert "Nothing to be done" in snakemake(*words, cwd=folder, conf=conf)


def changed(finished, *overrides, touch=None):
    folder, conf, words = finished
    words = [*words[:-1], words[-1].replace("]", ",".join(["", *overrides]) + "]")]
    return planned(snakemake("-n", *words, cwd=folder, conf=conf))


@pytest.mark.slow
def test_a_learning_rate_of_one_size_retrains_those_runs_alone(finished):
    jobs = changed(finished, "+study.sizes.mid.learning_rate=0.003")
    assert jobs["train_run"] == 2  # one size, two architectures
    assert "tokens" not in jobs
    assert jobs["fit"] == 1


@pytest.mark.slow
def test_a_setting_of_the_fits_retrains_nothing(finished):
    jobs = changed(finished, "fitting.confidence=0.9")
    assert "train_run" not in jobs
    assert "inference" not in jobs
    assert jobs["fit"] == 1


@pytest.mark.slow
def test_a_setting_of_the_evaluation_repeats_what_follows_from_it_alone(finished):
    jobs = changed(finished, "evaluation.multiple=4")
    assert {name for name in jobs if name != "all"} == {"evaluate", "figures", "findings", "report", "workflow_report"}


@pytest.mark.slow
def test_a_seed_retrains_all(finished):
    jobs = changed(finished, "training.seed=2")
    assert jobs["train_run"] == 8
    assert "tokens" not in jobs


@pytest.mark.slow
def test_new_runs_are_trained_with_the_target_train_too(finished):
    """Whatever else is made anew: the plan is, and the certificate may be."""
    folder, conf, words = finished
    words = [*words[:-1], words[-1].replace("]", ",training.seed=3]")]
    jobs = planned(snakemake("-n", "train", "--forcerun", "certify", *words, cwd=folder, conf=conf))
    assert jobs["train_run"] == 8
    assert jobs["plan"] == jobs["certify"] == 1


@pytest.mark.slow
def test_more_text_makes_new_tokens(finished):
    folder, _, _ = finished
    added = folder / "text" / "zzz.txt"
    added.write_text("one more document about the state of the union " * 50)
    try:
        jobs = changed(finished)
        assert jobs["tokens"] == 1
        assert jobs["train_run"] == 8
    finally:
        added.unlink()


@pytest.mark.slow
def test_a_lost_result_is_found_again_without_training(finished):
    folder, conf, words = finished
    run = next((folder / "results" / "runs").iterdir())
    before = (run / "final.ckpt").stat().st_mtime_ns
    (run / "result.json").unlink()
    snakemake("train", *words, cwd=folder, conf=conf, **session())
    assert (run / "result.json").exists()
    assert (run / "final.ckpt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_new_certificate_retrains_nothing(finished):
    folder, conf, words = finished
    jobs = planned(snakemake("-n", "--forcerun", "certify", *words, cwd=folder, conf=conf))
    assert jobs["certify"] == 1
    assert "train_run" not in jobs


@pytest.mark.slow
def test_experiments_run_and_say_where_their_outputs_are(finished, tmp_path):
    """In a folder that has the study's runs: those of a second context are trained, the others are not again."""
    folder, conf, _ = finished
    for name in ("tokens", "certificates", "runs"):
        shutil.copytree(folder / "results" / name, tmp_path / "results" / name)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "runs").glob("*/final.ckpt")}
    overrides = [f"corpus.path={folder / 'text'}", TWO_CONTEXTS, "inference.profile.size=d32b1"]
    overrides += ["inference.profile.prefill_lengths=[16,32]", "inference.profile.max_cell_s=1e3"]
    words = ["--config", "study=tiny", f"overrides={json.dumps(overrides)}"]
    text = snakemake(*EXPERIMENTS, *words, cwd=tmp_path, conf=conf, **session())
    study = tmp_path / "results" / "tiny"
    for name, figure in zip(EXPERIMENTS, ("isoflop_curves", "latency_profile", "context_scaling")):
        assert f"figure figures/{figure}.svg" in text
        assert (study / name / "figures" / f"{figure}.png").stat().st_size > 1000
    assert not (study / "runs.parquet").exists()  # nothing else was made
    assert len(before) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    profile = pd.read_parquet(study / "latency_profile" / "inference" / "measurements.parquet")
    assert profile["status"].tolist() == ["ok"] * 4
    twins = pd.read_parquet(study / "context_scaling" / "context_scaling.parquet")
    assert (twins["status"] == "ok").all() and set(twins["source"]) == {"study", "extra"}
    assert (twins["tokens_ratio"] == 1).all()
    assert "Nothing to be done" in snakemake(*EXPERIMENTS, *words, cwd=tmp_path, conf=conf)
    # settings of one experiment concern it alone; drawing again measures nothing
    changed = [*words[:-1], f"overrides={json.dumps([*overrides, 'inference.profile.repeats=1'])}"]
    jobs = planned(snakemake("-n", *EXPERIMENTS, *changed, cwd=tmp_path, conf=conf))
    assert jobs == {"latency_profile_tables": 1, "latency_profile": 1}
    shutil.rmtree(study / "latency_profile" / "figures")
    assert planned(snakemake("-n", "latency_profile", *words, cwd=tmp_path, conf=conf)) == {"latency_profile": 1}
