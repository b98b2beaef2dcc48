"""The study on a real Slurm cluster of three nodes on this machine: `make cluster-test`.

Jobs through the profile as users have it; a node that is lost in the middle of a run; a run that is told to stop; a run
on two nodes. What comes out must be what a local run gives, bit for bit.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from slurm import NODES, running_cluster, why_not

pytestmark = pytest.mark.cluster
REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 3600
#: as `--config` gives them: often a checkpoint, and time for a machine that does something else too
OVERRIDES = ["hardware.checkpoint_interval_s=0.3", "hardware.start_time_s=900"]
PROFILE = ["--workflow-profile", str(REPOSITORY / "workflow" / "profiles" / "slurm")]
#: two CPUs a node; look at jobs every few seconds, and a few runs a job, so that there are several at once
HERE = ["--cores", "2", "--slurm-init-seconds-before-status-checks", "3", "--group-components", "runs_15s=6"]


@pytest.fixture(scope="module")
def cluster():
    reason = why_not()
    if reason:
        pytest.skip(f"no Slurm cluster can be started: {reason}")
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="make env-cluster installs it")
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def folder():
    """Where the workflow runs; on failure its logs are kept in the report alone."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="cluster-study-") as name:
        yield Path(name)


def start(words, cwd, environment, log):
    """Snakemake on this repository, its output in ``log``."""
    cwd.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), *words]
    environment = {**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}
    environment.pop("XLSTM_SCALING_SESSION", None)
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def finish(process, log, timeout_s=TIMEOUT_S):
    """Wait for Snakemake; its output where it succeeded."""
    try:
        status = process.wait(timeout=timeout_s)
    finally:
        process.kill()
    text = log.read_text()
    assert status == 0, text[-6000:]
    return text


def smoke(*more):
    return ["--config", "study=smoke", f"overrides={json.dumps([*OVERRIDES, *more])}"]


class Training:
    """What runs where in a study that is under way."""

    def __init__(self, cluster, results):
        self.cluster, self.results = cluster, results

    def under_way(self, spared=None):
        """(Node, job, run) of a run that has saved and is not near its end, on a node without the job that is spared;
        None where there is none now."""
        for node in NODES:
            commands = self.cluster.commands(node)
            if spared in {job for job, _ in commands}:
                continue
            for job, line in commands:
                found = re.search(r"xlstm_scaling\.cli train .*--run (\S+)", line)
                if found and self.half_way(found[1]):
                    return node, job, found[1]
        return None

    def half_way(self, run):
        steps = [int(p.stem.split("-")[1]) for p in (self.results / "runs" / run / "checkpoints").glob("step-*.ckpt")]
        return bool(steps) and max(steps) < 0.6 * int(re.search(r"-n\d+x(\d+)-", run)[1])

    def stopped_or_finished(self, job, run):
        return self.cluster.restarts(job) or (self.results / "runs" / run / "result.json").exists()


@pytest.fixture(scope="module")
def study(cluster, folder):
    """The smoke study on the cluster, through a lost node and a job that is told to stop -> results, what happened."""
    work, log = folder / "cluster", folder / "cluster.log"
    process = start([*PROFILE, *HERE, *smoke()], work, cluster.environment, log)
    training, happened = Training(cluster, work / "results"), {}
    try:

        def next_victim(spared=None):
            assert process.poll() is None, "the study ended before anything could happen to it"
            return training.under_way(spared)

        while "stopped" not in happened:
            _, job, run = cluster.wait_for("a run to stop", next_victim, TIMEOUT_S, 0.2)
            # as Slurm does before a job's time is up: every process of its steps
            cluster.call("scancel", "--signal=TERM", job)
            cluster.wait_for("its end", partial(training.stopped_or_finished, job, run), 600)
            if cluster.restarts(job):  # else it was at its end already
                happened["stopped"] = job, run
        node, other, run = cluster.wait_for("a run to lose", partial(next_victim, spared=job), TIMEOUT_S, 0.2)
        happened["lost"] = other, run
        cluster.kill_node(node)
        happened["text"] = finish(process, log)
        happened["restarts"] = {job: cluster.restarts(job) for job in cluster.jobs()}
    except BaseException:
        print(log.read_text()[-6000:])
        raise
    finally:
        process.kill()
        process.wait()
    return work / "results", happened


@pytest.fixture(scope="module")
def local(folder):
    """The same study on this machine, as far as its tables do not hold times."""
    log = folder / "local.log"
    words = ["--cores", "2", *smoke(), "--", "runs", "fit", "evaluate"]
    finish(start(words, folder / "local", dict(os.environ), log), log)
    return folder / "local" / "results"


@pytest.mark.parametrize("what", ["stopped", "lost"])
def test_a_run_that_is_stopped_or_lost_goes_on_and_uses_up_no_retry(study, what):
    results, happened = study
    job, run = happened[what]
    assert happened["restarts"][job] >= 1
    assert "resumes at step" in (results / "logs" / "runs" / f"{run}.log").read_text()
    assert "Trying to restart job" not in happened["text"]


def test_tables_are_those_of_a_local_run_loss_by_loss(study, local):
    results, _ = study
    ours, theirs = (pd.read_parquet(folder / "smoke" / "runs.parquet") for folder in (results, local))
    times = ["tokens_per_s", "mfu", "train_time_s", "kernel_certificate"]
    assert len(ours) == len(theirs) > 20
    assert_frame_equal(ours.drop(columns=times), theirs.drop(columns=times), check_exact=True)
    ours, theirs = (pd.read_parquet(folder / "smoke" / "curves.parquet") for folder in (results, local))
    assert_frame_equal(ours.drop(columns=times[:2]), theirs.drop(columns=times[:2]), check_exact=True)
    tables = sorted(path.relative_to(local) for path in (local / "smoke").glob("*/*.parquet"))
    compared = [path for path in tables if path.parts[1] in ("fits", "evaluation")]
    assert len(compared) > 8
    for path in compared:
        ours, theirs = (pd.read_parquet(folder / path) for folder in (results, local))
        assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-12, obj=str(path))


def test_the_study_is_complete_and_short_runs_shared_jobs(study):
    results, happened = study
    assert (results / "smoke" / "report.html").stat().st_size > 500_000
    assert (results / "smoke" / "workflow-report.html").stat().st_size > 500_000
    jobs = len(set(re.findall(r"submitted with SLURM jobid (\d+)", happened["text"])))
    runs = len(list((results / "runs").glob("*/result.json")))
    # certify, tokens, evaluate, inference, fit, figures, and packs of at most six runs
    assert jobs < 8 + runs / 6 + 2


def test_one_run_on_two_nodes(study, cluster, folder):
    results, _ = study
    run = min((path.parent.name for path in (results / "runs").glob("xlstm*/result.json")), key=steps_of)
    alone = json.loads((results / "runs" / run / "result.json").read_text())
    work = folder / "nodes"
    for name in ("tokens", "certificates"):
        shutil.copytree(results / name, work / "results" / name)
    log = folder / "nodes.log"
    words = [*PROFILE, *HERE, *smoke("hardware.nodes_per_run=2", "hardware.shard=full")]
    process = start([*words, "--", f"results/runs/{run}/result.json"], work, cluster.environment, log)
    seen = set()
    while process.poll() is None:
        for node in NODES:
            if any("cli train" in line and run in line for _, line in cluster.commands(node)):
                seen.add(node)
        time.sleep(0.3)
    finish(process, log)
    result = json.loads((work / "results" / "runs" / run / "result.json").read_text())
    assert len(seen) == 2
    assert result["devices"] == 2
    assert result["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)


def steps_of(run):
    return int(re.search(r"-n\d+x(\d+)-", run)[1])
