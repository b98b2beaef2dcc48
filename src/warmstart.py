"""Warm starts: many short commands forked from one process that has imported torch already.

Starting Python and importing torch takes seconds; a small run may take ten. The first command of a workflow starts a
server (for the lifetime of the workflow's main process), which imports the training code once and forks a child for
each further command. A child is a process of its own with its own threads, memory and exit status, and computes what a
fresh process computes. Where no server can be had, the command runs in its own process.

The client must stay cheap: this module imports the standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: every command starts its own process
    fcntl = None

#: set by the workflow to host:pid; the server lives as long as that process
SESSION_VARIABLE = "XLSTM_SCALING_SESSION"
#: a Unix socket's name may have 107 bytes
MAX_SOCKET_NAME = 100
START_TIMEOUT_S = 60.0
#: how often the server looks for ended children [s]
POLL_S = 0.05
_LENGTH = struct.Struct("<I")


def open_session(environment: MutableMapping[str, str]) -> None:
    """Make this process the one that the server belongs to, unless a process of this host is already."""
    if session_pid(environment) is None:
        environment[SESSION_VARIABLE] = f"{socket.gethostname()}:{os.getpid()}"


def session_pid(environment: Mapping[str, str] = os.environ) -> int | None:
    """The living process of this host that the server belongs to, or None where warm starts are not asked for."""
    host, _, pid = environment.get(SESSION_VARIABLE, "").rpartition(":")
    return int(pid) if host == socket.gethostname() and pid.isdigit() and _alive(int(pid)) else None


def socket_path(pid: int) -> Path:
    """Where the server of a session listens: a folder of this user only, short enough for a socket's name."""
    folder = Path(tempfile.gettempdir()) / f"xlstm-scaling-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    key = hashlib.sha256(f"{pid}:{_start_time(pid)}:{__file__}:{sys.prefix}".encode()).hexdigest()[:12]
    return folder / f"{key}.sock"


def _start_time(pid: int) -> str:
    """Tells two processes of the same id apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# client


def run_warm(argv: list[str]) -> int | None:
    """Run the command ``argv`` in a fork of the session's server -> its exit status; None if there is no server."""
    pid = session_pid()
    if pid is None or fcntl is None or not hasattr(socket, "send_fds"):
        return None
    try:
        connection = _connect(pid)
    except OSError:
        return None
    with connection:
        request = json.dumps({"argv": argv, "cwd": str(Path.cwd()), "env": dict(os.environ)}).encode()
        socket.send_fds(connection, [_LENGTH.pack(len(request))], [0, 1, 2])
        connection.sendall(request)
        child = _receive(connection)
        if child is None:
            return None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda sig, _frame: _forward(child, sig))
        status = _receive(connection)
    if status is None:
        print(f"the warm start server died while it ran: {' '.join(argv)}", file=sys.stderr)
        return 1
    return status if status >= 0 else 128 - status


def _forward(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _connect(pid: int) -> socket.socket:
    path = socket_path(pid)
    if len(str(path)) > MAX_SOCKET_NAME:
        raise OSError(f"{path} is too long for a socket")
    with contextlib.suppress(OSError):
        return _open(path)
    with Path(f"{path}.lock").open("w") as lock:  # one client starts the server, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            return _open(path)
        with Path(f"{path}.log").open("w") as errors:
            server = subprocess.Popen(
                [sys.executable, "-m", "xlstm_scaling.warmstart", str(path), str(pid)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                return _open(path)
            if server.poll() is not None:
                raise ConnectionError("the warm start server ended; its log lies beside its socket")
            time.sleep(POLL_S)
    raise TimeoutError("the warm start server does not answer")


def _open(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def _receive(connection: socket.socket) -> int | None:
    data = b""
    while len(data) < 4:
        try:
            part = connection.recv(4 - len(data))
        except InterruptedError:
            continue
        if not part:
            return None
        data += part
    return struct.unpack("<i", data)[0]


# server


def serve(path: Path, pid: int) -> None:
    """Import the training code, listen on ``path`` and fork a child a request, until process ``pid`` is gone."""
    import torch

    import xlstm_scaling.stage_commands
    import xlstm_scaling.training.run  # noqa: F401

    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)  # no thread pool may exist before a fork
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # the first optimiser imports for two seconds
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    listener.settimeout(POLL_S)
    running: dict[int, socket.socket] = {}
    try:
        while True:
            _reap(running)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if not _alive(pid) and not running:
                    return
                _stop_orphans(running)
                continue
            child = _fork(connection, listener, running)
            if child is not None:
                running[child] = connection
    finally:
        listener.close()
        for leftover in (path, Path(f"{path}.lock"), Path(f"{path}.log")):
            Path(leftover).unlink(missing_ok=True)


def _fork(connection: socket.socket, listener: socket.socket, running: dict[int, socket.socket]) -> int | None:
    header, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    if len(header) < _LENGTH.size or len(fds) != 3:
        connection.close()
        return None
    size, body = _LENGTH.unpack(header)[0], b""
    while len(body) < size and (part := connection.recv(size - len(body))):
        body += part
    child = os.fork()
    if child == 0:
        listener.close()
        for other in running.values():
            other.close()
        connection.close()
        os._exit(_child(json.loads(body), fds))
    for fd in fds:
        os.close(fd)
    connection.sendall(struct.pack("<i", child))
    return child


def _child(request: dict, fds: list[int]) -> int:
    """Become the command: its streams, folder and environment; then run it."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    from xlstm_scaling.cli import run_command

    try:
        status = run_command(request["argv"])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        status = 130
    except BaseException:  # the child must end here, whatever happened; the traceback is in its log
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _reap(running: dict[int, socket.socket]) -> None:
    """Report the exit status of children that ended."""
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        connection = running.pop(child, None)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("<i", os.waitstatus_to_exitcode(status)))
            connection.close()


def _stop_orphans(running: dict[int, socket.socket]) -> None:
    """A client that was killed takes its child with it: SIGTERM, so that a run can save."""
    for child, connection in running.items():
        connection.setblocking(False)
        try:
            gone = connection.recv(1) == b""
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        finally:
            connection.setblocking(True)
        if gone:
            _forward(child, signal.SIGTERM)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
