"""The DAG: what reruns when something changes, in dry runs; a whole tiny study, twice."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytest.importorskip("snakemake", reason="Snakemake is not installed (pip install xlstm-scaling[workflow])")


def snakemake(*words, cwd, conf=None, check=True, repository=REPOSITORY, **variables):
    environment = dict(os.environ) | variables
    environment.pop("XLSTM_SCALING_SESSION", None)
    if conf is not None:
        environment["XLSTM_SCALING_CONF"] = str(conf)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(repository / "Snakefile"), "--cores", "2", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def planned(text):
    """Rule -> number of jobs in a dry run's summary."""
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", text, re.M) if name != "total"}


def test_the_papers_study_dry_runs(tmp_path):
    jobs = planned(snakemake("-n", "--config", "study=paper", cwd=tmp_path))
    assert jobs["train_run"] == 640
    assert jobs["certify"] == 1


def test_every_stage_is_a_target(tmp_path):
    for stage in (
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
    ):
        assert stage in planned(snakemake("-n", stage, "--config", "study=smoke", cwd=tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [("study=nope", "Available options"), ("stdy=smoke", "stdy"), ("overrides=[training.sed=2]", "training.sed")],
)
def test_bad_configuration_stops_before_any_work(tmp_path, config, message):
    text = snakemake("-n", "--config", config, cwd=tmp_path, check=False)
    assert message in text
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def finished(tiny_overrides, text_folder, tmp_path_factory):
    """A tiny study run to its report -> folder, configuration folder, `--config` words."""
    folder = tmp_path_factory.mktemp("study")
    text = folder / "text"
    shutil.copytree(text_folder, text)
    conf = Path(os.environ["XLSTM_SCALING_CONF"])
    words = ["--config", "study=tiny", f"overrides=[corpus.path={text}]"]
    snakemake(*words, cwd=folder, conf=conf)
    return folder, conf, words


@pytest.mark.slow
def test_a_study_runs_to_its_report_and_then_rests(finished):
    folder, conf, words = finished
    results = folder / "results"
    report = (results / "tiny" / "report.html").read_text()
    assert len(report) > 500_000
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
    assert {name for name in jobs if name != "all"} == {"evaluate", "figures", "findings", "report"}


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
    snakemake("train", *words, cwd=folder, conf=conf)
    assert (run / "result.json").exists()
    assert (run / "final.ckpt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_new_certificate_retrains_nothing(finished):
    folder, conf, words = finished
    jobs = planned(snakemake("-n", "--forcerun", "certify", *words, cwd=folder, conf=conf))
    assert jobs["certify"] == 1
    assert "train_run" not in jobs


#: in place of the certification, which takes seconds: every kernel passes, or is refused with these words
CERTIFY_AT_ONCE = """

def run_certify(args):
    import os

    from xlstm_scaling.kernels import registry
    from xlstm_scaling.kernels.certification import certificate
    from xlstm_scaling.study.files import write_json_atomic

    failures = [text for text in [os.environ.get("TEST_FAILURE")] if text]
    verdict = {"dtype": "float32", "passed": not failures, "failures": failures}
    kernels = [
        {"op": kernel.op, "form": kernel.form, "backend": kernel.backend, **verdict}
        for op, backend in registry._MODULES
        if backend != "triton"
        for kernel in registry.kernels(op, backend)
    ]
    content = {
        "schema_version": certificate.SCHEMA_VERSION,
        "device": certificate.describe_device("cpu"),
        "versions": certificate.versions(),
        "interpreted": False,
        "kernel_sources": certificate.source_digest(),
        "kernels": kernels,
    }
    write_json_atomic(args.out, content)
    return 0
"""


@pytest.mark.slow
def test_training_waits_for_the_certificate_and_heeds_it(tiny_overrides, text_folder, tmp_path):
    """In a copy of the repository, whose kernels can be changed."""
    copy = tmp_path / "copy"
    for name in ("src", "workflow"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, copy)
    (copy / "profiles").symlink_to("workflow/profiles")
    package = tmp_path / "path" / "xlstm_scaling"
    package.parent.mkdir()
    package.symlink_to(copy / "src")
    with (copy / "src" / "kernels" / "certification" / "command.py").open("a") as stream:
        stream.write(CERTIFY_AT_ONCE)
    words = ["--config", "study=tiny", f"overrides=[corpus.path={text_folder}]"]

    def run(*targets, check=True, **variables):
        return snakemake(
            *targets, *words, cwd=tmp_path, conf=os.environ["XLSTM_SCALING_CONF"], check=check, repository=copy,
            PYTHONPATH=str(package.parent), **variables,
        )  # fmt: skip

    text = run("-n", "train")
    runs = sorted(set(re.findall(r"training (xlstm\S+)", text)))
    assert planned(text)["certify"] == 1
    assert len(runs) == 4
    first, second = (f"results/runs/{name}/result.json" for name in runs[:2])
    run(first)
    certificate = tmp_path / "results" / "certificates" / "auto.json"
    assert certificate.exists()
    assert json.loads((tmp_path / first).read_text())["kernel_certificate"]
    assert "Nothing to be done" in run("-n", first)

    kernel = copy / "src" / "kernels" / "mlstm" / "chunkwise.py"
    kernel.write_text(kernel.read_text() + "# changed\n")
    jobs = planned(run("-n", first))
    assert jobs == {"certify": 1}
    text = run(first, second, check=False, TEST_FAILURE="dq is off by 1.0 in case 'odd length'")
    assert "failed its certification and is refused: dq is off by 1.0 in case 'odd length'" in text
    assert not (tmp_path / second).exists()
    assert (tmp_path / first).exists()
    # as the message says: mended, certified, trained
    kernel.write_text(kernel.read_text() + "# mended\n")
    run(second)
    assert (tmp_path / second).exists()
