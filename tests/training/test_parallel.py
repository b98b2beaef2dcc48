"""Several devices: the loss, the weights and the first weights of one; stopped and gone on by others; damage named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import torch
from omegaconf import OmegaConf
from processes import initial_weights, refused, run_processes, train_runs, train_shared, train_stopped
from torch.autograd.graph import saved_tensors_hooks

from xlstm_scaling.study.errors import EXIT_PREEMPTED, Preempted
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.study.run_spec import TrunkSpec
from xlstm_scaling.study.schemas import HardwareConfig
from xlstm_scaling.training.checkpoint import CheckpointError, load_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.parallel import Parallel, ParallelError, shard_degree
from xlstm_scaling.training.run import train
from xlstm_scaling.training.sharded import Checkpoints, read_manifest
from xlstm_scaling.training.torchrun import were_stopped
from xlstm_scaling.training.trainer import build_run_model

QUIET = Execution(progress=False)
ARCHITECTURES = ["xlstm", "transformer"]
#: the batch is no multiple of 4
BATCH, STEPS = 6, 10


@pytest.fixture(scope="module")
def specs(tiny_config):
    """Two blocks of each architecture."""
    found = {run.arch: run for run in plan_runs(tiny_config) if run.size == "big"}
    small = {"num_train_steps": STEPS, "batch_sequences": BATCH, "warmup_steps": 2, "cooldown_steps": 2}
    return {arch: replace(run, **small) for arch, run in found.items()}


@pytest.fixture(scope="module")
def tokens_folder(tiny_tokens, specs):
    return tiny_tokens / "tokens" / specs["xlstm"].tokens_id


@pytest.fixture(scope="module")
def alone(specs, tokens_folder, tmp_path_factory):
    """The folders of the runs of one process."""
    folders = {arch: tmp_path_factory.mktemp(arch) for arch in specs}
    for arch, spec in specs.items():
        train(spec, tokens_folder, folders[arch], QUIET)
    return folders


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def assert_same_run(folder, other):
    """One training curve, one trained model, to the rounding of fp32."""
    ours, theirs = history(folder), history(other)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for name in ("train_loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose([e[name] for e in ours], [e[name] for e in theirs], rtol=1e-5)
    a, b = load_file(folder / "final.ckpt"), load_file(other / "final.ckpt")
    assert a["identity"] == b["identity"]
    assert a["result"]["val_loss"] == pytest.approx(b["result"]["val_loss"], rel=1e-6)
    assert a["model"].keys() == b["model"].keys()
    for name, value in b["model"].items():
        # Adam divides by the gradient's size: where that is rounding, so is the step
        assert a["model"][name].dtype == value.dtype
        torch.testing.assert_close(
            a["model"][name], value, rtol=1e-3, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("count", [1, 2, 5, 6, 16])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_every_row_counts_once_and_all_make_as_many_passes(count, world, at_once):
    seen, passes = [], set()
    for rank in range(world):
        parallel = Parallel(rank, world)
        own = np.arange(count)[parallel.rows(count)]
        parts = list(parallel.parts(count, at_once))
        assert len(own)
        passes.add(len(parts))
        assert all(len(own[part]) == max(rows, 1) and rows <= at_once for part, rows in parts)
        seen += [row for part, rows in parts for row in own[part][:rows]]
    assert sorted(seen) == list(range(count))
    assert len(passes) == 1


def test_shards_that_cannot_be_are_refused():
    assert [shard_degree(shard, 4) for shard in ("none", "full", 2)] == [1, 4, 2]
    with pytest.raises(ParallelError, match="does not divide the 4 devices"):
        shard_degree(3, 4)
    assert Parallel.start("cpu", "full") == Parallel()
    for wrong in ("half", 0, True, None):
        with pytest.raises(ParallelError, match="must be none, full or a number"):
            shard_degree(wrong, 4)


def test_a_world_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ParallelError, match="start the command with torchrun"):
        Parallel.start("cpu", "full")


@pytest.mark.parametrize(
    ("world", "arch", "settings"),
    [
        pytest.param(
            2, "xlstm", [{"shard": "none"}, {"shard": "full", "micro_batch_sequences": 2}], marks=pytest.mark.exhaustive
        ),
        (2, "transformer", [{"shard": "full"}, {"shard": "none", "micro_batch_sequences": 2}]),
        (4, "xlstm", [{"shard": 2, "micro_batch_sequences": 1}, {"shard": "full", "activation_checkpointing": True}]),
        pytest.param(
            4,
            "transformer",
            [{"shard": "full", "micro_batch_sequences": 1}, {"shard": 2}, {"shard": "none"}],
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_the_number_of_devices_changes_rounding_only(specs, tokens_folder, alone, tmp_path, world, arch, settings):
    runs = [
        (specs[arch], tokens_folder, tmp_path / str(index), replace(QUIET, **chosen))
        for index, chosen in enumerate(settings)
    ]
    said = run_processes(world, train_runs, runs)
    for results in said:
        assert results == said[0], results
    for index, result in enumerate(said[0]):
        assert result["devices"] == world
        assert result["status"] == "ok"
        assert_same_run(tmp_path / str(index), alone[arch])
        assert not list((tmp_path / str(index) / "checkpoints").glob("*"))


def test_fewer_sequences_than_devices(specs, tokens_folder, tmp_path):
    spec = replace(specs["transformer"], batch_sequences=2, num_train_steps=4)
    train(spec, tokens_folder, tmp_path / "alone", QUIET)
    run_processes(3, train_runs, [(spec, tokens_folder, tmp_path / "three", replace(QUIET, shard="full"))])
    assert_same_run(tmp_path / "three", tmp_path / "alone")


def test_first_weights_are_those_of_one_device(specs):
    """Bit for bit, of shards that are not even."""
    said = run_processes(3, initial_weights, specs["xlstm"], "full")
    expected = build_run_model(specs["xlstm"]).state_dict()
    total = sum(value.numel() for value in expected.values())
    assert sum(held for _, held in said) == total
    assert max(held for _, held in said) < 0.36 * total
    for weights, _ in said:
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(weights[name], value.numpy(), err_msg=name)


@pytest.fixture(scope="module")
def stopped(specs, tokens_folder, tmp_path_factory):
    """Runs on four processes of which the last got SIGTERM: saved after every step, stopped after the sixth."""
    folders = {arch: tmp_path_factory.mktemp(f"stopped-{arch}") for arch in specs}
    for arch, spec in specs.items():
        execution = replace(QUIET, shard="full" if arch == "xlstm" else 2, checkpoint_interval_s=0.0)
        said = run_processes(4, train_stopped, spec, tokens_folder, folders[arch], execution, 5, 3)
        assert all(isinstance(error, Preempted) for error in said), said
        assert {str(error) for error in said} == {f"{spec.run_id} saved at step 6; run it again to go on"}
    return folders


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize(
    ("arch", "world"),
    [
        ("xlstm", 2),
        ("xlstm", 1),
        pytest.param("transformer", 1, marks=pytest.mark.exhaustive),
        pytest.param("transformer", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_stopped_on_four_devices_goes_on_with_fewer(specs, tokens_folder, alone, stopped, tmp_path, arch, world):
    folder = copied(stopped[arch], tmp_path / "run")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-5.sharded", "step-6.sharded"]
    if world == 1:
        train(specs[arch], tokens_folder, folder, QUIET)
    else:
        run_processes(world, train_runs, [(specs[arch], tokens_folder, folder, replace(QUIET, shard="full"))])
    assert_same_run(folder, alone[arch])
    assert not list((folder / "checkpoints").iterdir())


def test_stopped_on_one_device_goes_on_with_more(specs, tokens_folder, alone, tmp_path):
    error = run_processes(1, train_stopped, specs["xlstm"], tokens_folder, tmp_path / "run", QUIET, 4, 0)[0]
    assert isinstance(error, Preempted)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-5.ckpt"]
    run_processes(2, train_runs, [(specs["xlstm"], tokens_folder, tmp_path / "run", replace(QUIET, shard="full"))])
    assert_same_run(tmp_path / "run", alone["xlstm"])


def damage(folder, how):
    data, manifest = sorted(folder.glob("*.distcp"))[1], folder / "manifest.json"
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-9])
    elif how == "altered":
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 1
        data.write_bytes(raw)
    elif how == "missing":
        data.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "torn manifest":
        manifest.write_text(manifest.read_text()[:100])
    else:
        old, new = {"edited": ('"step": 6', '"step": 7'), "newer": ('"format": 1', '"format": 9'),
                    "foreign": ("sharded checkpoint of", "something of")}[how]  # fmt: skip
        assert old in manifest.read_text()
        manifest.write_text(manifest.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "digest"),
        ("altered", "digest"),
        ("missing", "is missing"),
        ("no manifest", "incomplete"),
        ("torn manifest", "altered"),
        ("edited", "digest"),
        ("newer", "newer than 1"),
        ("foreign", "not a sharded checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(specs, stopped, tmp_path, how, says):
    folder = copied(stopped["xlstm"] / "checkpoints", tmp_path / "checkpoints")
    identity = read_manifest(folder / "step-6.sharded")["plain"]["identity"]
    checkpoints = Checkpoints(folder, Parallel())
    assert checkpoints.load_latest(identity)[0]["step"] == 6
    damage(folder / "step-6.sharded", how)
    content, problems = checkpoints.load_latest(identity)
    assert content["step"] == 5
    assert content["tensors"] == folder / "step-5.sharded"
    assert len(problems) == 1
    assert says in problems[0]
    assert str(folder / "step-6.sharded") in problems[0]
    content, problems = checkpoints.load_latest("another run")
    assert content is None
    assert "belongs to another run" in problems[-1]


def test_a_torn_checkpoint_does_not_end_a_run(specs, tokens_folder, alone, stopped, tmp_path):
    """Nor what a killed process was writing: two go on from the step before, and end as if nothing had been."""
    folder = copied(stopped["transformer"], tmp_path / "run")
    damage(folder / "checkpoints" / "step-6.sharded", "truncated")
    shutil.copytree(folder / "checkpoints" / "step-5.sharded", folder / "checkpoints" / ".step-7.sharded.partial")
    run_processes(2, train_runs, [(specs["transformer"], tokens_folder, folder, replace(QUIET, shard="full"))])
    assert_same_run(folder, alone["transformer"])
    assert not list((folder / "checkpoints").iterdir())


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_all(specs, tokens_folder, tmp_path):
    """Where the folder's name is taken by a file; nothing half-written stays."""
    (tmp_path / "checkpoints").write_text("in the way")
    execution = replace(QUIET, shard="full", checkpoint_interval_s=0.0)
    said = run_processes(2, train_stopped, specs["xlstm"], tokens_folder, tmp_path, execution, 2, 0)
    assert all(isinstance(error, OSError | CheckpointError) for error in said), said


@pytest.mark.parametrize(
    ("settings", "seeds", "says"),
    [
        ({"shard": 3}, None, "does not divide the 2 devices"),
        ({"compile_cache": "cache"}, None, "hardware.compile is for one device"),
        ({}, [1, 2], "differs between processes 0 and 1: do all nodes see the same files"),
    ],
)
def test_what_cannot_be_is_refused_by_all(specs, tokens_folder, tmp_path, settings, seeds, says):
    said = run_processes(2, refused, specs["xlstm"], tokens_folder, tmp_path, replace(QUIET, **settings), seeds)
    assert all(says in text for text in said), said


def test_settings_are_checked_when_they_are_read(tiny_overrides):
    from xlstm_scaling.study.config import ConfigError, compose

    hardware = compose([*tiny_overrides, "hardware.shard=4", "hardware.devices_per_run=8"]).hardware
    assert (hardware.shard, hardware.devices_per_run) == (4, 8)
    for wrong in ("hardware.shard=half", "hardware.shard=0", "hardware.shard=true", "hardware.devices_per_run=0"):
        with pytest.raises(ConfigError, match=r"hardware\.(shard|devices_per_run) must be"):
            compose([*tiny_overrides, wrong])
    with pytest.raises(ConfigError, match="one device a run"):
        compose([*tiny_overrides, "hardware.devices_per_run=2", "hardware.compile=true"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_activation_checkpointing_changes_memory_only(specs, arch):
    """The bits of loss and gradients stay; of what blocks keep for the backward pass only their input remains."""
    model = build_run_model(specs[arch])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 280, (3, 65), generator=generator)
    starts = torch.rand(3, 64, generator=generator) < 0.05
    parameters = {value.untyped_storage().data_ptr() for value in model.parameters()}
    outcomes = []
    for model.activation_checkpointing in (False, True):
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:], starts)
        loss.backward()
        outcomes.append((loss.item(), [value.grad.clone() for value in model.parameters()], sum(kept.values())))
        model.zero_grad()
    (loss, gradients, whole), (again, gradients_again, less) = outcomes
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert less < 0.4 * whole


def test_a_trunk_of_two_devices_has_branches_for_one(specs, tokens_folder, tmp_path):
    trunk_runs = [
        replace(specs["transformer"], decay="constant", num_train_steps=steps, cooldown_steps=2) for steps in (6, 10)
    ]
    trunk = TrunkSpec(trunk_runs[0].trunk_id, tuple(trunk_runs))
    execution = replace(QUIET, shard="full")
    results = run_processes(2, train_shared, trunk, tokens_folder, tmp_path / "trunk", execution)
    assert all(result["status"] == "ok" for result in results), results
    assert sorted(p.name for p in (tmp_path / "trunk").glob("branch-*.ckpt")) == ["branch-4.ckpt", "branch-8.ckpt"]
    for run in trunk_runs:
        folder = tmp_path / str(run.num_train_steps)
        train(run, tokens_folder, folder / "alone", QUIET)
        train(run, tokens_folder, folder / "branch", replace(QUIET, trunk=tmp_path / "trunk"))
        assert_same_run(folder / "branch", folder / "alone")


def launch(spec, tiny_tokens, results):
    """The command by which the workflow trains a run of a plan on two devices of this machine."""
    hardware = OmegaConf.to_container(OmegaConf.structured(HardwareConfig)) | {"shard": "full"}
    plan = results / "plan.json"
    plan.write_text(json.dumps({"hardware": hardware, "runs": [asdict(spec)], "study": "t", "corpus": "c"}))
    (results / "tokens").symlink_to(tiny_tokens / "tokens")
    words = ["--results", str(results), "--plan", str(plan), "--run", spec.run_id, "--quiet", "--uncertified"]
    return [sys.executable, "-m", "xlstm_scaling.study.launch", "--devices", "2", "--", *words]


@pytest.mark.exhaustive
def test_the_launcher_trains_a_run_of_a_plan(specs, tokens_folder, tiny_tokens, alone, tmp_path):
    spec = specs["transformer"]
    command = launch(spec, tiny_tokens, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1
    folder = tmp_path / "runs" / spec.run_id
    assert json.loads((folder / "result.json").read_text())["devices"] == 2
    assert_same_run(folder, alone["transformer"])


@pytest.mark.slow
@pytest.mark.parametrize("told", ["a process", pytest.param("the launcher", marks=pytest.mark.exhaustive)])
def test_the_launcher_says_that_a_run_was_stopped(specs, tiny_tokens, tmp_path, told):
    """Status 85 and a checkpoint of both devices, where torchrun itself would end with 1; nobody is left."""
    spec = replace(specs["transformer"], num_train_steps=2_000)
    command = launch(spec, tiny_tokens, tmp_path)
    folder = tmp_path / "runs" / spec.run_id
    history_file = folder / "history.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None and not (history_file.is_file() and history_file.stat().st_size):
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in family if {"RANK"} & child.environ().keys()]
        (process if told == "the launcher" else workers[-1]).terminate()
        text = process.communicate()[0]
    assert process.returncode == EXIT_PREEMPTED, text
    assert len(workers) == 2
    assert not any(child.is_running() for child in family)
    (checkpoint,) = (folder / "checkpoints").glob("step-*.sharded")
    assert read_manifest(checkpoint)
    assert not (folder / "failure.json").exists()


def test_only_runs_that_were_asked_to_stop_count_as_stopped():
    assert were_stopped([EXIT_PREEMPTED, EXIT_PREEMPTED])
    assert were_stopped([EXIT_PREEMPTED, -signal.SIGTERM])
    assert not were_stopped([EXIT_PREEMPTED, 1])
    assert not were_stopped([-signal.SIGTERM, -signal.SIGKILL])
