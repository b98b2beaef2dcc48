"""Calling Snakemake and reading its plan."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytest.importorskip("snakemake", reason="Snakemake is not installed (pip install xlstm-scaling[workflow])")


def snakemake(*words, cwd, conf=None, check=True, repository=REPOSITORY, **variables):
    environment = dict(os.environ) | variables
    environment.pop("XLSTM_SCALING_SESSION", None)
    if conf is not None:
        environment["XLSTM_SCALING_CONF"] = str(conf)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(repository / "Snakefile"), "--cores", "2", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def planned(text):
    """Rule -> number of jobs in a dry run's summary."""
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", text, re.M) if name != "total"}
