"""Starts the processes of a run, on one machine or on the nodes of a Slurm job, and says how the run ended.

    python -m xlstm_scaling.study.launch [--nodes N] [--devices D] [--cpus C] [--save-time S] -- TRAIN OPTIONS

One process of one node is started directly, several by torchrun, several nodes by srun and a torchrun each. A run that
was asked to stop (SIGTERM; outside of Slurm Ctrl-C too) saves and ends with status 85 (`errors.EXIT_PREEMPTED`). In a
Slurm job, if it has saved anything new, the job is put back into the queue under its own id (`scontrol requeue`), so
that the workflow goes on waiting for it and no retry is used up; else the status is passed on. Imports the standard
library only, as a cheap process around the costly ones.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from xlstm_scaling.study.errors import EXIT_PREEMPTED

#: how long a job that was requeued waits for its end [s]
REQUEUE_WAIT_S = 120.0
#: how long tasks of other nodes may go on once one has ended [s]
TASKS_WAIT_S = 60.0
#: ports for the rendezvous of torchrun's processes, by job id
FIRST_PORT, PORTS = 20000, 12000


def node_local_caches(environment: Mapping[str, str], versions: Mapping[str, str]) -> dict[str, str]:
    """Caches of Triton and of torch.compile on the node's own disk, a folder for each set of versions; a folder that
    the environment names already stays."""
    key = hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"xlstm-scaling-{os.getuid()}" / key
    wanted = {"TRITON_CACHE_DIR": folder / "triton", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    return {name: str(path) for name, path in wanted.items() if name not in environment}


def _versions() -> dict[str, str]:
    found = {"python": sys.version}
    for name in ("torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def run_folder(words: Sequence[str]) -> Path | None:
    """The folder of the run or trunk that options of ``xlstm-scaling train`` name."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--results", default="results")
    for kind in ("run", "trunk"):
        parser.add_argument(f"--{kind}")
    named, _ = parser.parse_known_args(list(words))
    if named.run:
        return Path(named.results) / "runs" / named.run
    return Path(named.results) / "trunks" / named.trunk if named.trunk else None


def saved(folder: Path | None) -> frozenset[tuple[str, int]]:
    """What a run has saved so far: names of checkpoints and branches, and when they were written."""
    if folder is None:
        return frozenset()
    paths = [*folder.glob("checkpoints/step-*"), *folder.glob("branch-*.ckpt")]
    with contextlib.suppress(FileNotFoundError):  # an older one that is being removed
        return frozenset((path.name, path.stat().st_mtime_ns) for path in paths)
    return frozenset()


def rendezvous(environment: Mapping[str, str]) -> tuple[int, str, int]:
    """This task's node number, and the address and port of the first node, by what srun tells its tasks.

    srun is called on the job's first node, so its address is that of node 0. KeyError outside of srun.
    """
    port = FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS
    return int(environment["SLURM_NODEID"]), environment["SLURM_LAUNCH_NODE_IPADDR"], port


def launch_command(
    words: Sequence[str], nodes: int, devices: int, cpus: int, task: bool, environment: Mapping[str, str]
) -> list[str]:
    """The command that trains with ``devices`` processes on each of ``nodes``, on ``cpus`` of each node; ``task``: on
    one of several nodes."""
    train = ["-m", "--", "xlstm_scaling.cli", "train", *words]
    torchrun = [sys.executable, "-m", "xlstm_scaling.training.torchrun", "--nproc-per-node", str(devices)]
    if task:
        number, address, port = rendezvous(environment)
        static = ["--nnodes", str(nodes), "--node-rank", str(number)]
        return [*torchrun, *static, "--master-addr", address, "--master-port", str(port), *train]
    if nodes > 1:
        # what srun does not hear it does not take from the job
        srun = ["srun", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1"]
        srun += ["--cpus-per-task", str(cpus), "--wait", str(round(TASKS_WAIT_S))]
        again = ["--task", "--nodes", str(nodes), "--devices", str(devices)]
        return [*srun, sys.executable, "-m", __spec__.name, *again, "--", *words]
    if devices > 1:
        return [*torchrun, "--standalone", *train]
    return [sys.executable, "-m", "xlstm_scaling.cli", "train", *words]


class _Asked:
    """Notes that this process is asked to stop, and hands it on to the child once (torchrun takes a second signal for
    impatience)."""

    def __init__(self, hand_on: bool, numbers: Sequence[int]) -> None:
        self.hand_on, self.asked, self.child = hand_on, False, None
        for number in numbers:
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.asked = True
        self.tell()

    def tell(self) -> None:
        """SIGTERM to the child, if there is one that was not told yet."""
        if self.hand_on and self.asked and self.child is not None:
            self.hand_on = False
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGTERM)


def supervise(command: Sequence[str], environment: Mapping[str, str], hand_on: bool, apart: bool) -> int:
    """Run a command -> its exit status; 85 where it failed after this process was asked to stop.

    ``hand_on``: the child is told so by this process; ``apart``: and by nobody else, as it is in a session of its own,
    which Ctrl-C does not reach. Slurm signals all processes of a step, and finds them by their session.
    """
    asked = _Asked(hand_on, (signal.SIGTERM, signal.SIGINT) if apart else (signal.SIGTERM,))
    asked.child = subprocess.Popen(command, env=dict(environment), start_new_session=apart)
    asked.tell()  # of what came before there was a child
    status = asked.child.wait()
    if status and asked.asked:
        return EXIT_PREEMPTED
    return status if status >= 0 else 128 - status


def record_failure(folder: Path | None, status: int) -> None:
    """Leave ``failure.json`` for ``xlstm-scaling status`` where the run could not say itself what ended it."""
    if folder is None or (folder / "failure.json").exists():
        return
    from xlstm_scaling.study.files import write_json_atomic

    killed = ": killed, perhaps for its memory" if status == 128 + signal.SIGKILL else ""
    with contextlib.suppress(OSError):
        content = {"error": f"ended with status {status}{killed}", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json_atomic(folder / "failure.json", content)


def requeue(job: str) -> None:
    """Put this job back into the queue and wait to be ended; returns where Slurm refuses, or too late."""
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        print(f"job {job} could not be requeued: {done.stderr.strip()}", file=sys.stderr)
        return
    print(f"job {job} goes back into the queue and goes on from its checkpoint", file=sys.stderr, flush=True)
    time.sleep(REQUEUE_WAIT_S)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m xlstm_scaling.study.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the run (default: 1)")
    parser.add_argument("--devices", type=int, default=1, help="processes on each node (default: 1)")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs on each node (default: 1)")
    parser.add_argument("--save-time", type=float, default=60, help="how long saving may take [s] (default: 60)")
    parser.add_argument("--task", action="store_true", help="this is a task of srun on one of several nodes")
    parser.add_argument("words", nargs="+", metavar="OPTION", help="options of `xlstm-scaling train`, after --")
    args = parser.parse_args(argv)
    environment = dict(os.environ)
    # a warm start server outside of this job would not be stopped, limited or accounted with it
    environment.pop("XLSTM_SCALING_SESSION", None)
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(round(args.save_time)))
    job = environment.get("SLURM_JOB_ID")
    if job:
        environment |= node_local_caches(environment, _versions())
    folder = run_folder(args.words)
    before = saved(folder)
    command = launch_command(args.words, args.nodes, args.devices, args.cpus, args.task, environment)
    status = supervise(command, environment, not job or args.nodes * args.devices == 1, not job)
    if status not in (0, EXIT_PREEMPTED) and not args.task:
        record_failure(folder, status)
    if status == EXIT_PREEMPTED and job and not args.task and saved(folder) - before:
        requeue(job)
    return status


if __name__ == "__main__":
    sys.exit(main())
