"""The DAG of published runs: from a folder to the report, what reruns when something changes, and what is missing."""

import json
import os
import shutil
from pathlib import Path

import calls
import pandas as pd
import pytest
import yaml
from calls import REPOSITORY, planned
from planted import planted_measurements, planted_runs

from xlstm_scaling.published.upstream import blob_id

FAST = [
    *("fitting=smoke", "fitting.num_resamples=20", "inference.runtime_model.num_resamples=2"),
    *("fitting.surface.forms=[gamma_fixed]", "figures.dpi=60"),
    # some; a trained study draws all (test_workflow.py)
    "figures.only=[loss_vs_flops,loss_map,power_laws,ttft,runtime_residuals]",
]


SHIELDED = ("XLSTM_SCALING_PAPER", "XLSTM_SCALING_CONF")


def snakemake(*words, cwd, paper=None, fast=(), check=True, variables=()):
    given = ["runs=published", *([] if paper is None else [f"paper={paper}"])]
    words = [*words, "--config", *given, f"overrides={json.dumps([*FAST, *fast])}"]
    return calls.snakemake(*words, cwd=cwd, check=check, without=SHIELDED, **dict(variables))


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("the paper's")
    planted_runs().to_csv(folder / "runs.csv", index=False)
    planted_measurements().to_csv(folder / "inference.csv", index=False)
    return folder


@pytest.mark.parametrize(("given", "message"), [(None, "no published runs to read"), ("nowhere", "no folder nowhere")])
def test_without_a_folder_nothing_runs_and_the_message_says_what_to_do(tmp_path, given, message):
    text = snakemake(cwd=tmp_path, paper=given, check=False)
    assert message in text
    assert "make paper PAPER=" in text
    assert "XLSTM_SCALING_PAPER" in text
    assert not (tmp_path / "results").exists()


def test_a_folder_without_runs_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds neither a run log" in snakemake(cwd=tmp_path, paper=tmp_path / "empty", check=False)


def test_paper_without_published_runs_is_refused(tmp_path):
    assert "add runs=published" in calls.snakemake("-n", "--config", "paper=x", cwd=tmp_path, check=False)


def test_the_dag_trains_and_times_nothing(tmp_path, paper):
    everything = {
        "ingest": 1,
        "inference": 1,
        "fit": 1,
        "claims": 1,
        "figures": 1,
        "findings": 1,
        "report": 1,
        "workflow_report": 1,
        "explorer": 1,
        "all": 1,
    }
    assert planned(snakemake("-n", cwd=tmp_path, paper=paper)) == everything
    by_variable = snakemake("-n", cwd=tmp_path, variables={"XLSTM_SCALING_PAPER": str(paper)})
    assert planned(by_variable) == everything
    fetched = planned(snakemake("-n", cwd=tmp_path, fast=["runs.download=true"]))
    assert fetched == everything | {"download_file": 11}


def test_downloads_are_checked_by_their_published_ids(tmp_path):
    conf, mirror = tmp_path / "conf", tmp_path / "mirror"
    shutil.copytree(REPOSITORY / "conf", conf)
    mirror.mkdir()
    contents = {"isoflop_wandb_data.pkl": b"runs", "inference_results_df_dict.pkl": b"times"}
    for name, content in contents.items():
        (mirror / name).write_bytes(content)
    settings = yaml.safe_load((conf / "published" / "paper.yaml").read_text())
    log, times = ({"blob": blob_id(content)} for content in contents.values())
    settings |= {
        "url": f"file://{mirror}/{{name}}",
        "logs": {"isoflop_wandb_data.pkl": log | {"experiment_set": "isoflop"}},
    }
    settings["other"] = {"inference_results_df_dict.pkl": times | {"holds": "inference measurements"}}
    (conf / "published" / "paper.yaml").write_text(yaml.safe_dump(settings))
    given = {"cwd": tmp_path, "fast": ["runs.download=true"], "variables": {"XLSTM_SCALING_CONF": str(conf)}}
    snakemake("download", **given)
    for name, content in contents.items():
        assert (tmp_path / "results" / "downloads" / name).read_bytes() == content
    assert "Nothing to be done" in snakemake("-n", "download", **given)
    (mirror / "isoflop_wandb_data.pkl").write_bytes(b"other runs")
    text = snakemake("results/downloads/isoflop_wandb_data.pkl", "--forcerun", "download_file", check=False, **given)
    assert "not kept" in text
    assert not (tmp_path / "results" / "downloads" / "isoflop_wandb_data.pkl").exists()
    assert (tmp_path / "results" / "downloads" / "inference_results_df_dict.pkl").exists()


def test_without_measurements_inference_is_left_out(tmp_path, paper):
    (tmp_path / "paper").mkdir()
    shutil.copy(paper / "runs.csv", tmp_path / "paper")
    text = snakemake("-n", cwd=tmp_path, paper=tmp_path / "paper")
    assert "inference" not in planned(text)
    assert "loss_vs_flops" in text
    assert "ttft.svg" not in text


@pytest.fixture(scope="module")
def finished(paper, tmp_path_factory):
    """The planted folder run to its report; Snakemake's own is that of any study (test_workflow.py)."""
    folder = tmp_path_factory.mktemp("study")
    snakemake("report", cwd=folder, paper=paper)
    return folder


@pytest.mark.slow
def test_a_folder_runs_to_its_report_and_then_rests(finished, paper):
    study = finished / "results" / "paper-published"
    for name in ("report.html", "explorer.html"):
        assert (study / name).stat().st_size > 300_000, name
    for name in ("loss_vs_flops", "loss_map", "power_laws", "ttft", "runtime_residuals"):
        assert (study / "figures" / f"{name}.png").stat().st_size > 1000
    runs = pd.read_parquet(study / "runs.parquet")
    assert set(runs["source"]) == {"published"}
    assert runs["selected"].all()
    minima = pd.read_parquet(study / "fits" / "isoflop.parquet")
    assert (minima["status"] == "ok").sum() >= 6
    times = pd.read_parquet(study / "inference" / "measurements.parquet")
    assert set(times["arch"]) == {"xlstm", "transformer"}
    assert times["status"].value_counts()["out_of_memory"] == 3
    findings = (study / "findings.md").read_text()
    assert "read from 0 run logs and runs.csv" in findings
    assert "tokenparam_mlstm_wandb_data.pkl" in findings  # named as missing
    assert len(pd.read_csv(study / "claims" / "claims.csv")) > 10
    assert not (finished / "results" / "tokens").exists()
    assert "Nothing to be done" in snakemake("-n", "report", cwd=finished, paper=paper)


@pytest.mark.slow
def test_a_setting_of_the_fits_reads_nothing_again(finished, paper):
    jobs = planned(snakemake("-n", cwd=finished, paper=paper, fast=["fitting.confidence=0.9"]))
    assert jobs["fit"] == jobs["claims"] == jobs["figures"] == 1
    assert "ingest" not in jobs
    assert "inference" not in jobs


@pytest.mark.slow
def test_another_file_in_the_folder_is_read(finished, paper):
    table = planted_runs().head(3).assign(run_id=["x", "y", "z"], learning_rate=2e-3)
    try:
        table.to_csv(paper / "more_runs.csv", index=False)
        assert planned(snakemake("-n", cwd=finished, paper=paper))["ingest"] == 1
    finally:
        (paper / "more_runs.csv").unlink()


@pytest.mark.exhaustive
def test_the_papers_own_folder(tmp_path):
    folder = Path(os.environ.get("XLSTM_SCALING_PAPER", REPOSITORY.parent / "shared" / "paper"))
    if not (folder / "runs.csv").is_file():
        pytest.skip("the paper's runs are not here (XLSTM_SCALING_PAPER)")
    snakemake("runs", "inference", cwd=tmp_path, paper=folder)
    study = tmp_path / "results" / "paper-published"
    assert len(pd.read_parquet(study / "runs.parquet")) == 640
    model = pd.read_parquet(study / "inference" / "runtime_model.parquet")
    assert (model["status"] == "ok").all()
    assert model["mape_fit"].max() < 0.3
