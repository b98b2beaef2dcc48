"""The Triton kernels of norms and gates: on a GPU where there is one, else interpreted on the CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from test_norms_and_gates import CASES, OPS, THRESHOLDS, check, make_inputs, run, wrong_inputs
from test_norms_and_gates import _uninitialised_memory_is_nan as _uninitialised_memory_is_nan

from xlstm_scaling.kernels import get_kernel
from xlstm_scaling.kernels.triton_launch import INTERPRETED, TARGETS, configured, recording

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
KERNELS = ("rms_norm_backward_kernel", "head_norm_gate_backward_kernel")
SMALL = {"rms_norm": (7, 63, True), "head_norm_gate": (2, 7, 3, 63, True), "gated_silu": (7, 63)}


@pytest.mark.parametrize("dtype", THRESHOLDS, ids=str)
@pytest.mark.parametrize(("op", "sizes"), CASES)
def test_outputs_and_gradients_against_float64(op, sizes, dtype):
    check(get_kernel(op, "fused", "triton"), op, sizes, dtype, DEVICE)


@pytest.mark.parametrize(
    ("op", "sizes"),
    [("rms_norm", (3, 4096, True)), ("head_norm_gate", (1, 2, 2, 1024, True)), ("gated_silu", (3, 2048))],
)
def test_wide_rows(op, sizes):
    check(get_kernel(op, "fused", "triton"), op, sizes, torch.bfloat16, DEVICE)


@pytest.mark.parametrize(("op", "sizes"), [("rms_norm", (65, 40, True)), ("head_norm_gate", (5, 13, 2, 24, True))])
def test_programs_that_stay_for_many_rows(op, sizes):
    few = {name: {"ROWS": 2, "PER_PROCESSOR": 1, "num_warps": 1} for name in KERNELS}
    with configured(few):
        check(get_kernel(op, "fused", "triton"), op, sizes, torch.float32, DEVICE)


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_every_time(op):
    function = get_kernel(op, "fused", "triton")
    first, second = (run(function, make_inputs(op, SMALL[op], torch.bfloat16, DEVICE)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", OPS)
def test_slices_of_wider_tensors(op):
    """Rows that are not contiguous with each other, columns that are not either, gradients that are expanded."""
    function = get_kernel(op, "fused", "triton")
    inputs = make_inputs(op, SMALL[op], torch.float32, DEVICE)

    def wider(x):  # the same values behind other strides
        return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1).flatten(-2)[..., ::2].detach()

    def padded(x):
        return torch.cat((x, torch.full_like(x, torch.nan)), dim=-1)[..., : x.shape[-1]].detach()

    expected = function(**inputs)
    for other in (wider, padded):
        found = function(**{name: other(x) for name, x in inputs.items()})
        for a, b in zip(
            found if isinstance(found, tuple) else (found,), expected if isinstance(expected, tuple) else (expected,)
        ):
            assert torch.equal(a, b)
    y = expected[0] if isinstance(expected, tuple) else expected
    gradients = [
        torch.autograd.grad(y, list(inputs.values()), one, retain_graph=True)
        for one in (torch.ones_like(y), torch.ones((), device=DEVICE).expand_as(y))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_gradients_keep_the_order_of_axes_of_h():
    for transposed in (True, False):
        inputs = make_inputs("head_norm_gate", (2, 5, 2, 24, transposed), torch.float32, DEVICE)
        y = get_kernel("head_norm_gate", "fused", "triton")(**inputs)
        (d_h,) = torch.autograd.grad(y.sum(), inputs["h"])
        assert d_h.stride() == inputs["h"].stride()


def test_either_output_of_the_norm_with_residual_may_be_left_alone():
    inputs = make_inputs("rms_norm", (4, 24, True), torch.float32, DEVICE)
    names = ("x", "residual")
    for index in (0, 1):
        y, plain = (get_kernel("rms_norm", *form)(**inputs)[index] for form in (("fused", "triton"), ("reference",)))
        found, expected = (torch.autograd.grad(z.square().sum(), [inputs[n] for n in names]) for z in (y, plain))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    ("op", "sizes"), [("rms_norm", (0, 8, True)), ("head_norm_gate", (0, 3, 2, 32, False)), ("gated_silu", (0, 4))]
)
def test_no_rows(op, sizes):
    found = run(get_kernel(op, "fused", "triton"), make_inputs(op, sizes, torch.float32, DEVICE))
    assert found["y"].numel() == 0
    assert not found.get("d_weight", torch.zeros(1)).any()


@pytest.mark.parametrize("op", OPS)
def test_launches_can_be_recorded(op):
    """Host code reads no values: it runs on meta tensors, and no argument is missing."""
    with recording(TARGETS["sm_90"]) as launches:
        inputs = {
            name: x.detach().to("meta").requires_grad_()
            for name, x in make_inputs(op, SMALL[op], torch.bfloat16).items()
        }
        y = get_kernel(op, "fused", "triton")(**inputs)
        torch.autograd.grad(
            y, list(inputs.values()), [torch.empty_like(z) for z in y] if op == "rms_norm" else torch.empty_like(y)
        )
    assert [launch.name for launch in launches] == [f"{op}_forward_kernel", f"{op}_backward_kernel"]
    assert all(value is not None for launch in launches for value in launch.arguments.values())


@pytest.mark.parametrize("case", range(len(wrong_inputs())))
def test_what_does_not_fit_is_named(case):
    op, arguments, message = wrong_inputs()[case]
    with pytest.raises(ValueError, match=message):
        get_kernel(op, "fused", "triton")(*(x.to(DEVICE) for x in arguments))


@pytest.mark.parametrize("op", OPS)
def test_float64_and_other_devices_are_refused(op):
    function = get_kernel(op, "fused", "triton")
    with pytest.raises(ValueError, match=r"takes fp32, bf16 and fp16, got .*float64"):
        function(**make_inputs(op, SMALL[op], torch.float64, DEVICE))
    inputs = make_inputs(op, SMALL[op], torch.float32, DEVICE)
    last = list(inputs)[-1]
    with pytest.raises(ValueError, match="meta"):
        function(**inputs | {last: inputs[last].to("meta")})


def test_rows_wider_than_a_program_are_refused():
    with pytest.raises(ValueError, match="up to 8192 channels, got 8193"):
        get_kernel("rms_norm", "fused", "triton")(torch.zeros(1, 8193, device=DEVICE), torch.zeros(8193, device=DEVICE))


@pytest.mark.parametrize("op", ["rms_norm", "head_norm_gate"])
def test_without_eps_is_refused(op):
    with pytest.raises(ValueError, match="eps above 0, got 0"):
        get_kernel(op, "fused", "triton")(**make_inputs(op, SMALL[op], torch.float32, DEVICE), eps=0.0)
