"""A real Slurm cluster of three nodes on this machine, for tests: its own controller, daemons, keys and folder.

    python tests/cluster/slurm.py -- COMMAND ...      run COMMAND (or a shell) with the cluster up, then stop it
    python tests/cluster/slurm.py --stop              stop one that a killed process has left

Needs root and Debian's packages (`PACKAGES`). All listens on loopback. `/etc/slurm/slurm.conf` must be a link into the
cluster's folder while it runs (job steps look nowhere else); a configuration that is there already is not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")
NODES = ("node1", "node2", "node3")
SYSTEM_FOLDER = Path("/etc/slurm")
FILES = ("slurm.conf", "gres.conf", "cgroup.conf")
#: in the environment of every process of a cluster: its folder; and of a node's daemon: the node
CLUSTER_VARIABLE, NODE_VARIABLE = "SIMULATED_CLUSTER", "SIMULATED_NODE"

CONFIGURATION = """
ClusterName=simulated
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=10
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=200
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=10
MinJobAge=86400
JobRequeue=1
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=2 RealMemory=6000 Gres=gpu:fake:1
PartitionName=debug Nodes={nodes} Default=YES MaxTime=600 DefaultTime=10 State=UP OverSubscribe=NO
"""


def why_not() -> str | None:
    """Why no cluster can be started here, and what to do; None where one can."""
    if not sys.platform.startswith("linux"):
        return "Slurm needs Linux"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if os.geteuid() != 0:
        return "the daemons of a cluster on one machine have to be started as root"
    for name in FILES:
        path = SYSTEM_FOLDER / name
        if path.is_symlink() and not path.exists():  # a cluster that was killed left it
            continue
        if path.is_symlink() or path.exists():
            return (
                f"{path} is there already: this machine belongs to a cluster, or a simulated one is running "
                "(python tests/cluster/slurm.py --stop ends one that was left)"
            )
    return None


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on."""
    for first in range(17001, 20000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    listener = stack.enter_context(socket.socket())
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise RuntimeError("no free ports for the cluster")


def _working_folder(process: Path) -> str:
    try:
        return str((process / "cwd").readlink())
    except OSError:
        return ""


def _step_daemon(process: int) -> int | None:
    """The slurmstepd that started a process; its own environment is overwritten by its title."""
    try:
        parent = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        named = Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd")
    except OSError:
        return None
    return parent if named else None


class Cluster:
    """Three nodes of two CPUs; ``environment`` for commands that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).resolve()
        self.environment = {**os.environ, CLUSTER_VARIABLE: str(self.folder), "PATH": _search_path()}
        self.environment.pop("SLURM_CONF", None)

    # from outside

    def call(self, *words: str, timeout_s: float = 60) -> str:
        """Output of a Slurm command; RuntimeError with what it says where it fails."""
        done = subprocess.run(words, env=self.environment, text=True, capture_output=True, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def jobs(self) -> dict[str, tuple[str, str, str]]:
        """Job id -> state, node, comment (the plugin writes the rule and its wildcards there)."""
        lines = self.call("squeue", "--noheader", "--states=all", "--format=%i|%T|%N|%k").splitlines()
        return {job: (state, node, comment) for job, state, node, comment in (line.split("|", 3) for line in lines)}

    def node_states(self) -> dict[str, str]:
        """Node -> state, as sinfo says it."""
        lines = self.call("sinfo", "--noheader", "--Node", "--format=%N|%T").splitlines()
        return dict(line.split("|") for line in lines)

    def restarts(self, job: str) -> int:
        """How often a job was put back into the queue."""
        return int(re.search(r"Restarts=(\d+)", self.call("scontrol", "show", "job", job))[1])

    def commands(self, node: str) -> list[tuple[str, str]]:
        """(Job id, command line) of all that jobs run on a node."""
        found = []
        for number in self._processes(node):
            with contextlib.suppress(OSError):
                job = re.search(rb"(?:^|\0)SLURM_JOB_ID=(\d+)", Path(f"/proc/{number}/environ").read_bytes())
                line = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ")
                if job:
                    found.append((job[1].decode(), line.decode()))
        return found

    def wait_for(self, what: str, condition, timeout_s: float = 120, every_s: float = 0.5):
        """Wait until ``condition()`` is true and return its value; TimeoutError names ``what``."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(every_s)
        raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")

    # its daemons

    def start(self) -> None:
        """Start all daemons and wait until the nodes are idle. Raises RuntimeError."""
        reason = why_not()
        if reason:
            raise RuntimeError(reason)
        for name in ("etc", "run", "log", "state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "etc" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        controller_port, first, *_, last = _free_ports(1 + len(NODES))
        filled = CONFIGURATION.lstrip().format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            controller_port=controller_port,
            nodes=f"node[1-{len(NODES)}]",
            ports=f"{first}-{last}",
        )
        contents = dict.fromkeys(FILES, "") | {"slurm.conf": filled}
        contents["gres.conf"] = f"NodeName=node[1-{len(NODES)}] Name=gpu Type=fake File=/dev/null\n"
        SYSTEM_FOLDER.mkdir(exist_ok=True)
        for name, content in contents.items():
            path = self.folder / "etc" / name
            path.write_text(content)
            link = SYSTEM_FOLDER / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(path)
        run, log = self.folder / "run", self.folder / "log"
        self.call(
            "munged", f"--socket={run}/munge.sock", f"--key-file={key}", f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log", f"--seed-file={run}/munge.seed",
        )  # fmt: skip
        self.call("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_for("idle nodes", lambda: set(self.node_states().values()) == {"idle"})

    def start_node(self, node: str) -> None:
        subprocess.run(["slurmd", "-N", node], env=self.environment | {NODE_VARIABLE: node}, check=True)

    def kill_node(self, node: str) -> None:
        """The node's daemon and all that runs on it, at once, as where the power fails."""
        for number in self._processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def _processes(self, node: str | None = None) -> list[int]:
        """Processes of this cluster other than this one, or of a node: daemons, and what jobs started there."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"{CLUSTER_VARIABLE}={self.folder}".encode() not in variables:
                if node is None and _working_folder(entry).startswith(f"{self.folder}/"):
                    found.append(int(entry.name))  # a slurmstepd: its environment is overwritten by its title
                continue
            # a job inherits NODE_VARIABLE from nobody: Slurm gives it the environment that it was submitted with
            names = {f"{NODE_VARIABLE}={node}".encode(), f"SLURMD_NODENAME={node}".encode()}
            if node is None or names & set(variables):
                found.append(int(entry.name))
        return sorted({*found, *filter(None, map(_step_daemon, found))})

    def stop(self) -> None:
        """Stop all that was started, whatever state it is in, and take the links out of /etc/slurm."""
        for signalled in (signal.SIGTERM, signal.SIGKILL):
            for number in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signalled)
            deadline = time.monotonic() + 10
            while self._processes() and time.monotonic() < deadline:
                time.sleep(0.2)
        for name in FILES:
            link = SYSTEM_FOLDER / name
            if link.is_symlink() and link.readlink().parent == self.folder / "etc":
                link.unlink()


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster in a temporary folder for the time of the block; neither its daemons nor the folder outlive it, also
    where this process is asked to end (SIGTERM)."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge insists
    cluster = Cluster(folder)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)


def stop_left_over() -> None:
    """Stop the cluster that /etc/slurm links to, which a killed process has left."""
    link = SYSTEM_FOLDER / "slurm.conf"
    folder = link.readlink().parents[1] if link.is_symlink() else None
    if folder is None or not folder.name.startswith("slurm-"):
        raise SystemExit(f"{link} is no link to a simulated cluster: nothing to stop")
    Cluster(folder).stop()
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stop", action="store_true", help="stop a cluster that a killed process has left")
    parser.add_argument("--packages", action="store_true", help="name Debian's packages that a cluster needs")
    parser.add_argument("command", nargs="*", help="what to run while the cluster is up, after --")
    arguments = parser.parse_args()
    if arguments.stop:
        stop_left_over()
        return 0
    if arguments.packages:
        print(*PACKAGES)
        return 0
    reason = why_not()
    if reason:
        print(f"no cluster: {reason}", file=sys.stderr)
        return 2
    with running_cluster() as cluster:
        return subprocess.run(arguments.command or ["bash"], env=cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main())
