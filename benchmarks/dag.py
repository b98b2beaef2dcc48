"""What the workflow costs before any job runs: python benchmarks/dag.py [--runs 5000] [--folder FOLDER] [--keep]

CPU time, wall time and peak memory of one Snakemake call each: the dry run of a study that has nothing yet, and the
rerun of one that has everything, of study=paper and of a generated study of ``--runs`` runs. The finished studies are
made of files of the kinds that the stages write, with small contents, and entered in Snakemake's books; nothing is
trained. CPU time says more than wall time on a machine that does something else too. The last line is JSON.
"""

import argparse
import base64
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = 50  # of the generated study

STUDY = """# @package _global_
defaults:
  - without_grid
  - _self_
study:
  name: thousands
  sizes:
{sizes}
  tokenparam:
    c128: {{context_length: 128, sizes: [{names}], num_train_steps: {steps}, batch_sequences: 4}}
"""


def write_configuration(folder: Path, runs: int) -> Path:
    """A copy of ``conf/`` with a study ``thousands`` of about so many runs: 2 architectures x 50 sizes x lengths."""
    conf = folder / "conf"
    shutil.copytree(REPOSITORY / "conf", conf)
    smoke = (conf / "study" / "smoke.yaml").read_text()
    (conf / "study" / "without_grid.yaml").write_text(smoke[: smoke.index("  sizes:")])
    names = [f"d{16 * (1 + number % 10)}b{1 + number // 10}" for number in range(SIZES)]
    sizes = "\n".join(
        f"    {name}: {{embedding_dim: {16 * (1 + number % 10)}, num_blocks: {1 + number // 10}}}"
        for number, name in enumerate(names)
    )
    steps = [100 + 10 * number for number in range(max(1, round(runs / SIZES / 2)))]
    text = STUDY.format(sizes=sizes, names=", ".join(names), steps=steps)
    (conf / "study" / "thousands.yaml").write_text(text)
    return conf


def call(words: list[str], folder: Path, conf: Path) -> dict:
    """One Snakemake call -> what it cost, and its output."""
    environment = os.environ | {"XLSTM_SCALING_CONF": str(conf)}
    environment.pop("XLSTM_SCALING_SESSION", None)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "2", *words]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cost = {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": wall, "peak_memory_bytes": peak}
    return {"text": text} | {key: round(value, 2) for key, value in cost.items()}


def result(run_id: str, identity: str) -> dict:
    """What a run says of itself, with the keys of ``training.run``."""
    keys = ("val_loss", "val_bits_per_byte", "train_loss", "epochs", "train_time_s", "tokens_per_s", "mfu")
    return {"run_id": run_id, "identity": identity, "status": "ok", "detail": "", **dict.fromkeys(keys, 1.0)}


def finish(study: str, folder: Path, conf: Path) -> None:
    """Write every file of the study, and enter them in Snakemake's books."""
    os.environ["XLSTM_SCALING_CONF"] = str(conf)
    from xlstm_scaling.study.files import digest
    from xlstm_scaling.study.workflow import WorkflowStudy

    workflow, target = WorkflowStudy({"study": study}), ["--config", f"study={study}"]
    listed = call(["--summary", *target], folder, conf)["text"].splitlines()
    stages = []
    for line in listed:
        path = folder / line.split("\t")[0]
        if line.startswith("results/"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")
            stages.append(line.split("\t")[2])
    for run_id, run in workflow.runs.items():
        path = folder / workflow.result(run_id)
        path.write_text(json.dumps(result(run_id, digest(run.identity())), indent=1))
        (path.parent / "history.jsonl").write_text('{"step": 1, "train_loss": 1.0}\n')
    first, *others = workflow.runs
    call(["--touch", "--forceall", str(workflow.result(first)), *target], folder, conf)
    copy_records(folder / ".snakemake" / "metadata", workflow, first, others)
    later = [stage for stage in dict.fromkeys(stages) if stage not in ("tokens", "plan", "certify", "train_run")]
    call(["--touch", "--forcerun", *later, *target], folder, conf)


def copy_records(books: Path, workflow: Any, first: str, others: list[str]) -> None:
    """Snakemake's record of one run, for the other runs: they differ in the run's name alone."""

    def record(run_id: str) -> Path:
        name = base64.urlsafe_b64encode(str(workflow.result(run_id)).encode()).decode()
        parts = [name[start : start + 254] for start in range(0, len(name), 254)]
        return books.joinpath(*(f"@{part}" for part in parts[:-1]), parts[-1])

    content = record(first).read_text()
    for run_id in others:
        path = record(run_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace(first, run_id))


def measure(study: str, folder: Path, conf: Path) -> dict:
    """The dry run of a study with nothing, and the rerun (dry and real) of one with everything."""
    folder.mkdir(parents=True, exist_ok=True)
    target = ["--config", f"study={study}"]
    costs = {"dry_run": call(["-n", *target], folder, conf)}
    found = re.search(r"^train_run +(\d+)$", costs["dry_run"]["text"], re.M)
    finish(study, folder, conf)
    for name, words in {"no_op_dry_run": ["-n", *target], "no_op_rerun": target}.items():
        costs[name] = call(words, folder, conf)
        if "Nothing to be done" not in costs[name]["text"]:
            raise SystemExit(f"{study}: a finished study is not done:\n{costs[name]['text'][-2000:]}")
    return {"runs": int(found[1])} | {name: {k: v for k, v in c.items() if k != "text"} for name, c in costs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000, help="of the generated study (default: 5000)")
    parser.add_argument("--folder", type=Path, help="work here and leave the files (default: a temporary folder)")
    parser.add_argument("--only", choices=["paper", "thousands"], help="one study of the two")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="dag-"))
    figures = {}
    try:
        conf = write_configuration(folder, args.runs)
        for study in [args.only] if args.only else ["paper", "thousands"]:
            figures[study] = measure(study, folder / study, conf)
            print(study, figures[study]["runs"], "runs", flush=True)
            for name in ("dry_run", "no_op_dry_run", "no_op_rerun"):
                cost = figures[study][name]
                memory = cost["peak_memory_bytes"] / 1e6
                print(f"  {name:14s} {cost['cpu_s']:6.1f} CPU s {cost['wall_s']:6.1f} s {memory:6.0f} MB", flush=True)
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    figures["load_1m"] = round(os.getloadavg()[0], 1)
    print(json.dumps(figures))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
