"""Locks of folders that several studies, users and hosts share: one process at a time makes what is in a folder.

A lock is a file ``lock-<n>.json`` in the folder: created exclusively (O_EXCL, which NFS heeds), it says who its owner
is, and its owner touches it every few seconds from a thread. A lock whose owner is gone (no such process on this host)
or silent (not touched for ``STALE_S``) is taken over: the taker creates number n + 1, which only one can, and removes
number n. The owner of the highest number holds the lock; a process that slept through a take-over finds its file gone
and writes no more (`FolderLock.require`). Ages are by the clock of the file system, so that clocks of hosts may differ.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from xlstm_scaling.study.errors import Preempted
from xlstm_scaling.study.files import full_disk_named

log = logging.getLogger(__name__)

#: how often an owner touches its lock [s]
HEARTBEAT_S = 10.0
#: a lock that was not touched for so long belongs to nobody: its owner's host is lost, or its owner is stopped [s]
STALE_S = 120.0
#: how often a waiting process looks [s]
POLL_S = 1.0

_NAME = re.compile(r"^lock-(\d+)\.json$")


class LockLost(Preempted):
    """Another process took over while this one was silent; nothing more may be written."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. ``host``: with the boot and the pid namespace, within which ``pid`` and ``started`` (the
    process's start, of /proc) name one process; ``job``: of a scheduler; ``since``: UTC."""

    token: str
    host: str
    pid: int
    started: str
    user: str
    job: str | None
    since: str

    @classmethod
    def here(cls) -> Owner:
        """This process, with a token that no other lock has."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        pid = os.getpid()
        return cls(uuid.uuid4().hex, host_identity(), pid, _process(pid)[1], user(), scheduler_job(), since)

    @property
    def host_name(self) -> str:
        return self.host.split("/")[0]

    def gone(self) -> bool:
        """Whether it surely is: a process of this host that does not exist any more."""
        if self.host != host_identity():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's process
        state, now = _process(self.pid)
        return state in ("Z", "X") or (now != self.started and "" not in (now, self.started))

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.user}'s process {self.pid} on {self.host_name}{job}"


def host_identity() -> str:
    """This host, this boot of it, and this pid namespace: within them a process id means one process."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    return "/".join([socket.gethostname(), boot, namespace])


def _process(pid: int) -> tuple[str, str]:
    """State and start of a process, which tells two of the same id apart; empty where the system does not tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return words[0], words[19]
    except (OSError, IndexError):
        return "", ""


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def scheduler_job() -> str | None:
    """The job of a scheduler that this process belongs to: Slurm's id, of an array job with its task."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


# reading


def _numbers(folder: Path) -> list[int]:
    """Numbers of the locks in a folder, rising."""
    try:
        names = [path.name for path in Path(folder).iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(found[1]) for name in names if (found := _NAME.match(name)))


def lock_path(folder: Path, number: int) -> Path:
    return Path(folder) / f"lock-{number}.json"


def _read(path: Path) -> tuple[Owner | None, float]:
    """The owner of a lock, None where it is not written yet, and when it was touched. Raises FileNotFoundError."""
    with path.open() as stream:  # opening, not stat: NFS then asks the server
        touched, text = os.fstat(stream.fileno()).st_mtime, stream.read()
    try:
        return Owner(**json.loads(text)), touched
    except (json.JSONDecodeError, TypeError):
        return None, touched


def _now(folder: Path) -> float:
    """The clock of the folder's file system; this host's where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".clock-") as stream:
            stream.write(b"0")
            stream.flush()
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return time.time()


@dataclass(frozen=True)
class Held:
    """A lock that is there: its number, its owner (None: being written), seconds since it was touched, and whether its
    owner counts as dead."""

    number: int
    owner: Owner | None
    silent_s: float
    dead: bool


def lock_state(folder: Path, stale_s: float = STALE_S) -> Held | None:
    """The lock of a folder as it is now; None where there is none."""
    for number in reversed(_numbers(folder)):
        with contextlib.suppress(FileNotFoundError):
            return _state(folder, number, stale_s)
    return None


def _state(folder: Path, number: int, stale_s: float) -> Held:
    """One lock of a folder. Raises FileNotFoundError."""
    owner, touched = _read(lock_path(folder, number))
    silent = max(0.0, _now(folder) - touched)
    return Held(number, owner, silent, silent > stale_s or (owner is not None and owner.gone()))


# holding


class FolderLock:
    """One process's claim on a folder; see the module. ``lost``: noticed by the thread that touches the lock."""

    def __init__(self, folder: Path, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> None:
        self.folder, self.heartbeat_s, self.stale_s = Path(folder), heartbeat_s, stale_s
        self.owner: Owner | None = None
        self.number = 0
        self.lost = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        return lock_path(self.folder, self.number)

    def try_acquire(self) -> Held | None:
        """Take the lock and return None, or return who has it."""
        with full_disk_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        held = lock_state(self.folder, self.stale_s)
        if held is not None and not held.dead:
            return held
        number = 1 if held is None else held.number + 1
        owner = Owner.here()
        path = lock_path(self.folder, number)
        with full_disk_named(path):
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:  # another one was faster; the next look says who
                return held or Held(number, None, 0.0, False)
            try:
                with os.fdopen(handle, "w") as stream:
                    stream.write(json.dumps(asdict(owner)))
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError:  # a lock without an owner would be waited for
                path.unlink(missing_ok=True)
                raise
        for other in _numbers(self.folder):
            if other > number or (other < number and self._alive(other)):  # this one had looked too long ago
                lock_path(self.folder, number).unlink(missing_ok=True)
                return Held(other, None, 0.0, False)
        for older in _numbers(self.folder):
            if older < number:
                lock_path(self.folder, older).unlink(missing_ok=True)
        if held is not None:
            log.warning(
                "the lock of %s was taken over from %s, who %s", self.folder, held.owner or "nobody", _why(held)
            )
        self.owner, self.number, self.lost = owner, number, False
        self._end.clear()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return None

    def _alive(self, number: int) -> bool:
        """Whether this lock's owner is at work."""
        try:
            state = _state(self.folder, number, self.stale_s)
        except FileNotFoundError:
            return False
        return not state.dead

    def acquire(self, what: str) -> bool:
        """Wait for the lock; whether another process had it in between. ``what`` is being made, for the message."""
        held = self.try_acquire()
        waited, told = held is not None, None
        while held is not None:
            if held.owner is not None and told != held.owner:
                log.info("%s is being made by %s (since %s); waiting for it", what, held.owner, held.owner.since)
                told = held.owner
            time.sleep(POLL_S)
            held = self.try_acquire()
        return waited

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        if self.owner is None:
            return
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if self.is_held():
            self.path.unlink(missing_ok=True)
        self.owner = None

    def is_held(self) -> bool:
        """Whether the lock is still this process's, by the file system."""
        if self.owner is None or self.lost:
            return False
        try:
            owner, _ = _read(self.path)
            newest = _numbers(self.folder)[-1:]
        except FileNotFoundError:
            owner, newest = None, []
        self.lost = owner != self.owner or newest != [self.number]
        return not self.lost

    def problem(self) -> str | None:
        """Why this process may write no more, if it held the lock and lost it."""
        if self.owner is None or self.is_held():
            return None
        held = lock_state(self.folder, self.stale_s)
        who = f" to {held.owner}" if held is not None and held.owner is not None else ""
        return (
            f"{self.folder}: this process was silent for more than {self.stale_s:g} s and lost its lock{who}; it stops "
            "without writing. Run it again to take that result"
        )

    def require(self) -> None:
        """Before anything is written. Raises LockLost."""
        problem = self.problem()
        if problem is not None:
            raise LockLost(problem)

    def _beat(self) -> None:
        while not self._end.wait(self.heartbeat_s):
            try:
                if not self.is_held():
                    return
                os.utime(self.path)
            except OSError as error:  # the next beat may get through
                log.warning("%s cannot be touched: %s", self.path, error)


def _why(held: Held) -> str:
    if held.owner is not None and held.owner.gone():
        return "is gone"
    return f"said nothing for {held.silent_s:.0f} s"


@contextmanager
def folder_locked(folder: Path, what: str) -> Iterator[tuple[FolderLock, bool]]:
    """Hold a folder's lock; yields it, and whether another process had it before."""
    lock = FolderLock(folder)
    waited = lock.acquire(what)
    try:
        yield lock, waited
    finally:
        lock.release()
