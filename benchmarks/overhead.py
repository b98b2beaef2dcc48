"""How much of a finished study's wall time was not training: python benchmarks/overhead.py [results/laptop] [cores]

Reads the benchmark files that Snakemake wrote beside the rules' logs and what the runs say of themselves. Wall time
goes from the start of the first job to the end of the last; training is the time that runs spent in their training
loop, divided by the runs side by side. The last line is JSON.
"""

import json
import sys
from pathlib import Path

import pandas as pd


def main(study: Path, cores: int) -> dict:
    results, runs = study.parent, pd.read_parquet(study / "runs.parquet")
    logs = results / "logs"
    files = [logs / "runs" / f"{run}.tsv" for run in runs.run_id] + sorted((logs / study.name).glob("*.tsv"))
    seconds = {path: float(pd.read_csv(path, sep="\t").s.iloc[0]) for path in files if path.is_file()}
    start = min(path.stat().st_mtime - s for path, s in seconds.items())
    end = max(path.stat().st_mtime for path in seconds)
    jobs = sum(s for path, s in seconds.items() if path.parent.name == "runs")
    stages = {path.stem: s for path, s in seconds.items() if path.parent.name != "runs"}
    training = float(runs.train_time_s.sum())
    work = training / cores + sum(stages.values())
    return {
        "study": study.name,
        "runs": len(runs),
        "wall_s": round(end - start, 1),
        "training_s": round(training / cores, 1),
        "train_jobs_s": round(jobs / cores, 1),
        "stages_s": {name: round(s, 1) for name, s in stages.items()},
        "share_not_training": round(1 - training / cores / (end - start), 3),
        "share_starts_and_scheduling": round(1 - work / (end - start), 3),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/laptop")
    print(json.dumps(main(folder, int(sys.argv[2]) if len(sys.argv) > 2 else 2)))
