"""Locks of shared folders: one owner at a time, take-over of dead and silent owners, and no writing after it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from xlstm_scaling.study import locks
from xlstm_scaling.study.locks import STALE_S, FolderLock, LockLost, Owner, folder_locked, lock_path, lock_state


def make_silent(folder):
    """As after a long silence of the owner, by the clock of the file system."""
    path = lock_path(folder, lock_state(folder).number)
    before = time.time() - 10 * STALE_S
    os.utime(path, (before, before))


def test_one_at_a_time_and_nothing_left(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.try_acquire() is None
    held = second.try_acquire()
    assert (held.owner.pid, held.dead) == (os.getpid(), False)
    first.require()
    first.release()
    assert second.try_acquire() is None
    first.release()  # a second time: it is not its own any more
    assert second.is_held()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_silent_owner_is_fenced(tmp_path):
    sleeper, taker = FolderLock(tmp_path), FolderLock(tmp_path)
    sleeper.try_acquire()
    make_silent(tmp_path)
    assert lock_state(tmp_path).dead
    assert taker.try_acquire() is None
    with pytest.raises(LockLost, match=f"lost its lock to .*process {os.getpid()}"):
        sleeper.require()
    sleeper.release()
    taker.require()
    taker.release()


def test_a_process_of_another_host_counts_as_alive_until_it_is_silent(tmp_path):
    owner = replace(Owner.here(), host="elsewhere/boot/1", pid=2**22 + 1)
    tmp_path.joinpath("lock-3.json").write_text(json.dumps(asdict(owner)))
    held = FolderLock(tmp_path).try_acquire()
    assert (held.owner, held.number, held.dead) == (owner, 3, False)
    make_silent(tmp_path)
    lock = FolderLock(tmp_path)
    assert lock.try_acquire() is None
    assert [path.name for path in tmp_path.iterdir()] == ["lock-4.json"]
    lock.release()


def test_a_reused_process_id_is_not_the_owner(tmp_path):
    lock_path(tmp_path, 1).write_text(json.dumps(asdict(replace(Owner.here(), started="1"))))
    assert lock_state(tmp_path).dead


def test_a_lock_that_is_being_written_is_waited_for(tmp_path):
    lock_path(tmp_path, 1).touch()
    held = FolderLock(tmp_path).try_acquire()
    assert (held.owner, held.dead) == (None, False)
    make_silent(tmp_path)
    assert lock_state(tmp_path).dead


def test_one_who_looked_too_early_withdraws(tmp_path, monkeypatch):
    """Between a look at a stale lock and the attempt to take it, others took it over and gave it back, and another
    process began anew."""
    current, late = FolderLock(tmp_path), FolderLock(tmp_path)
    assert current.try_acquire() is None
    stale = locks.Held(5, replace(Owner.here(), started="1"), 0.0, True)
    with monkeypatch.context() as patched:
        patched.setattr(locks, "lock_state", lambda *_: stale)
        assert late.try_acquire() is not None
    current.require()
    assert [path.name for path in tmp_path.iterdir()] == ["lock-1.json"]
    current.release()


def test_the_owner_touches_its_lock(tmp_path):
    lock = FolderLock(tmp_path, heartbeat_s=0.01)
    lock.try_acquire()
    make_silent(tmp_path)
    for _ in range(1000):
        if not lock_state(tmp_path).dead:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the lock was not touched")
    lock.release()


def add_one(folder, times):
    for _ in range(times):
        with folder_locked(folder, "the sum"):
            path = Path(folder) / "sum"
            path.write_text(str(int(path.read_text()) + 1))


def test_many_processes_take_turns(tmp_path, monkeypatch):
    """Read, add, write: a lost update would show."""
    monkeypatch.setattr(locks, "POLL_S", 0.001)
    (tmp_path / "sum").write_text("0")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=add_one, args=(tmp_path, 10)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert (tmp_path / "sum").read_text() == "40"
    assert [path.name for path in tmp_path.iterdir()] == ["sum"]


OWNER = """
import sys, time
from pathlib import Path
from xlstm_scaling.study.locks import folder_locked
with folder_locked(Path(sys.argv[1]), "the folder") as (lock, _):
    print("here", flush=True)
    sys.stdin.readline()
    lock.require()
    (Path(sys.argv[1]) / "written").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_process_loses_its_lock(tmp_path, number):
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "here\n"
    child.send_signal(number)
    if number == signal.SIGSTOP:
        os.waitpid(child.pid, os.WUNTRACED)
        assert not lock_state(tmp_path).dead  # a breath is no death
        make_silent(tmp_path)
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not even reaped
    with folder_locked(tmp_path, "the folder"):
        child.send_signal(signal.SIGCONT)
        _, errors = child.communicate("go on\n")
        assert not (tmp_path / "written").exists()
        assert ("LockLost" in errors) == (number == signal.SIGSTOP)
        assert child.returncode != 0
