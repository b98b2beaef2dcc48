"""What a study of many runs costs the workflow's parser: counted, not timed (benchmarks/dag.py times it)."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from omegaconf import DictConfig

from xlstm_scaling.study import config as configuration
from xlstm_scaling.study import run_spec
from xlstm_scaling.study.workflow import WorkflowStudy


def study(overrides, count, results):
    """About ``count`` runs: 2 architectures x 4 sizes x lengths."""
    steps = [20 + number for number in range(count // 8)]
    cell = f"{{context_length: 32, sizes: [tiny, small, mid, big], num_train_steps: {steps}, batch_sequences: 4}}"
    return WorkflowStudy(
        {"study": "tiny", "overrides": [*overrides[1:], f"+study.tokenparam.many={cell}"], "results": str(results)}
    )


def counted(monkeypatch, owner, name, counts):
    function = getattr(owner, name)

    def counting(*arguments, **options):
        counts[name] += 1
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)


def parse(overrides, count, results, monkeypatch):
    """What Snakemake asks of a study, run by run -> how often the costly things happened, and the runs."""
    counts = Counter()
    with monkeypatch.context() as patched:
        counted(patched, configuration, "keep_composed", counts)
        counted(patched, DictConfig, "__getattr__", counts)
        counted(patched, run_spec, "digest", counts)
        for name in ("exists", "is_file", "stat", "open", "glob", "iterdir"):
            counted(patched, Path, name, counts)
        workflow = study(overrides, count, results)
        for run_id in workflow.runs:
            inputs = workflow.run_inputs(run_id, "certificate.json", str)
            assert set(inputs) == {"plan", "certificate"}
            assert workflow.resources.memory_mb(run_id) > 0
            assert workflow.resources.minutes(run_id) > 0
            workflow.resources.pack(run_id)
        assert len(workflow.results) == len(workflow.runs)
    return counts, len(workflow.runs)


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_run_costs_is_bounded(tiny_overrides, tmp_path, monkeypatch, finished):
    if finished:
        for run_id in study(tiny_overrides, 400, tmp_path).runs:
            path = tmp_path / "runs" / run_id / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text('{"device": "none"}')
    few, small = parse(tiny_overrides, 40, tmp_path, monkeypatch)
    many, large = parse(tiny_overrides, 400, tmp_path, monkeypatch)
    assert large - small > 300
    assert few["keep_composed"] == many["keep_composed"] == 1  # one configuration is composed, or read
    assert few["__getattr__"] == many["__getattr__"]  # and what is read for each run is plain
    assert many["digest"] - few["digest"] <= 400 - 40  # the identity of a planned run is computed once
    # whether its result is there, for its inputs and for the speeds of finished runs; and what those say
    each = {
        name: (many[name] - few[name]) / (large - small) for name in ("exists", "is_file", "open", "glob", "iterdir")
    }
    most = {"exists": 2, "is_file": 1, "open": 1 if finished else 0, "glob": 0, "iterdir": 0}
    assert all(each[name] <= most[name] for name in most), each


def test_the_command_line_imports_nothing_heavy():
    """Every job of a study starts it."""
    code = "import sys; from xlstm_scaling import cli; cli._parser(); print(*{'torch', 'pandas'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
