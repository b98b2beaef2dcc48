"""Tuning without a GPU: a planted optimum is found, wrong candidates are dropped, the table is written and read."""

import json
import math
import subprocess
import sys

import pytest
import torch

from xlstm_scaling import cli
from xlstm_scaling.kernels import problems, triton_launch, tune_command, tuning
from xlstm_scaling.kernels.compilation import record
from xlstm_scaling.kernels.compile_command import clean_environment
from xlstm_scaling.kernels.triton_launch import TARGETS, configuration, recording

DEFAULT = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
KEY = "float32 d=64"


class FakeOperation:
    """Two kernels, of which the first has its best configuration at BLOCK 256, 8 warps, 1 stage."""

    def __init__(self, wrong_blocks=(), failing_blocks=()):
        self.wrong_blocks, self.failing_blocks = wrong_blocks, failing_blocks
        self.seconds = None

    def results(self):
        first = triton_launch.configuration("first_kernel", DEFAULT, torch.float32, d=64)
        second = triton_launch.configuration("second_kernel", {"BLOCK": 128}, torch.float32, d=64)
        if first["BLOCK"] in self.failing_blocks:
            raise RuntimeError("out of resources: shared memory")
        distance = (
            abs(math.log2(first["BLOCK"] / 256))
            + abs(math.log2(first["num_warps"] / 8))
            + abs(first["num_stages"] - 1)
            + abs(math.log2(second["BLOCK"] / 32))
        )
        self.seconds = 1e-3 * (1 + 0.2 * distance)
        return {"y": torch.ones(8) * (2 if first["BLOCK"] in self.wrong_blocks else 1)}

    def subject(self, name="fake"):
        return tuning.Subject(name, lambda: (self.results, self.results))

    def timer(self, function):
        function()
        return self.seconds


@pytest.fixture(autouse=True)
def target():
    """Configurations are read as on an H100."""
    triton_launch._table.cache_clear()
    with recording(TARGETS["sm_90"]):
        yield
    triton_launch._table.cache_clear()


def test_the_planted_optimum_is_found():
    operation = FakeOperation()
    report = tuning.tune([operation.subject()], operation.timer)
    assert report.entries == {
        "first_kernel": {KEY: {"BLOCK": 256, "num_warps": 8, "num_stages": 1}},
        "second_kernel": {KEY: {"BLOCK": 32}},
    }
    assert report.gains == [("fake", pytest.approx(1 + 0.2 * (2 + 1 + 1 + 2)))]
    assert not report.dropped and not report.out_of_time
    assert triton_launch.configuration is configuration  # nothing stays patched


def test_candidates_of_a_module_are_tried_first():
    operation = FakeOperation(failing_blocks=(128,))  # no way there by small steps
    report = tuning.tune([operation.subject()], operation.timer)
    assert report.entries["first_kernel"][KEY]["BLOCK"] == 64
    report = tuning.tune([operation.subject()], operation.timer, {"first_kernel": [{"BLOCK": 2, "num_warps": 1}]})
    assert report.entries["first_kernel"][KEY] == {"BLOCK": 256, "num_warps": 8, "num_stages": 1}


def test_wrong_and_failing_candidates_are_dropped_by_name():
    operation = FakeOperation(wrong_blocks=(256,), failing_blocks=(32,))
    report = tuning.tune([operation.subject()], operation.timer)
    assert report.entries["first_kernel"][KEY]["BLOCK"] == 128
    reasons = {config["BLOCK"]: reason for kernel, _, config, reason in report.dropped if kernel == "first_kernel"}
    assert reasons[256] == "wrong: y differs from the default's by 1"
    assert reasons[32] == "fails: RuntimeError: out of resources: shared memory"


def test_launches_that_do_not_compile_are_dropped():
    class Check:
        prepared = 0

        def prepare(self, launches):
            self.prepared += len(launches)

        def __call__(self, launches):
            return "first_kernel: spills: 16 B a thread" if launches == ["256"] else None

    operation, check = FakeOperation(), Check()
    subject = operation.subject()

    def record():
        operation.results()
        return [str(triton_launch.configuration("first_kernel", DEFAULT, torch.float32, d=64)["BLOCK"])]

    subject.record = record
    report = tuning.tune([subject], operation.timer, check=check)
    assert report.entries["first_kernel"][KEY]["BLOCK"] == 128
    assert {reason for *_, reason in report.dropped} == {"first_kernel: spills: 16 B a thread"}
    assert check.prepared > 0


def test_noise_does_not_enter_the_table():
    operation = FakeOperation()
    calls = iter(range(10**6))

    def noisy(function):
        function()
        return 1.0 if next(calls) else 1.005  # nothing is faster by a hundredth

    report = tuning.tune([operation.subject()], noisy)
    assert report.entries["first_kernel"][KEY] == DEFAULT
    lucky = iter([1.0, 0.5])  # one lucky timing

    def once_lucky(function):
        function()
        return next(lucky, 1.0)

    report = tuning.tune([operation.subject()], once_lucky)
    assert report.entries["first_kernel"][KEY] == DEFAULT and report.gains == [("fake", 1.0)]


def test_problems_with_the_same_entries_are_tuned_together():
    operation = FakeOperation()
    report = tuning.tune([operation.subject("a"), operation.subject("b")], operation.timer)
    assert [name for name, _ in report.gains] == ["a", "b"]
    single = tuning.tune([operation.subject("a")], operation.timer)
    assert report.measured == single.measured


def test_the_budget_stops_with_what_is_known():
    operation = FakeOperation()
    report = tuning.tune([operation.subject()], operation.timer, budget_s=0.0)
    assert report.out_of_time and report.entries["first_kernel"][KEY] == DEFAULT


def test_the_table_is_written_merged_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv(triton_launch.TABLES_VARIABLE, str(tmp_path))
    assert tune_command.default_folder() == tmp_path
    operation = FakeOperation()
    report = tuning.tune([operation.subject()], operation.timer)
    path = tune_command.write_table(tmp_path, TARGETS["sm_90"], report.entries)
    assert path == tmp_path / "sm_90.json"
    best = {"BLOCK": 256, "num_warps": 8, "num_stages": 1}
    assert configuration("first_kernel", DEFAULT, torch.float32, d=64) == best
    assert configuration("first_kernel", DEFAULT, torch.float32, d=128) == DEFAULT
    assert configuration("first_kernel", DEFAULT, torch.bfloat16, d=64) == DEFAULT

    tune_command.write_table(tmp_path, TARGETS["sm_90"], {"first_kernel": {"bfloat16 d=64": {**DEFAULT, "BLOCK": 32}}})
    table = json.loads(path.read_text())
    assert table["kernels"]["first_kernel"] == {"bfloat16 d=64": {**DEFAULT, "BLOCK": 32}, KEY: best}
    assert table["device"] == "sm_90" and table["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert table["target"] == {"backend": "cuda", "arch": 90, "shared_memory_bytes": 227 * 1024, "warp_size": 32}
    assert configuration("first_kernel", DEFAULT, torch.bfloat16, d=64)["BLOCK"] == 32
    # a tuned kernel starts from its entry
    again = tuning.tune([operation.subject()], operation.timer)
    assert again.gains == [("fake", 1.0)]


def test_problems_are_selected_by_operation_and_shape():
    every = tune_command.select_problems(None, "bfloat16", None)
    assert {p.op for p in every} == {"mlstm", "linear_cross_entropy", "rms_norm", "head_norm_gate", "gated_silu"}
    steps = tune_command.select_problems(["mlstm/step"], "float16", ["B=32"])
    assert [p.name for p in steps] == ["mlstm/step float16 B=32 H=8 d_qk=256 d_v=512"] and not steps[0].backward
    own = tune_command.select_problems(["rms_norm"], "bfloat16", ["d=513", "M=100"])
    assert own == [problems.rms_norm(100, 513)]
    with pytest.raises(ValueError, match="no operation slstm; known: gated_silu/fused"):
        tune_command.select_problems(["slstm"], "bfloat16", None)
    with pytest.raises(ValueError, match="for one of your own name all its sizes: rms_norm/fused: M d"):
        tune_command.select_problems(["rms_norm"], "bfloat16", ["d=513"])
    with pytest.raises(ValueError, match="--shape takes NAME=SIZE, got d=wide"):
        tune_command.select_problems(None, "bfloat16", ["d=wide"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert cli.run_command(["tune", "--op", "rms_norm"]) == 1
    assert "xlstm-scaling tune: tuning measures on a GPU, and PyTorch sees none" in capsys.readouterr().err


def test_steps_double_halve_and_add():
    assert tuning.stepped(DEFAULT, {"BLOCK": 2, "num_warps": -1, "num_stages": 1}) == {
        "BLOCK": 256, "num_warps": 2, "num_stages": 3
    }  # fmt: skip
    for steps in ({"BLOCK": -7}, {"num_warps": 3}, {"num_stages": -2}, {"ROWS": 1}):
        assert tuning.stepped(DEFAULT, steps) is None


def test_candidates_name_settings_of_their_kernels():
    pytest.importorskip("triton", reason="the kernels' modules need Triton")
    every = problems.all_problems()
    candidates = tune_command.named_candidates(every)
    asked = {}
    for problem in every:
        with tuning.observed() as requests:
            record(problem, TARGETS["sm_90"])
        asked |= requests
    assert set(candidates) <= set(asked)
    assert {name.split("_")[0] for name in candidates} == {"mlstm", "softmax", "rms", "head", "gated"}
    for kernel, configs in candidates.items():
        assert all(set(steps) <= set(asked[kernel].default) and len(steps) > 1 for steps in configs), kernel


CANDIDATES_PROGRAM = """
import sys
from xlstm_scaling.kernels import problems, tune_command
from xlstm_scaling.kernels.compilation import compile_launches
from xlstm_scaling.kernels.compile_command import table
from xlstm_scaling.kernels.triton_launch import TARGETS
chosen = tune_command.tuned_problems() if "all" in sys.argv else [
    problems.step(32, 8, 256, 512), problems.rms_norm(16384, 768), problems.gated_silu(16384, 2048)
]
work = tune_command.candidate_launches(chosen, TARGETS["sm_90"])
rows = compile_launches(work, processes=2)
print(table([row for row in rows if not row.ok]), file=sys.stderr)
print(len(rows), sum(not row.ok for row in rows))
"""


def compiled_candidates(*arguments):
    """(compiled, failed) on sm_90, in a process whose Triton is a compiler."""
    pytest.importorskip("triton", reason="ahead-of-time compilation needs Triton")
    command = [sys.executable, "-c", CANDIDATES_PROGRAM, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    assert result.returncode == 0, result.stderr
    count, failed = (int(number) for number in result.stdout.split())
    assert not failed, result.stderr
    return count


def test_candidates_compile_without_spilling():
    assert compiled_candidates() >= 10


@pytest.mark.exhaustive
def test_every_candidate_compiles_without_spilling():
    assert compiled_candidates("all") >= 80


def test_neighbours_keep_to_what_can_be():
    assert tuning.neighbours({"BLOCK": 1, "num_warps": 16, "num_stages": 1}) == [
        {"BLOCK": 2, "num_warps": 16, "num_stages": 1},
        {"BLOCK": 1, "num_warps": 8, "num_stages": 1},
        {"BLOCK": 1, "num_warps": 16, "num_stages": 2},
    ]


def test_what_is_imported_while_requests_are_noted_is_not_noted_later():
    pytest.importorskip("triton", reason="the kernels' modules need Triton")
    program = """
from xlstm_scaling.kernels import problems, tuning
from xlstm_scaling.kernels.compilation import record
from xlstm_scaling.kernels.triton_launch import TARGETS
for problem in (problems.gated_silu(64, 128), problems.gated_silu(64, 256)):
    with tuning.observed() as requests:
        record(problem, TARGETS["sm_90"])
    print(*sorted({request.key for request in requests.values()}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == ["bfloat16 F=128", "bfloat16 F=256"], result.stderr


def test_tensors_of_another_gpu_are_refused(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    here, there = (SimpleNamespace(device=torch.device("cuda", index)) for index in (0, 1))
    token = triton_launch._RECORD.set(None)
    try:
        triton_launch.check_device(here, here)
        with pytest.raises(ValueError, match="run on the current GPU, cuda:0, got cuda:0, cuda:1; "):
            triton_launch.check_device(here, there)
    finally:
        triton_launch._RECORD.reset(token)
