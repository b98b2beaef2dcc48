"""Run a benchmark and keep what it found: python benchmarks/record.py benchmarks/decoding.py --quick

The last line that a benchmark prints is JSON. It is stored in benchmarks/results/<date>-<benchmark>.json with the
command, the machine, the commit and how much of the CPUs other processes used meanwhile; docs/benchmarks.md is then
written anew from all stored results (python benchmarks/page.py). A machine that does something else is refused.
"""

import argparse
import datetime
import json
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "mlstm_kernels", "numpy", "tokenizers", "snakemake")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> dict:
    """What the figures depend on, and nothing that names the host."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    model = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    shown = {"cpu": model.group(1).strip() if model else platform.processor() or platform.machine()}
    shown["cores"] = (
        len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
    )
    shown["instructions"] = [flag for flag in FLAGS if flags and flag in flags.group(1).split()]
    shown["memory_bytes"] = psutil.virtual_memory().total
    shown["system"] = platform.system()
    gpus = subprocess.run(
        "nvidia-smi --query-gpu=name --format=csv,noheader", shell=True, capture_output=True, text=True, check=False
    )
    shown["gpus"] = gpus.stdout.split("\n")[:-1] if gpus.returncode == 0 else []
    shown["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            shown[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            shown[package] = None
    return shown


def commit() -> dict:
    """The checkout's commit, and whether it has changes beside results."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py", "conf")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


def busy_share(seconds: float) -> float:
    """Share of all CPUs that is in use while nothing of ours runs."""
    return psutil.cpu_percent(interval=seconds) / 100


def last_json(lines: list[str], script: str) -> dict:
    """The JSON of the last line. Raises ValueError where it is none."""
    try:
        found = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"the last line of {script} is no JSON object: nothing is recorded")
    return found


def run(script: Path, arguments: list[str]) -> tuple[dict, dict]:
    """Run a benchmark; returns its JSON, and how long it took and what else ran (share of all CPUs)."""
    began, before, own = time.monotonic(), psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        if line.strip():
            lines.append(line)
        print(line if len(line) < 200 else f"{line[:197].rstrip()}...\n", end="", flush=True)
    if process.wait() != 0:
        raise ValueError(f"{script} ended with status {process.returncode}: nothing is recorded")
    seconds, after = time.monotonic() - began, psutil.cpu_times()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ours = used.ru_utime + used.ru_stime - own.ru_utime - own.ru_stime
    busy = sum(getattr(after, name) - getattr(before, name) for name in ("user", "nice", "system"))
    others = max(0.0, busy - ours) / (seconds * psutil.cpu_count())
    return last_json(lines, str(script)), {"seconds": round(seconds, 1), "load_of_others": round(others, 3)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument(
        "--max-load", type=float, default=0.1, help="share of the CPUs that may be in use (default: 0.1)"
    )
    parser.add_argument("--no-page", dest="page", action="store_false", help="leave docs/benchmarks.md as it is")
    parser.add_argument("script", type=Path, help="the benchmark")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    try:
        if not args.script.is_file():
            raise ValueError(f"no script {args.script}")
        load = busy_share(2.0)
        if load > args.max_load:
            raise ValueError(
                f"other processes use {load:.0%} of the CPUs: figures would mean little. Wait, or raise --max-load"
            )
        found, took = run(args.script, args.arguments)
    except ValueError as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    now = datetime.datetime.now(datetime.UTC)
    record = {
        "benchmark": args.script.stem,
        "command": shlex.join(["python", f"benchmarks/{args.script.name}", *args.arguments]),
        "date": now.date().isoformat(),
        **commit(),
        "machine": machine(),
        **took,
        "result": found,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    words = re.sub(r"[^\w.]+", "-", " ".join(args.arguments)).strip("-")
    path = args.results / f"{'-'.join(filter(None, [record['date'], args.script.stem, words]))}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"recorded in {path}")
    if args.page:
        subprocess.run([sys.executable, str(REPOSITORY / "benchmarks" / "page.py")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
