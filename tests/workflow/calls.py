"""Calling Snakemake and reading its plan."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from xlstm_scaling.warmstart import SESSION_VARIABLE, open_session

REPOSITORY = Path(__file__).resolve().parents[2]
pytest.importorskip("snakemake", reason="Snakemake is not installed (pip install xlstm-scaling[workflow])")


@functools.cache
def server():
    """The process that calls of Snakemake are forked from; it ends with this one, when its input is closed."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "forks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def snakemake(*words, cwd, conf=None, check=True, repository=REPOSITORY, without=(), **variables):
    """The output of a call of Snakemake; ``without``: variables that it does not get."""
    without = {*without, SESSION_VARIABLE}
    environment = {key: value for key, value in os.environ.items() if key not in without} | variables
    if conf is not None:
        environment["XLSTM_SCALING_CONF"] = str(conf)
    words = ["--snakefile", str(repository / "Snakefile"), "--cores", "2", *words]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        request = {"words": words, "cwd": str(cwd), "env": environment, "out": str(out)}
        print(json.dumps(request), file=server().stdin, flush=True)
        status = server().stdout.readline().strip()
        text = out.read_text()
    assert status, "the process that Snakemake is forked from has ended"
    if check:
        assert status == "0", text[-6000:]
    return text


@functools.cache
def session():
    """The variable with which calls share one process that has imported torch, for as long as this one lives."""
    variables = {}
    open_session(variables)
    return variables


def planned(text):
    """Rule -> number of jobs in a dry run's summary."""
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", text, re.M) if name != "total"}
