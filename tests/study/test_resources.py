"""What a scheduler is asked for: closed forms, more with FLOPs and with attempts; how runs are packed and launched."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from omegaconf import OmegaConf

from xlstm_scaling.accounting import count_flops
from xlstm_scaling.accounting.memory import Layout, training_memory
from xlstm_scaling.study import launch, resources
from xlstm_scaling.study.config import ConfigError, check, compose, to_dict
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.study.run_spec import find_trunks


def jobs(specs, hardware, folder, trunks=()):
    by_id = {run.run_id: run for run in specs}
    return resources.JobResources(by_id, {t.trunk_id: t for t in trunks}, hardware, folder)


@pytest.fixture(scope="module")
def smoke():
    return compose(["study=smoke"])


@pytest.fixture(scope="module")
def hardware(smoke):
    return OmegaConf.to_object(smoke.hardware)


@pytest.fixture(scope="module")
def run(smoke):
    return plan_runs(smoke)[0]


def longer(run, times):
    return replace(run, num_train_steps=run.num_train_steps * times)


def test_wall_time_is_the_closed_form_and_grows_with_flops_and_attempts(hardware, run, tmp_path):
    runs = [longer(run, 4**power) for power in range(12)]
    asked = jobs(runs, hardware, tmp_path)
    forward = count_flops(run.model_shape, run.context_length).forward / run.context_length
    for spec in runs:
        flops = spec.num_flops + run.validation["max_tokens"] * run.validation["evaluations"] * forward
        expected_s = flops / hardware.flops_per_s
        assert asked.time_s(spec.run_id) == pytest.approx(expected_s, rel=1e-12)
        for attempt, more in ((1, 1.0), (2, 1.5), (3, 2.0)):
            seconds = more * (hardware.start_time_s + hardware.time_factor * expected_s) + hardware.save_time_s + 60
            assert asked.minutes(spec.run_id, attempt) == math.ceil(seconds / 60)
    minutes = [asked.minutes(spec.run_id) for spec in runs]
    assert minutes == sorted(minutes)
    assert minutes[0] < minutes[-1]


def test_no_job_asks_for_more_than_the_cluster_allows(hardware, run, tmp_path):
    asked = jobs([run, longer(run, 10**6)], replace(hardware, max_job_time_s=7230), tmp_path)
    short, long = asked.specs
    assert [asked.minutes(long, attempt) for attempt in (1, 5)] == [120, 120]
    assert asked.minutes(short) < 10


def write_result(folder, spec, flops_per_s, **more):
    tokens_per_s = flops_per_s * spec.batch_sequences * spec.context_length / spec.flops_per_step
    path = folder / spec.run_id / "result.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"device": "cpu", "devices": 1, "tokens_per_s": tokens_per_s} | more))


def test_time_follows_the_speed_of_the_finished_runs_nearest_in_size(smoke, hardware, tmp_path):
    xlstm = sorted((r for r in plan_runs(smoke) if r.arch == "xlstm"), key=lambda r: r.num_params)
    small, large = xlstm[0], xlstm[-1]
    smalls, larges = ([longer(size, number) for number in range(1, 10)] for size in (small, large))
    for number in range(1, 6):  # a median of five, at each size
        write_result(tmp_path, smalls[number], 1e9 * number**2)
        write_result(tmp_path, larges[number], 1e10 * number**2)
    write_result(tmp_path, larges[6], 7e12, devices=8)  # of other hardware
    write_result(tmp_path, larges[7], 7e12, device="cuda")
    write_result(tmp_path, larges[8], math.nan)
    asked = jobs([*smalls, *larges], hardware, tmp_path)
    assert len(asked.speeds) == 10
    assert resources.expected_speed(small, asked.speeds, 1.0) == pytest.approx(9e9)
    assert resources.expected_speed(large, asked.speeds, 1.0) == pytest.approx(9e10)
    pending = smalls[0]
    assert asked.time_s(pending.run_id) == pytest.approx(resources.job_flops(pending, pending.num_train_steps) / 9e9)
    transformer = next(r for r in plan_runs(smoke) if r.arch == "transformer")
    assert resources.expected_speed(transformer, asked.speeds, 123.0) == 123.0


def test_memory_is_the_accounting_times_the_users_factor(hardware, run, tmp_path):
    dtype_bytes = 4 if run.compute_dtype == "float32" else 2
    layout = Layout(micro_batch_sequences=run.batch_sequences, activation_bytes=dtype_bytes)
    model = training_memory(run.model_shape, run.context_length, layout).total
    around = resources.JOB_BYTES + resources.PROCESS_BYTES["cpu"]
    expected = around + model + resources.CHECKPOINT_BYTES * run.num_params
    assert resources.run_memory_bytes(run, hardware) == pytest.approx(expected)
    for factor in (1.0, 2.5):
        for attempt, more in ((1, 1.0), (2, 1.5), (3, 2.0)):
            asked = jobs([run], replace(hardware, memory_factor=factor), tmp_path).memory_mb(run.run_id, attempt)
            assert asked == math.ceil(factor * more * expected / 1e6)
    larger = replace(run, batch_sequences=4 * run.batch_sequences)
    assert resources.run_memory_bytes(larger, hardware) > expected


def test_memory_of_a_node_counts_its_devices_and_sharding_lowers_it(hardware, run):
    def memory(**changes):
        return resources.run_memory_bytes(run, replace(hardware, **changes))

    four = memory(devices_per_run=4)
    assert four > 3 * (memory() - resources.JOB_BYTES)
    assert memory(devices_per_run=4, nodes_per_run=2) <= four
    assert memory(devices_per_run=4, shard="full") < four


def test_devices_are_those_of_a_node_and_nodes_have_a_task_each(hardware, run, tmp_path):
    assert jobs([run], hardware, tmp_path).devices == {}
    gpu = replace(hardware, device="cuda")
    assert jobs([run], gpu, tmp_path).devices == {"gres": "gpu:1"}
    asked = jobs([run], replace(gpu, devices_per_run=8, nodes_per_run=4, gpu_type="h100"), tmp_path)
    assert asked.devices == {"gres": "gpu:h100:8", "mpi": "srun", "nodes": 4, "tasks": 4, "tasks_per_gpu": 0}
    assert asked.one_device == {"gres": "gpu:h100:1"}


def test_runs_are_packed_by_their_time_and_what_others_wait_for_is_not(hardware, run, tmp_path):
    second = hardware.flops_per_s / run.num_flops  # runs a second
    lengths = {"runs_15s": 14, "runs_1min": 50, "runs_4min": 200, "runs_15min": 800, None: 1000}
    specs = {kind: longer(run, round(seconds * second)) for kind, seconds in lengths.items()}
    asked = jobs(specs.values(), hardware, tmp_path)
    assert {kind: asked.pack(spec.run_id) for kind, spec in specs.items()} == {kind: kind for kind in specs}
    failed = specs["runs_1min"].run_id
    (tmp_path / failed).mkdir()
    (tmp_path / failed / "failure.json").touch()
    assert asked.pack(failed) is None
    several = jobs(specs.values(), replace(hardware, nodes_per_run=2), tmp_path)
    assert {several.pack(spec.run_id) for spec in specs.values()} == {None}
    constant = compose(["study=smoke", "training.schedule.decay=constant"])
    runs = plan_runs(constant)
    trunks = find_trunks(runs)
    asked = jobs(runs, hardware, tmp_path, trunks)
    assert asked.pack(trunks[0].trunk_id) is None
    branch = trunks[0].runs[-1]
    assert asked.pack(branch.run_id) == "runs_15s"
    # a run that branches off makes its cool-down alone
    assert asked.time_s(branch.run_id) < asked.time_s(trunks[0].trunk_id)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_factor": 0.0}, "hardware.time_factor must be positive"),
        ({"memory_factor": -1.0}, "hardware.memory_factor must be positive"),
        ({"save_time_s": -1.0}, "hardware.save_time_s must not be negative"),
        ({"max_job_time_s": 100.0}, "leaves no time to train"),
        ({"nodes_per_run": 0}, "hardware.nodes_per_run must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(smoke, changes, message):
    changed = {group: OmegaConf.create(value) for group, value in to_dict(smoke).items()}
    changed["hardware"].update(changes)
    with pytest.raises(ConfigError, match=message):
        check(changed)


# inside a job


def test_launchers():
    words = ["--results", "r", "--run", "x"]
    environment = {"SLURM_JOB_ID": "12007", "SLURM_NODEID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.5"}
    one = launch.launch_command(words, 1, 1, 16, False, environment)
    assert one[1:] == ["-m", "xlstm_scaling.cli", "train", *words]
    node = launch.launch_command(words, 1, 8, 16, False, environment)
    assert node[2] == "xlstm_scaling.training.torchrun"
    assert "--standalone" in node
    several = launch.launch_command(words, 4, 8, 16, False, environment)
    assert several[0] == "srun"
    assert several[several.index("--nodes") + 1] == several[several.index("--ntasks") + 1] == "4"
    assert several[several.index("--cpus-per-task") + 1] == "16"
    task = launch.launch_command(words, 4, 8, 16, True, environment)
    pairs = dict(pairwise(task))
    assert (pairs["--nnodes"], pairs["--nproc-per-node"], pairs["--node-rank"]) == ("4", "8", "1")
    assert pairs["--master-addr"] == "10.0.0.5"
    ports = {launch.rendezvous(environment | {"SLURM_JOB_ID": str(job)})[2] for job in range(1000)}
    assert len(ports) == 1000  # neighbours on a node do not meet
    assert all(1024 < port < 32768 for port in ports)


def test_caches_lie_on_the_node_and_belong_to_versions():
    first = launch.node_local_caches({}, {"torch": "2.13"})
    assert set(first) == {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    assert first != launch.node_local_caches({}, {"torch": "2.14"})
    assert "TRITON_CACHE_DIR" not in launch.node_local_caches({"TRITON_CACHE_DIR": "/mine"}, {})


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A Slurm job of the number 17, whose `scontrol` writes down what it is asked and ends the job, as Slurm does."""
    programs = tmp_path / "programs"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nkill -KILL $PPID\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path / "asked"


def start_job(*words):
    command = [sys.executable, "-m", "xlstm_scaling.study.launch", "--", *map(str, words), "--quiet", "--uncertified"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_run_that_is_stopped_saves_and_its_job_goes_back_into_the_queue(job, tiny_config, tiny_tokens, tmp_path):
    spec = replace(plan_runs(tiny_config)[0], num_train_steps=20_000)
    plan = tmp_path / "plan.json"
    hardware = to_dict(tiny_config.hardware)
    plan.write_text(json.dumps({"hardware": hardware, "runs": [asdict(spec)], "study": "t", "corpus": "c"}))
    (tmp_path / "tokens").symlink_to(tiny_tokens / "tokens")
    folder = tmp_path / "runs" / spec.run_id
    with start_job("--results", tmp_path, "--plan", plan, "--run", spec.run_id) as process:
        history = folder / "history.jsonl"
        while process.poll() is None and not (history.is_file() and history.stat().st_size):
            time.sleep(0.05)
        assert not list(folder.glob("checkpoints/*"))
        process.terminate()
        text = process.stderr.read()
    assert job.read_text() == "requeue 17\n", text
    assert process.returncode == -signal.SIGKILL
    assert len(list(folder.glob("checkpoints/step-*.ckpt"))) == 1


def test_a_run_that_fails_is_left_to_the_workflow(job, tmp_path):
    with start_job("--results", tmp_path, "--plan", tmp_path / "plan.json", "--run", "x") as process:
        assert "no plan at" in process.stderr.read()
    assert process.returncode == 1
    assert not job.exists()
    assert "status 1" in json.loads((tmp_path / "runs" / "x" / "failure.json").read_text())["error"]
