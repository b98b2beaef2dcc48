"""The campaign of faults (benchmarks/faults.py), a short one: killed, terminated, starved and misled runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["xlstm", pytest.param("transformer", marks=pytest.mark.exhaustive)])
def test_every_fault_ends_in_the_right_result_or_a_clear_error(arch):
    command = [sys.executable, str(SCRIPT), "--kills", "4", "--arch", arch, "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["cases"][arch]
    assert found["SIGKILL"]["random"] + found["SIGKILL"]["write"] >= 4
    assert found["SIGKILL"]["runs"] == found["SIGKILL"]["runs with the bits of the run without faults"] > 0
    assert found["not finite"]["many"] == "diverged"
