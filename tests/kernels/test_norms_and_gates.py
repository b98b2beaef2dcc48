"""RMS norm, head norm with gate and gated SiLU: every implementation against the reference in float64."""

from functools import partial

import pytest
import torch

from xlstm_scaling.kernels import gated_silu, get_kernel, head_norm_gate
from xlstm_scaling.kernels.cpp import build

OPS = ("rms_norm", "head_norm_gate", "gated_silu")
#: largest RMS-relative error of an output or a gradient; and what a kernel may have more than twice the reference's
THRESHOLDS = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 6e-3}
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
#: operation, sizes: rms_norm (rows, d, with residual), head_norm_gate (B, T, H, d_v, transposed), gated_silu (rows, F)
CASES = [
    ("rms_norm", (1, 24, False)),
    ("rms_norm", (7, 63, False)),
    ("rms_norm", (65, 100, True)),
    ("rms_norm", (7, 256, True)),
    ("head_norm_gate", (1, 1, 1, 24, False)),
    ("head_norm_gate", (2, 7, 1, 63, True)),
    ("head_norm_gate", (2, 7, 3, 63, True)),
    ("head_norm_gate", (1, 65, 2, 100, False)),
    ("gated_silu", (1, 24)),
    ("gated_silu", (7, 63)),
    ("gated_silu", (65, 100)),
]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=["cpu", "cpp"])
def backend(request):
    if request.param == "cpp" and not build.usable("rows"):
        pytest.skip("no C++ compiler")
    return request.param


@pytest.fixture
def _fused_at_any_size(monkeypatch):
    """Small inputs are not left to the reference."""
    for module, name in (
        (head_norm_gate, "MIN_NUMBERS"),
        (head_norm_gate, "MIN_HEAD_DIM"),
        (gated_silu, "MIN_NUMBERS"),
    ):
        monkeypatch.setattr(module, name, 0)


def make_inputs(op, sizes, dtype, device="cpu", seed=0):
    """Inputs by name, rounded to the dtype, weights in fp32; values do not depend on dtype or device."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, mean=0.0, scale=1.0, dtype=dtype):
        return (mean + scale * torch.randn(*shape, generator=g)).to(dtype).to(device)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if op == "rms_norm":
        rows, d, with_residual = sizes
        inputs = {"x": normal(rows, d), "weight": normal(d, mean=1.0, scale=0.3, dtype=wide)}
        if with_residual:
            inputs["residual"] = normal(rows, d, mean=0.2)
    elif op == "head_norm_gate":
        B, T, H, d, transposed = sizes
        h = normal(B, H, T, d, mean=0.5, scale=2.0).transpose(1, 2)
        inputs = {
            "h": h if transposed else h.contiguous(),
            "gate": normal(B, T, H * d, scale=2.0),
            "weight": normal(H * d, mean=1.0, scale=0.3, dtype=wide),
        }
    else:
        rows, width = sizes
        inputs = {"gate_up": normal(rows, 2 * width, scale=2.0)}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def run(function, inputs):
    """Outputs and gradients by name, for fixed random gradients of all outputs."""
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=g).bfloat16().to(y.dtype).to(y.device) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    named = dict(zip(("y", "total"), outputs)) | {f"d_{name}": d for name, d in zip(inputs, gradients)}
    return {name: x.detach() for name, x in named.items()}


def rms_error(x, reference):
    difference = (x.cpu().double() - reference.cpu()).square().mean().sqrt()
    return (difference / reference.cpu().square().mean().sqrt()).item()


def check(function, op, sizes, dtype, device="cpu"):
    """Each output and gradient of ``function``: close to float64, and about as close as the reference in ``dtype``."""
    inputs = make_inputs(op, sizes, dtype, device)
    reference = get_kernel(op, "reference")
    exact = run(reference, {name: x.detach().double().requires_grad_() for name, x in inputs.items()})
    plain, found = run(reference, inputs), run(function, inputs)
    assert found.keys() == exact.keys()
    for name, x in found.items():
        assert x.dtype == (inputs[name[2:]].dtype if name.startswith("d_") else dtype), name
        assert x.shape == exact[name].shape, name
        error, plain_error = rms_error(x, exact[name]), rms_error(plain[name], exact[name])
        assert error <= THRESHOLDS[dtype], f"{name}: {error:.1e}"
        assert error <= 2 * plain_error + SLACK[dtype], f"{name}: {error:.1e}, reference {plain_error:.1e}"


#: large enough that nothing is left to the reference
LARGE = [
    ("rms_norm", (300, 112, True)),
    ("head_norm_gate", (8, 64, 1, 64, True)),
    ("head_norm_gate", (4, 80, 2, 56, True)),
    ("gated_silu", (600, 448)),
]


@pytest.mark.parametrize("dtype", THRESHOLDS, ids=str)
@pytest.mark.parametrize(("op", "sizes"), CASES + LARGE)
def test_outputs_and_gradients_against_float64(backend, op, sizes, dtype):
    check(get_kernel(op, "fused", backend), op, sizes, dtype)


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("rms_norm", (3, 5, False)),
        ("rms_norm", (3, 5, True)),
        ("head_norm_gate", (2, 3, 1, 4, True)),
        ("head_norm_gate", (2, 2, 2, 3, True)),
        ("head_norm_gate", (2, 2, 2, 3, False)),
        ("gated_silu", (3, 4)),
    ],
)
@pytest.mark.usefixtures("_fused_at_any_size")
def test_gradcheck(op, sizes):
    inputs = make_inputs(op, sizes, torch.float64)
    function = get_kernel(op, "fused", "cpu")  # C++ has no float64
    assert torch.autograd.gradcheck(lambda *x: function(**dict(zip(inputs, x))), tuple(inputs.values()))


@pytest.mark.parametrize("form", [("reference", "torch"), ("fused", "cpu"), ("fused", "cpp")])
@pytest.mark.parametrize("kept", [("y",), ("total",), ("y", "total")])
def test_either_output_of_the_norm_with_residual_may_be_left_alone(form, kept):
    inputs = make_inputs("rms_norm", (4, 6, True), torch.float64)
    y, total = get_kernel("rms_norm", *form)(**inputs)
    x, residual = inputs["x"], inputs["residual"]
    loss = sum((2 * {"y": y, "total": total}[name]).sum() for name in kept)
    d_x, d_residual = torch.autograd.grad(loss, (x, residual))
    assert torch.equal(d_x, d_residual)
    scale = torch.rsqrt((x + residual).square().mean(-1, keepdim=True) + 1e-6)
    plain = ((x + residual) * scale * inputs["weight"]).sum() if "y" in kept else 0
    plain = plain + ((x + residual).sum() if "total" in kept else 0)
    assert torch.allclose(d_x, torch.autograd.grad(2 * plain, x)[0])


def test_several_heads_are_normed_one_by_one(backend):
    h, gate, weight = torch.randn(32, 64, 4, 40), torch.randn(32, 64, 160), torch.randn(160)
    y = get_kernel("head_norm_gate", "fused", backend)(h, gate, weight)
    head = h[..., 2, :]
    normed = (head - head.mean(-1, keepdim=True)) / (head.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = torch.sigmoid(gate[..., 80:120]) * normed * weight[80:120]
    assert torch.allclose(y[..., 80:120], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "sizes"), [("rms_norm", (0, 8, True)), ("head_norm_gate", (0, 3, 2, 32, False)), ("gated_silu", (0, 4))]
)
def test_no_rows(backend, op, sizes):
    found = run(get_kernel(op, "fused", backend), make_inputs(op, sizes, torch.float32))
    assert found["y"].numel() == 0
    assert all(not x.any() for name, x in found.items() if name == "d_weight")


@pytest.mark.parametrize(("op", "sizes"), LARGE)
def test_the_same_bits_every_time(backend, op, sizes):
    first, second = (run(get_kernel(op, "fused", backend), make_inputs(op, sizes, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("_fused_at_any_size")
@pytest.mark.parametrize(
    ("op", "sizes"),
    [("rms_norm", (2, 8, False)), ("head_norm_gate", (1, 2, 1, 32, False)), ("gated_silu", (2, 8))],
)
def test_second_derivatives_are_refused(backend, op, sizes):
    inputs = make_inputs(op, sizes, torch.float32)
    loss = get_kernel(op, "fused", backend)(**inputs).square().sum()
    (d,) = torch.autograd.grad(loss, next(iter(inputs.values())), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d.sum().backward()


def test_small_and_large_inputs_of_gated_silu_give_the_same_bits(monkeypatch):
    inputs = make_inputs("gated_silu", (65, 100), torch.bfloat16)
    results = []
    for fewest in (0, 2**30):
        monkeypatch.setattr(gated_silu, "MIN_NUMBERS", fewest)
        results.append(run(get_kernel("gated_silu", "fused", "cpu"), inputs))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(("op", "sizes"), LARGE)
def test_bits_of_cpp_do_not_depend_on_threads(op, sizes):
    if not build.usable("rows"):
        pytest.skip("no C++ compiler")
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            found.append(run(get_kernel(op, "fused", "cpp"), make_inputs(op, sizes, torch.bfloat16)))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_values_that_are_not_finite_stay_so_in_cpp():
    if not build.usable("rows"):
        pytest.skip("no C++ compiler")
    x = torch.zeros(4, 64)
    x[0, 3], x[1, 3], x[2, 3] = torch.nan, torch.inf, -torch.inf
    y = get_kernel("gated_silu", "fused", "cpp")(torch.cat([x, torch.ones_like(x)], -1))
    expected = get_kernel("gated_silu", "reference")(torch.cat([x, torch.ones_like(x)], -1))
    assert torch.equal(y.isfinite(), expected.isfinite())
    y = get_kernel("rms_norm", "fused", "cpp")(x, torch.ones(64))
    assert y[:3].isnan().any(1).all()
    assert y[3].isfinite().all()


def wrong_inputs():
    """(operation, arguments, what the message says)."""
    x, weight = torch.zeros(2, 8), torch.ones(8)
    h, gate = torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 8)
    return [
        ("rms_norm", (x, torch.ones(7)), r"weight \(d,\), got \(2, 8\) and \(7,\)"),
        (
            "rms_norm",
            (x, weight, torch.zeros(2, 7)),
            r"residual like x, torch.float32 \(2, 8\), got torch.float32 \(2, 7\)",
        ),
        ("rms_norm", (x, weight, x.bfloat16()), "got torch.bfloat16"),
        ("head_norm_gate", (h, gate[..., :7], weight), r"got \(2, 3, 2, 4\), \(2, 3, 7\) and \(8,\)"),
        ("head_norm_gate", (h.flatten(2), gate, weight), r"h \(B, T, H, d_v\)"),
        ("head_norm_gate", (h, gate.half(), weight), "one dtype, got torch.float32 and torch.float16"),
        ("gated_silu", (torch.zeros(2, 7),), r"\(..., 2 F\), got \(2, 7\)"),
    ]


@pytest.mark.parametrize("form", [("reference", "torch"), ("fused", "cpu"), ("fused", "cpp")])
@pytest.mark.parametrize("case", range(len(wrong_inputs())))
def test_what_does_not_fit_is_named(form, case):
    op, arguments, message = wrong_inputs()[case]
    with pytest.raises(ValueError, match=message):
        partial(get_kernel(op, *form))(*arguments)
