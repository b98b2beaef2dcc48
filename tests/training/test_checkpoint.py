"""Checkpoints: what is torn, altered, foreign or newer is named, and the previous one is used."""

import struct

import pytest
import torch

from xlstm_scaling.study import files
from xlstm_scaling.training.checkpoint import CheckpointError, CheckpointFolder, load_file, save_file


def content(step):
    return {"identity": "me", "step": step, "model": {"w": torch.full((100,), float(step))}}


def test_round_trip_keeps_the_last_two(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (9, 10, 100):
        folder.save(step, content(step))
    assert [p.name for p in folder.paths()] == ["step-10.ckpt", "step-100.ckpt"]
    latest, problems = folder.load_latest("me")
    assert latest["step"] == 100
    assert torch.equal(latest["model"]["w"], torch.full((100,), 100.0))
    assert not problems


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "altered":
        raw[-10] ^= 1
    elif how == "empty":
        raw = bytearray()
    elif how == "foreign":
        raw = bytearray(b"PK\x03\x04 a zip, perhaps" * 10)
    elif how == "newer":
        raw[8:12] = struct.pack("<I", 99)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("how", "says"),
    [("truncated", "digest"), ("altered", "digest"), ("empty", "not a checkpoint"), ("foreign", "not a checkpoint"),
     ("newer", "newer")],
)  # fmt: skip
def test_damage_is_named_and_the_previous_one_used(tmp_path, how, says):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, content(1))
    path = folder.save(2, content(2))
    damage(path, how)
    with pytest.raises(CheckpointError, match=says) as error:
        load_file(path)
    assert str(path) in str(error.value)
    latest, problems = folder.load_latest("me")
    assert latest["step"] == 1
    assert len(problems) == 1


def test_another_runs_checkpoint_is_not_used(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, content(1))
    latest, problems = folder.load_latest("somebody else")
    assert latest is None
    assert "belongs to another run" in problems[0]


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "step-1.ckpt"
    save_file(path, {"model": Hostile()})
    with pytest.raises(CheckpointError, match="something else than tensors"):
        load_file(path)


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import errno

    path = tmp_path / "step-1.ckpt"
    save_file(path, content(1))
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.DiskFullError, match="disk full while writing"):
        save_file(path, content(2))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
