"""Certification: right kernels pass, wrong ones are caught by the tensor's name, certificates hold where they may."""

import copy
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from xlstm_scaling.cli import run_command
from xlstm_scaling.kernels import Kernel, registry
from xlstm_scaling.kernels.certification import certificate as certificates
from xlstm_scaling.kernels.certification.certificate import (
    CertificateError,
    load_certificate,
    require_certified,
    source_digest,
)
from xlstm_scaling.kernels.certification.comparison import CEILING, SLACK, THRESHOLDS, judge, rms_error
from xlstm_scaling.kernels.certification.mlstm import LONG, MLSTM
from xlstm_scaling.kernels.certification.operation import Problem, evaluate, strict_memory
from xlstm_scaling.kernels.certification.run import OPERATIONS, certify, certify_kernels, select_cases
from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.kernels.mlstm.chunkwise import mlstm_chunkwise
from xlstm_scaling.kernels.mlstm.recurrent import mlstm_recurrent, mlstm_step
from xlstm_scaling.kernels.mlstm.state import MLSTMState

DTYPES = ("float32", "bfloat16")
MLSTM_TENSORS = ["h", "C", "n", "m", "dq", "dk", "dv", "di", "df", "dC0", "dn0", "dm0"]
#: cases that wrong kernels are tried on
SHORT = ("odd length", "odd length, no state, gradient of h", "resets", "handed over once")


#: the case that the command is tried on
SHORTEST = "shorter than a chunk"

# the rule


def test_both_conditions_decide():
    threshold, slack = THRESHOLDS["float32"], SLACK["float32"]
    assert judge(0.9 * threshold, 0.8 * threshold, "float32").passed
    assert not judge(1.01 * threshold, 0.8 * threshold, "float32").passed  # above the threshold
    assert not judge(0.9 * threshold, 0.1 * threshold, "float32").passed  # far worse than PyTorch
    assert judge(0.9 * slack, 0.0, "float32").passed


def test_a_tensor_that_vanishes_may_be_off_by_roundings_of_what_it_is_summed_from():
    case = next(c for c in MLSTM.cases if c.name == "inputs open, forget closed, gradient of h")
    problem = Problem(MLSTM(), case, torch.float32)
    for name in ("dq", "di"):
        reference = problem.reference[name]
        assert reference.square().mean().sqrt() < 1e-5  # h = v, whatever q and i are
        scale = problem.floors[name] * THRESHOLDS["float32"] / SLACK["float32"]
        near = 0.8 * SLACK["float32"] * scale
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0)).float()
        assert problem._judge(name, problem._error(name, reference.float() + near * noise), 0.0).passed
        assert not problem._judge(name, problem._error(name, reference.float() + 2 * near * noise), 0.0).passed


def test_where_pytorch_misses_the_threshold_twice_its_error_decides_up_to_a_ceiling():
    threshold = THRESHOLDS["bfloat16"]
    check = judge(3.9 * threshold, 2 * threshold, "bfloat16")
    assert check.ill_conditioned
    assert check.passed
    assert not judge(5 * threshold, 2 * threshold, "bfloat16").passed
    assert not judge(1.01 * CEILING * threshold, 100 * threshold, "bfloat16").passed
    assert not judge(math.inf, math.inf, "bfloat16").passed


def test_errors_that_have_no_number():
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert rms_error(torch.tensor([1.0, 1.0, math.nan]), ones) == math.inf
    assert rms_error(torch.tensor([1.0, math.inf, 1.0]), ones) == math.inf
    assert rms_error(zeros, zeros) == 0
    assert rms_error(1e-30 * ones, zeros) == math.inf
    assert rms_error(1e-3 * ones, zeros, floor=1.0) == pytest.approx(1e-3)


# the cases


@pytest.fixture(scope="module")
def short_problems():
    """All cases of the mLSTM but the longest, in fp32."""
    operation = MLSTM()
    cases = [c for c in operation.cases if c.device is None and c.settings.get("T", 1) <= LONG]
    with strict_memory():
        return [Problem(operation, case, torch.float32) for case in cases]


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_quick_cases_cover_every_tensor_and_what_is_hard(name):
    operation = OPERATIONS[name]
    cases = select_cases(operation, "cpu", "quick", interpreted=False)
    tested = {d for case in cases for d in operation.shapes(case)}
    assert tested == set(operation.outputs)
    assert len({case.name for case in operation.cases}) == len(operation.cases)
    if name == "mlstm":
        settings = [case.settings for case in cases]
        assert {(s["i"], s["f"]) for s in settings} >= {(i, f) for i in (15.0, -15.0) for f in (15.0, -15.0)}
        assert any(s["T"] % 2 for s in settings)
        assert any(s["T"] < (s["chunk"] or 0) for s in settings)
        assert any(s["d_qk"] > s["d_v"] for s in settings)
        assert any(s["T"] == 65536 and s["H"] == 1 for s in settings)
        assert any(s["splits"] for s in settings)
        assert any(s["resets"] for s in settings)
        assert any(not s["state"] and s["cotangents"] == ("h",) for s in settings)


def test_pytorch_in_fp32_is_well_conditioned_on_every_case(short_problems):
    with strict_memory():
        for problem in short_problems:
            for name, check in problem.check(mlstm_chunkwise, "chunkwise").items():
                assert not check.ill_conditioned, f"{name} in {problem.case.name}: {check}"


def test_one_token_wins_the_last_maximum_clearly(short_problems):
    """The last m has a gradient by the token that gives it: two that come close would make it a matter of rounding."""
    for problem in short_problems:
        x = {name: value.double() for name, value in problem.inputs.items()}
        b = F.logsigmoid(x["f"]).cumsum(-1)
        candidates = x["i"] - b + b[..., -1:]
        if "m0" in x:
            candidates = torch.cat((candidates, (x["m0"] + b[..., -1])[..., None]), -1)
        if candidates.shape[-1] > 1:
            top = candidates.topk(2).values
            assert (top[..., 0] - top[..., 1]).min() > 1e-4, problem.case.name


def test_the_long_reference_is_the_recurrent_one():
    operation = MLSTM()
    case = next(c for c in operation.cases if c.settings["T"] > LONG)
    case = type(case)("shorter", {**case.settings, "T": LONG + 89})
    generator = torch.Generator().manual_seed(1)
    x = operation.draw(case, generator)
    shapes = operation.shapes(case)
    d = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    found = [evaluate(operation, case, f, "whole", x, lambda _: d) for f in (mlstm_chunkwise, mlstm_recurrent)]
    assert set(found[0]) == set(MLSTM_TENSORS)
    for name in MLSTM_TENSORS:
        assert rms_error(found[0][name], found[1][name]) < 1e-10, name


# wrong kernels


@pytest.fixture(scope="module")
def problems():
    """The cases that wrong kernels are tried on, in both dtypes."""
    operation = MLSTM()
    cases = [case for case in operation.cases if case.name in SHORT]
    with strict_memory():
        return [Problem(operation, case, getattr(torch, dtype)) for case in cases for dtype in DTYPES]


def failures(problems, function, dtype):
    """Names of the tensors that fail in a dtype."""
    with strict_memory():
        checks = [p.check(function, "chunkwise") for p in problems if p.dtype == dtype]
    return {name for found in checks for name, check in found.items() if not check.passed}


class Gradient(torch.autograd.Function):
    """x as it is, its gradient through a function."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def with_gradients(**changes):
    """The PyTorch kernel with changed gradients of its inputs, by name."""

    def kernel(q, k, v, i, f, state=None, chunk_size=64):
        x = dict(zip(("q", "k", "v", "i", "f"), (q, k, v, i, f)))
        if state is not None:
            x |= dict(zip(("C0", "n0", "m0"), state))
        x = {name: Gradient.apply(y, changes[name]) if name in changes else y for name, y in x.items()}
        state = None if state is None else MLSTMState(*(x.pop(name) for name in ("C0", "n0", "m0")))
        return mlstm_chunkwise(*x.values(), state, chunk_size)

    return kernel


def with_outputs(**changes):
    """The PyTorch kernel with changed outputs, by name."""

    def kernel(*args, **options):
        h, state = mlstm_chunkwise(*args, **options)
        y = {"h": h, **state._asdict()}
        y = {name: changes[name](value) if name in changes else value for name, value in y.items()}
        return y.pop("h"), MLSTMState(**y)

    return kernel


def test_the_kernel_that_wrong_ones_are_made_of_is_right(problems):
    for dtype in DTYPES:
        assert not failures(problems, with_gradients(), dtype)
        assert not failures(problems, with_outputs(), dtype)


@pytest.mark.parametrize("name", MLSTM_TENSORS)
@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.01), ("bfloat16", 1.03)])
def test_a_tensor_that_is_off_by_percents_is_named(problems, name, dtype, factor):
    if name.startswith("d"):
        wrong = with_gradients(**{name[1:]: lambda g: g * factor})
        found = failures(problems, wrong, dtype)
        # the gradient of a state that is handed over goes on to all before
        assert name in found if name.endswith("0") else found == {name}
    else:
        assert name in failures(problems, with_outputs(**{name: lambda y: y * factor}), dtype)


@pytest.mark.parametrize("name", ["dq", "dk", "di", "df"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_no_gradient_is_named(problems, name, dtype):
    """As the field's reference kernels had it on a new GPU: h right, loss finite, dq and dk entirely wrong."""
    for change in (torch.zeros_like, torch.neg, lambda g: g.roll(1, 2), lambda g: g.flip(0)):
        assert failures(problems, with_gradients(**{name[1:]: change}), dtype) == {name}


def boundary_signs(grad):
    grad = grad.clone()
    grad[..., 63::64] *= -1
    return grad


def one_row(value):
    def change(y):
        y = y.clone()
        y[0, 0, 40] = value
        return y

    return change


def padded(q, k, v, i, f, state=None, chunk_size=64):
    """Padding to whole chunks decays the state."""
    T = q.shape[2]
    pad = -T % chunk_size
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    h, state = mlstm_chunkwise(
        q, k, v, F.pad(i, (0, pad), value=-100.0), F.pad(f, (0, pad), value=4.0), state, chunk_size
    )
    return h[:, :, :T], state


def neighbours(q, *args, **options):
    """As if memory were contiguous: reads other rows than it should."""
    B, H, T, d = q.shape
    q = q.as_strided(q.shape, (H * T * d, T * d, d, 1)) if B * H * T * d <= q.untyped_storage().nbytes() else q
    return mlstm_chunkwise(q, *args, **options)


def uninitialised(*args, **options):
    """Adds nothing, times memory that nobody wrote."""
    h, state = mlstm_chunkwise(*args, **options)
    return h + 0 * torch.empty_like(h), state


def state_without_gradient(*args, **options):
    h, state = mlstm_chunkwise(*args, **options)
    return h, MLSTMState(*(y.detach() for y in state))


def first_state_without_gradient(q, k, v, i, f, state=None, **options):
    state = None if state is None else MLSTMState(*(y.detach() for y in state))
    return mlstm_chunkwise(q, k, v, i, f, state, **options)


def imprecise(q, k, v, i, f, state=None, chunk_size=64):
    """Products of fp32 in bf16."""
    h, state = mlstm_chunkwise(q.bfloat16(), k.bfloat16(), v.bfloat16(), i, f, state, chunk_size)
    return h.to(q.dtype), state


@pytest.mark.parametrize(
    ("kernel", "named", "dtypes"),
    [
        (with_gradients(f=boundary_signs), {"df"}, DTYPES),
        (with_outputs(h=one_row(math.nan)), {"h"}, DTYPES),
        (with_outputs(h=one_row(0.0)), {"h"}, DTYPES),
        (with_outputs(m=torch.detach), {"di", "df", "dm0"}, DTYPES),
        (with_outputs(C=lambda y: y.transpose(0, 1).contiguous()), {"C"}, DTYPES),
        (padded, {"C", "n", "m"}, DTYPES),
        (neighbours, {"h", "dq"}, DTYPES),
        (uninitialised, {"h"}, DTYPES),
        (state_without_gradient, {"dk", "dv", "di", "df"}, DTYPES),
        (first_state_without_gradient, {"dC0", "dn0", "dm0"}, DTYPES),
        (imprecise, {"h", "C", "dq", "dk", "dv"}, ["float32"]),
        (with_outputs(h=torch.Tensor.float), {"h"}, ["bfloat16"]),
        (with_outputs(h=lambda y: y[..., :-1]), {"h"}, DTYPES),
        (with_outputs(h=lambda y: y * (1 + 6e-6)), {"h"}, ["float32"]),  # below 2e-5, far above PyTorch
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_wrong_kernels_are_caught_and_named(problems, kernel, named, dtypes):
    for dtype in dtypes:
        assert named <= failures(problems, kernel, dtype)


def test_a_kernel_that_changes_its_inputs_or_what_lies_beside_is_caught(problems):
    def changes_m(q, k, v, i, f, state=None, **options):
        found = mlstm_chunkwise(q, k, v, i, f, state, **options)
        state.m.detach().mul_(1.5)
        return found

    def writes_beside(q, k, v, i, f, state=None, **options):
        state.C.detach().as_strided((1,), (1,), 0)[0] = 0.0  # the first element of the guard
        return mlstm_chunkwise(q, k, v, i, f, state, **options)

    with pytest.raises(RuntimeError, match="changes its input m0"):
        problems[0].check(changes_m, "chunkwise")
    with pytest.raises(RuntimeError, match="writes beside"):
        problems[0].check(writes_beside, "chunkwise")


def test_a_step_may_write_over_its_state_and_need_not_have_gradients(problems):
    def step(q, k, v, i, f, state):
        h, new = mlstm_step(q.detach(), k.detach(), v.detach(), i.detach(), f.detach(), state)
        for old, value in zip(state, new):
            old.copy_(value)
        return h, state

    checks = problems[0].check(step, "step", gradient=False)
    assert set(checks) == {"h", "C", "n", "m"}
    assert all(check.passed for check in checks.values())
    assert "dq" not in MLSTM().tensors("step", "triton")
    assert "dq" in MLSTM().tensors("step", "torch")


def test_settings_are_restored():
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), strict_memory():
        assert torch.empty(5).isnan().all()
        1 / 0  # noqa: B018
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())


@pytest.mark.parametrize(
    ("op", "tensor"),
    [
        ("linear_cross_entropy", "dhidden"),
        ("linear_cross_entropy", "dweight"),
        ("rms_norm", "dx"),
        ("rms_norm", "dweight"),
        ("rms_norm", "dresidual"),
        ("head_norm_gate", "dh"),
        ("head_norm_gate", "dgate"),
        ("gated_silu", "dgate_up"),
    ],
)
def test_wrong_gradients_of_the_other_operations_are_named(op, tensor):
    right = registry.get_kernel(op, "reference")
    order = {
        "linear_cross_entropy": ("hidden", "weight"),
        "rms_norm": ("x", "weight", "residual"),
        "head_norm_gate": ("h", "gate", "weight"),
        "gated_silu": ("gate_up",),
    }[op]

    def wrong(*args):
        changed = [
            Gradient.apply(x, lambda g: 1.03 * g) if name == tensor[1:] and torch.is_tensor(x) else x
            for name, x in zip(order, args)
        ]
        return right(*changed, *args[len(order) :])

    found = certify_kernels([Kernel(op, "wrong", "torch", wrong)], level="quick")
    for result in found:
        named = {name for checks in result.checks.values() for name, check in checks.items() if not check.passed}
        assert named == {tensor}
        assert any(text.startswith(f"{tensor} is off by") for text in result.failures())


# the command and the certificate


@pytest.mark.slow
def test_the_kernels_of_this_cpu_are_right(quick_certificate):
    """All kernels that there are."""
    certificate = load_certificate(quick_certificate)
    assert certificate["level"] == "quick"
    found = {(e["op"], e["form"], e["backend"]) for e in certificate["kernels"]}
    assert {op for op, _, _ in found} == set(OPERATIONS)
    compiled = {"cpp"} if build.usable("mlstm") else set()
    assert {backend for _, _, backend in found} == {"torch", "cpu"} | compiled
    for entry in certificate["kernels"]:
        assert entry["passed"], entry["failures"]
        assert entry["cases"]
    assert certificate["passed"]
    assert certificate["device"]["name"]
    assert certificate["versions"]["torch"] == torch.__version__.split("+")[0] or certificate["versions"]["torch"]
    json.dumps(certificate, allow_nan=False)
    used = [("mlstm", "chunkwise", "torch", dtype) for dtype in DTYPES]
    require_certified(certificate, used)


@pytest.fixture
def few_cases(monkeypatch):
    """One short case of the mLSTM, so that the command takes no time."""
    cases = tuple(case for case in MLSTM.cases if case.name == SHORTEST)
    monkeypatch.setattr(MLSTM, "cases", cases)


def test_the_command_writes_a_certificate_and_says_what_failed(few_cases, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    registry.register("mlstm", "skewed", "torch")(with_gradients(q=lambda g: 1.1 * g))
    out = tmp_path / "certificates" / "cpu.json"
    words = ["certify", "--device", "cpu", "--op", "mlstm", "--backend", "torch", "--out", str(out), "--quiet"]
    assert run_command(words) == 1
    text = capsys.readouterr()
    for dtype in DTYPES:
        assert f"FAILED mlstm skewed (torch) in {dtype}: dq is off by 0.1 in case {SHORTEST!r}" in text.err
    assert "mlstm chunkwise (torch)" in text.out
    assert run_command([*words, "--report-only"]) == 0
    written = load_certificate(out)
    assert not written["passed"]
    require_certified(written, [("mlstm", "chunkwise", "torch", "float32")])
    with pytest.raises(
        CertificateError, match=r"mlstm skewed \(torch\) in float32 failed .* dq is off by 0.1"
    ) as error:
        require_certified(written, [("mlstm", "skewed", "torch", "float32")], path=out)
    assert f"xlstm-scaling certify --device cpu --out {out}" in str(error.value)


def test_a_kernel_that_raises_fails_and_the_others_go_on(few_cases):
    def broken(*args, **options):
        raise ValueError("no such luck\nsecond line")

    kernels = [Kernel("mlstm", "broken", "torch", broken), Kernel("mlstm", "chunkwise", "torch", mlstm_chunkwise)]
    first, second = certify_kernels(kernels, dtypes=["float32"])
    assert first.failures() == [f"ValueError: no such luck, in case {SHORTEST!r}"]
    assert not second.failures()
    assert set(MLSTM_TENSORS) < set(first.untested(MLSTM()))


def test_a_module_that_cannot_be_imported_is_a_failure(few_cases, monkeypatch):
    monkeypatch.setitem(registry._MODULES, ("mlstm", "cpu"), ("mlstm.not_there",))
    found = certify("cpu", ops=["mlstm"], backends=["cpu"], dtypes=["float32"], progress=False)
    assert not found["passed"]
    with pytest.raises(CertificateError, match=r"cannot be imported: No module named .*not_there"):
        require_certified(found, [("mlstm", "chunkwise", "cpu", "float32")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--op slstm", "no operation 'slstm'; known: mlstm"),
        ("--device cpu --backend cuda", "backend 'cuda' does not run on cpu; there: torch, cpu, cpp"),
        ("--dtype float8", "no thresholds for dtype 'float8'"),
        pytest.param("--device cuda", "there is no GPU here",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)  # fmt: skip
def test_what_cannot_be_certified_is_said(capsys, words, message):
    assert run_command(["certify", *words.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def plain_certificate(few_cases):
    return certify("cpu", ops=["mlstm"], backends=["torch"], dtypes=["float32"], progress=False)


def test_a_certificate_holds_for_its_device_sources_and_kernels(plain_certificate, monkeypatch, tmp_path):
    use = [("mlstm", "chunkwise", "torch", "float32")]
    require_certified(plain_certificate, use)

    def refused(message, change=None, kernels=use):
        changed = copy.deepcopy(plain_certificate)
        if change is not None:
            change(changed)
        with pytest.raises(CertificateError, match=message) as error:
            require_certified(changed, kernels, path="here.json")
        assert "xlstm-scaling certify --device cpu --out here.json" in str(error.value)

    refused("another device, A CPU of others", lambda c: c["device"].update(name="A CPU of others"))
    refused("another device", lambda c: c["device"].update(flags=[]))
    refused("other kernel sources", lambda c: c.update(kernel_sources="0"))
    refused("torch 1.0, here is", lambda c: c["versions"].update(torch="1.0"))
    refused(r"does not cover the kernel mlstm chunkwise \(torch\) in bfloat16", kernels=[(*use[0][:3], "bfloat16")])
    refused(r"does not cover the kernel rms_norm fused \(cpu\)", kernels=[("rms_norm", "fused", "cpu", "float32")])
    monkeypatch.setattr(certificates, "source_digest", lambda: "changed")
    refused("other kernel sources")


def test_certificates_that_are_none_are_named(tmp_path):
    with pytest.raises(CertificateError, match=r"there is no .*a\.json; run: xlstm-scaling certify --device cpu --out"):
        load_certificate(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"schema_version": 99}')
    with pytest.raises(CertificateError, match="no certificate of schema"):
        load_certificate(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"c\.json is not valid JSON"):
        load_certificate(tmp_path / "c.json")


def test_the_digest_of_the_sources_is_of_contents_alone(tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(certificates.KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert source_digest(folder) == source_digest()
    (folder / "cross_entropy.py").rename(folder / "renamed.py")
    (folder / "registry.py").touch()
    assert source_digest(folder) == source_digest()
    with (folder / "mlstm" / "chunkwise.py").open("a") as stream:
        stream.write("# changed\n")
    assert source_digest(folder) != source_digest()


def test_reading_a_certificate_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys; from xlstm_scaling.kernels.certification import certificate as c; c.validity('cpu'); "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
