"""Every Triton kernel compiles ahead of time for every target, and kernels that should not pass are told by name.

Compiling needs a process whose Triton is no interpreter: the kernels below are compiled by this file run as a program.
"""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="ahead-of-time compilation needs Triton")

import triton
import triton.language as tl

from xlstm_scaling.cli import run_command
from xlstm_scaling.kernels.compilation import compile_launches, compile_problems, record
from xlstm_scaling.kernels.compile_command import clean_environment, table
from xlstm_scaling.kernels.mlstm import chunkwise_triton
from xlstm_scaling.kernels.problems import MAX_CHUNK_SIZE, Variant, all_problems, mlstm, variants
from xlstm_scaling.kernels.specialisation import specialise
from xlstm_scaling.kernels.triton_launch import TARGETS, Launch


@triton.jit
def product_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + rows[:, None] * K + (k + inner)[None, :])
        y = tl.load(b + (k + inner)[:, None] * BN + columns[None, :])
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + rows[:, None] * BN + columns[None, :], acc)


@triton.jit
def sum_kernel(x, y, n, scale, flag, nothing, one, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0) * scale + one, mask=at < n)


def product(dtype=torch.bfloat16, BM=128, BN=128, BK=64, warps=4, stages=3, precision="ieee") -> Launch:
    a, b = torch.empty(BM, 4096, dtype=dtype, device="meta"), torch.empty(4096, BN, dtype=dtype, device="meta")
    c = torch.empty(BM, BN, device="meta")
    tiles = {"BM": BM, "BN": BN, "BK": BK, "PRECISION": precision}
    return Launch(product_kernel, (1,), {"a": a, "b": b, "c": c, "K": 4096, **tiles}, warps, stages)


LAUNCHES = {
    "good": product(),
    "fp32 in three products": product(torch.float32, BM=64, BN=64, BK=32, stages=2, precision="tf32x3"),
    "spilling": product(BK=32, warps=1, stages=1),
    "too much shared memory": product(BM=256, BN=128, BK=128, warps=8, stages=5),
    "fp32 on scalar units": product(torch.float32, BM=64, BN=64, BK=32, stages=2),
    "nonsense": product(BM=96),
    "no product": Launch(
        sum_kernel,
        (4,),
        {"x": torch.empty(4000, device="meta"), "y": torch.empty(4001, device="meta")[1:], "n": 4000, "scale": 0.5,
         "flag": True, "nothing": None, "one": 1, "B": 1024},
        4,
        1,
    ),
}  # fmt: skip


def python(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment() | environment, check=False)


#: what is compiled together, as importing takes as long; the first stand for the others
TOGETHER = (("sm_90", "gfx942"), ("sm_80", "sm_100"))
RARE = [pytest.param(target, marks=pytest.mark.exhaustive) for target in TARGETS if target not in TOGETHER[0]]
COMPILED = [*TOGETHER[0], *RARE]


@functools.cache
def compiled(targets):
    """Rows by (name of launch, target)."""
    result = python(Path(__file__).resolve(), *targets)
    assert result.returncode == 0, result.stderr
    return {(row["problem"], row["target"]): row for row in json.loads(result.stdout)}


@pytest.fixture
def rows(target):
    return compiled(next(targets for targets in TOGETHER if target in targets))


@pytest.mark.parametrize("target", COMPILED)
def test_good_kernels_pass_and_use_matrix_units(rows, target):
    expected = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[target]
    row = rows["good", target]
    assert row["failures"] == [] and row["matrix_instructions"].startswith(f"{expected} ")
    assert row["products"] == 1 and row["scalar_products"] == 0 and row["spill_bytes"] == 0
    assert 32 <= row["registers"] <= 512 and 0 < row["shared_bytes"] <= row["shared_limit_bytes"]
    if target != "gfx942":  # has no tf32
        assert rows["fp32 in three products", target]["failures"] == []
    plain = rows["no product", target]
    assert plain["failures"] == [] and plain["products"] == 0 and plain["matrix_instructions"] == ""


@pytest.mark.parametrize("target", COMPILED)
def test_bad_kernels_fail_by_name(rows, target):
    assert any("shared memory: " in reason for reason in rows["too much shared memory", target]["failures"])
    assert rows["nonsense", target]["failures"][0].startswith("does not compile: ")
    spilling = rows["spilling", target]["failures"]
    # tcgen05 keeps accumulators in tensor memory, but needs four warps; one warp falls back to registers
    assert any(reason.startswith("spills: ") for reason in spilling), spilling
    scalar = rows["fp32 on scalar units", target]
    if target == "gfx942":  # multiplies fp32 on matrix units
        assert scalar["failures"] == [] and scalar["matrix_instructions"].startswith("mfma ")
    else:
        assert scalar["failures"] == ["no tensor cores: 1 of 1 products run on scalar units"]
        assert scalar["scalar_products"] == 1 and scalar["matrix_instructions"] == ""


def check_specialised_arguments():
    source = specialise(LAUNCHES["no product"], TARGETS["sm_90"])
    assert source.signature == {
        "x": "*fp32", "y": "*fp32", "n": "i32", "scale": "fp32", "flag": "u1", "nothing": "constexpr",
        "one": "constexpr", "B": "constexpr",
    }  # fmt: skip
    assert source.constants == {(5,): None, (6,): 1, (7,): 1024}
    # y starts 4 bytes into its storage; 4,000 is divisible by 16
    divisible = [["tt.divisibility", 16]]
    assert source.attributes == {(0,): divisible, (1,): [], (2,): divisible, (5,): [], (6,): [], (7,): []}
    assert source.options == {"num_warps": 4, "num_stages": 1}
    assert specialise(LAUNCHES["good"], TARGETS["gfx942"]).attributes[0,] == [*divisible, ["tt.pointer_range", 32]]
    with pytest.raises(ValueError, match="kernel sum_kernel: argument n is a list"):
        specialise(Launch(sum_kernel, (1,), LAUNCHES["no product"].arguments | {"n": [1]}, 4, 1), TARGETS["sm_90"])


def here(program):
    """Run a program that knows this file as ``here``."""
    return python("-c", f"import test_compilation as here\n{program}", PYTHONPATH=str(Path(__file__).parent))


def test_arguments_are_specialised_as_by_the_launcher():
    """By examples; and to the types, constants and attributes of Triton's own, where its internals are as known."""
    program = """
here.check_specialised_arguments()
print("by examples", flush=True)
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from xlstm_scaling.kernels.specialisation import specialise
for target in here.TARGETS.values():
    backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    for launch in here.LAUNCHES.values():
        kernel = launch.kernel
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = binder(**launch.arguments)
        _, signature, constants, attributes = kernel._pack_args(backend, {}, bound, specialization, {})
        ours = specialise(launch, target)
        assert ours.signature == signature, (ours.signature, signature)
        assert ours.constants == constants, (ours.constants, constants)
        assert str(ours.attributes) == str(attributes), (ours.attributes, attributes)  # enters the cache's key
print("equal")
"""
    result = here(program)
    assert result.stdout.startswith("by examples"), result.stderr
    if "ImportError" in result.stderr or "AttributeError" in result.stderr:
        pytest.skip(f"another Triton's internals: {result.stderr.splitlines()[-1]}")
    assert result.stdout.endswith("equal\n"), result.stderr


def test_variants_reach_the_code_that_defaults_leave_out():
    """The shortest and longest chunks; first and last states with gradients, kept in fp32."""
    assert MAX_CHUNK_SIZE == chunkwise_triton.MAX_CHUNK_SIZE
    target = TARGETS["sm_90"]
    usual = [launch for problem in all_problems() for launch in record(problem, target)]
    added = [launch for variant in variants() for launch in record(variant, target)]

    def values(launches, kernel, name):
        found = (launch.arguments[name] for launch in launches if launch.name == kernel)
        return {x.dtype if isinstance(x, torch.Tensor) else x for x in found}

    assert not {1, 16} & values(usual, "outputs_kernel", "NT") and {1, 16} <= values(added, "outputs_kernel", "NT")
    for kernel, name in [("states_kernel", "HAS_INITIAL"), ("state_gradients_kernel", "HAS_LAST")]:
        assert values(usual, kernel, name) == {False} and values(added, kernel, name) == {False, True}
    narrow = [launch for launch in added if launch.arguments.get("MMA") == tl.bfloat16]
    assert values(narrow, "outputs_kernel", "C_ptr") == {torch.bfloat16, torch.float32}
    assert values(narrow, "key_gradients_kernel", "dC_ptr") == {torch.bfloat16, torch.float32}


def test_what_cannot_be_launched_is_a_row_that_fails():
    problem = Variant(mlstm(1, 8, 8192, 256, 512), chunk_size=2 * MAX_CHUNK_SIZE)
    (row,) = compile_problems([problem], [TARGETS["sm_90"]])
    assert (row.kernel, row.problem, row.ok) == ("mlstm", problem.name, False)
    assert row.failures == ("cannot be launched: ValueError: chunk_size must be 1 to 1024 tokens, got 2048",)


def test_all_data_centre_blackwells_get_their_blocks():
    def blocks(target):
        launches = record(mlstm(1, 8, 8192, 256, 512), target)
        return [{n: x for n, x in launch.arguments.items() if n in ("BK", "BV", "BC")} for launch in launches]

    blackwell = TARGETS["sm_100"]
    assert blocks(replace(blackwell, arch=103)) == blocks(blackwell) != blocks(TARGETS["sm_90"])


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target(tmp_path):
    out = tmp_path / "table.json"
    command = ("-m", "xlstm_scaling.cli", "certify", "--compile", "--shapes", "quick", "--out", out, "--failures-only")
    result = python(*command, TRITON_INTERPRET="1")  # the command sheds it
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(out.read_text())
    assert {row["target"] for row in rows} >= set(TARGETS)
    assert all(not row["failures"] for row in rows)


def test_unknown_targets_and_endings_are_named(tmp_path, capsys):
    for words, message in (
        (["--target", "sm_12"], "no target sm_12; known: sm_80, sm_90, sm_100, gfx942"),
        (["--out", str(tmp_path / "table.txt")], "the table is written as .csv or .json"),
    ):
        assert run_command(["certify", "--compile", *words]) == 1
        assert message in capsys.readouterr().err


if __name__ == "__main__":
    from dataclasses import asdict

    work = [(launch, TARGETS[target], name) for target in sys.argv[1:] for name, launch in LAUNCHES.items()]
    found = compile_launches(work, processes=2)
    print(table(found), file=sys.stderr)
    print(json.dumps([asdict(row) for row in found]))
