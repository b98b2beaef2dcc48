"""The stages in order on a tiny corpus, by hand; the command line's manners."""

import json
import os

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling import cli, stages
from xlstm_scaling.cli import run_command
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import PlanError, plan_runs
from xlstm_scaling.study.runs import TableError, read_runs, validate_runs
from xlstm_scaling.study.status import study_status


@pytest.fixture(scope="module")
def study(tiny_config, tiny_tokens):
    """All runs of the tiny study trained and collected."""
    paths = StudyPaths.of(tiny_config, tiny_tokens)
    stages.plan(tiny_config, paths)
    content, specs = stages.load_plan(paths.plan / "plan.json")
    for spec in specs:
        stages.train(spec, content["hardware"], tiny_tokens, progress=False, uncertified=True)
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
    assert runs.kernel_certificate.isna().all()  # trained uncertified
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
    from xlstm_scaling.training.run import Run

    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained again"))
    content, specs = stages.load_plan(study.plan / "plan.json")
    result = stages.train(specs[0], content["hardware"], tiny_tokens, progress=False)
    assert result["status"] == "ok"


def test_status_of_a_study(study, tiny_config):
    status = stages.status(tiny_config, study)
    assert (status.runs.state == "ok").all()
    assert status.flops_done == pytest.approx(status.flops_planned)
    assert status.seconds_left == 0
    assert f"{len(status.runs)} ok" in status.summary()
    elsewhere = StudyPaths(study.results / "nowhere", study.name, study.tokens_id)
    pending = stages.status(tiny_config, elsewhere)
    assert (pending.runs.state == "pending").all()
    assert pending.seconds_left == pytest.approx(pending.flops_planned / tiny_config.hardware.flops_per_s)


def test_status_tells_running_failed_diverged_and_stopped_apart(study, tiny_config, tmp_path):
    from xlstm_scaling.study.locks import folder_locked

    specs = plan_runs(tiny_config)[:5]
    folders = [tmp_path / spec.run_id for spec in specs]
    for folder in folders[:4]:
        folder.mkdir()
        entry = {"step": 3, "train_loss": 4.0, "tokens_per_s": 1000.0}
        (folder / "history.jsonl").write_text(json.dumps(entry) + '\n{"step": 4, "to')
    lost = {"status": "diverged", "val_loss": None, "tokens_per_s": 1000.0, "detail": "nan", "steps_done": 3}
    (folders[1] / "result.json").write_text(json.dumps(lost))
    (folders[2] / "failure.json").write_text(json.dumps({"error": "disk full"}))
    with folder_locked(folders[0], "the run"):
        status = study_status(specs, tmp_path, 1e9)
    assert list(status.runs.state) == ["running", "diverged", "failed", "stopped", "pending"]
    assert list(status.runs.step) == [3, 3, 3, 3, 0]
    assert status.runs.detail[2] == "disk full"
    text = status.summary()
    assert "1 running at 1,000 tokens/s" in text
    assert "left with 1 at a time" in text
    unfinished = [spec for spec, state in zip(specs, status.runs.state) if state != "diverged"]
    rates = [1000.0 * spec.flops_per_step / spec.batch_sequences / spec.context_length for spec in specs[:4]]
    left = sum(spec.num_flops for spec in unfinished) - 3 * sum(spec.flops_per_step for spec in (specs[0], *specs[2:4]))
    assert min(rates) <= left / status.seconds_left <= max(rates)


def test_a_plan_of_other_code_is_refused(study, tmp_path):
    content = json.loads((study.plan / "plan.json").read_text())
    content["runs"][0]["setting_of_long_ago"] = 1
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="of other code than this: run the stage `plan` again"):
        stages.load_plan(path)


def test_the_end_of_a_log_is_shown_without_progress_bars(tmp_path):
    from xlstm_scaling.study.status import log_tail

    path = tmp_path / "run.log"
    path.write_text("INFO begins\n  0%|  | 0/5\r 20%|# | 1/5\rINFO resumes\n\nTraceback\nValueError: no\n")
    assert log_tail(path, 3) == ["INFO resumes", "Traceback", "ValueError: no"]
    assert log_tail(tmp_path / "none.log") == []


def test_the_command_status_says_where_a_run_is_and_what_failed(study, tiny_overrides, tiny_config, tmp_path, capsys):
    from xlstm_scaling.study.locks import folder_locked

    first, second = plan_runs(tiny_config)[:2]
    log = tmp_path / "logs" / "runs" / f"{second.run_id}.log"
    log.parent.mkdir(parents=True)
    log.write_text("ValueError: the reason\n")
    (tmp_path / "runs" / second.run_id).mkdir(parents=True)
    (tmp_path / "runs" / second.run_id / "failure.json").write_text(json.dumps({"error": "the reason"}))
    with folder_locked(tmp_path / "runs" / first.run_id, "the run"):
        assert cli.run_command(["status", *tiny_overrides, "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"process {os.getpid()} on" in text
    assert f"{log} ends with" in text
    assert "    ValueError: the reason" in text


def test_a_result_that_another_study_writes_again_is_waited_for(study, tiny_config, tmp_path, monkeypatch):
    from xlstm_scaling.study import runs

    spec = plan_runs(tiny_config)[0]
    folder = tmp_path / spec.run_id
    folder.mkdir()
    monkeypatch.setattr(runs.time, "sleep", lambda _: (folder / "result.json").write_text("{}"))
    with pytest.raises(FileNotFoundError, match="run the stage `train`"):
        runs.load_results([spec], tmp_path)
    (folder / "final.ckpt").touch()
    assert runs.load_results([spec], tmp_path) == [{}]


def test_a_failed_run_leaves_its_error(study, tiny_config, tiny_tokens, tmp_path):
    from xlstm_scaling.training.run import train

    spec = plan_runs(tiny_config)[0]
    with pytest.raises(ValueError, match="There are no complete tokens"):
        train(spec, tmp_path / "nowhere", tmp_path / spec.run_id)
    status = study_status([spec], tmp_path, 1e9)
    assert status.runs.state[0] == "failed"
    assert "no complete tokens" in status.runs.detail[0]


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


# kernels are certified before they train


@pytest.fixture
def certificate(study, tiny_tokens):
    """A certificate of this machine, in which every kernel of the tiny study passed, where training looks for it."""
    from xlstm_scaling.kernels.certification import certificate as certificates
    from xlstm_scaling.kernels.certification.usage import used_kernels
    from xlstm_scaling.study.paths import certificate_path

    path = certificate_path(tiny_tokens, "auto")
    _, specs = stages.load_plan(study.plan / "plan.json")
    kernels = [
        {"op": op, "form": form, "backend": backend, "dtype": dtype, "passed": True, "failures": []}
        for op, form, backend, dtype in sorted({use for spec in specs for use in used_kernels(spec, "cpu")})
    ]
    content = {
        "schema_version": certificates.SCHEMA_VERSION,
        "device": certificates.describe_device("cpu"),
        "versions": certificates.versions(),
        "interpreted": False,
        "kernel_sources": certificates.source_digest(),
        "kernels": kernels,
    }

    def write(**changes):
        for entry in kernels:
            entry.update(changes.get(entry["op"], {}))
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return certificates.certificate_digest(content)

    yield write
    path.unlink(missing_ok=True)


@pytest.fixture
def untrained(study, tiny_tokens, tmp_path):
    """A results folder with tokens alone; the runs of the tiny study by architecture; the hardware."""
    (tmp_path / "tokens").symlink_to(tiny_tokens / "tokens")
    content, specs = stages.load_plan(study.plan / "plan.json")
    runs = {arch: next(s for s in specs if s.arch == arch and s.size == "tiny") for arch in ("xlstm", "transformer")}
    return tmp_path, runs, content["hardware"]


def test_training_waits_for_a_certificate(study, untrained):
    results, runs, hardware = untrained
    with pytest.raises(ValueError, match=r"there is no .*auto\.json; run: xlstm-scaling certify --device cpu"):
        stages.train(runs["xlstm"], hardware, results, progress=False)
    assert not list(results.glob("runs/*/history.jsonl"))
    words = ["train", "--results", str(results), "--plan", str(study.plan / "plan.json"), "--quiet"]
    words += ["--run", runs["xlstm"].run_id]
    assert run_command(words) == 1
    assert run_command([*words, "--uncertified"]) == 0
    result = json.loads((results / "runs" / runs["xlstm"].run_id / "result.json").read_text())
    assert result["kernel_certificate"] is None


def test_a_certified_run_records_its_certificate(study, untrained, certificate, tiny_tokens):
    results, runs, hardware = untrained
    (results / "certificates").symlink_to(tiny_tokens / "certificates")
    digest = certificate()
    result = stages.train(runs["xlstm"], hardware, results, progress=False)
    assert result["kernel_certificate"] == digest
    assert result["kernel_certificate_device"]
    earlier = json.loads((tiny_tokens / "runs" / runs["xlstm"].run_id / "result.json").read_text())
    assert result["identity"] == earlier["identity"]
    assert result["val_loss"] == earlier["val_loss"]


def test_a_kernel_that_failed_is_refused_by_its_tensor_where_it_is_used(untrained, certificate, tiny_tokens):
    results, runs, hardware = untrained
    (results / "certificates").symlink_to(tiny_tokens / "certificates")
    certificate(mlstm={"passed": False, "failures": ["dq is off by 1 in case 'odd length'"]})
    with pytest.raises(ValueError, match=r"mlstm chunkwise \(\w+\) in float32 failed .* dq is off by 1"):
        stages.train(runs["xlstm"], hardware, results, progress=False)
    assert not list(results.glob("runs/*/result.json"))
    assert stages.train(runs["transformer"], hardware, results, progress=False)["status"] == "ok"


@pytest.mark.parametrize("arch", ["xlstm", "transformer"])
def test_the_kernels_that_are_asked_for_are_those_that_train(study, arch, monkeypatch):
    """Every kernel that a model selects while it trains is in the list that its certificate is asked for."""
    import torch

    from xlstm_scaling.kernels.certification.usage import used_kernels
    from xlstm_scaling.models import layers, xlstm
    from xlstm_scaling.training.trainer import build_run_model

    _, specs = stages.load_plan(study.plan / "plan.json")
    spec = next(s for s in specs if s.arch == arch)
    model, seen, original = build_run_model(spec), set(), layers.select

    def spy(*args, **options):
        kernel = original(*args, **options)
        seen.add((kernel.op, kernel.form, kernel.backend, spec.compute_dtype))
        return kernel

    monkeypatch.setattr(layers, "select", spy)
    monkeypatch.setattr(xlstm, "select", spy)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    model.loss(tokens, tokens, tokens.bool()).backward()
    assert seen == set(used_kernels(spec, "cpu"))


def test_the_table_of_runs_takes_certificates_and_their_absence(study):
    runs = read_runs(study.study / "runs.parquet")
    runs["kernel_certificate"] = ["0123abcd"] + [None] * (len(runs) - 1)
    assert validate_runs(runs).kernel_certificate[0] == "0123abcd"
    assert "kernel_certificate" not in validate_runs(runs.drop(columns="kernel_certificate"))


# the command line


def test_help_lists_the_stages(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for stage in ("tokens", "plan", "certify", "train", "runs", "fit", "inference", "figures", "count"):
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
        ("certify --op nothing", "no operation 'nothing'"),
        ("fit study=smoke", "run the stage"),
    ],
)  # fmt: skip
def test_errors_are_one_line_without_a_traceback(capsys, tmp_path, words, message):
    results = [] if words.startswith(("count", "certify")) else ["--results", str(tmp_path)]
    assert run_command([*words.split(), *results]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
