"""The fused head and loss for GPUs against the plain one in float64."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from xlstm_scaling.kernels import cross_entropy_triton
from xlstm_scaling.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from xlstm_scaling.kernels.cross_entropy_triton import _soft_cap, linear_cross_entropy_triton, rows_at_once
from xlstm_scaling.kernels.triton_launch import INTERPRETED, TARGETS, configured, recording

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and Triton was imported to compile (TRITON_INTERPRET is not 1)", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
THRESHOLD = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 6e-3}
NAMES = ("loss", "d_hidden", "d_weight")
KERNEL = "softmax_cross_entropy_kernel"


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def rms_error(a, b):
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


def problem(M, V, d, dtype=torch.float32, spread=3.0):
    """Logits of about ``spread``; hidden rounded to ``dtype``."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, d, generator=g).to(DEVICE, dtype)
    weight = (torch.randn(V, d, generator=g) * spread / d**0.5).to(DEVICE)
    return hidden, weight, torch.randint(V, (M,), generator=g).to(DEVICE)


def with_gradients(function, hidden, weight, targets, cap):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, targets, cap)
    return loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight))


def check(hidden, weight, targets, cap):
    dtype = hidden.dtype
    expected = with_gradients(linear_cross_entropy_reference, hidden.double(), weight.double(), targets, cap)
    reference = with_gradients(linear_cross_entropy, hidden, weight, targets, cap)
    got = with_gradients(linear_cross_entropy_triton, hidden, weight, targets, cap)
    assert [x.dtype for x in got] == [torch.float32, dtype, torch.float32]
    for name, a, torch_a, b in zip(NAMES, got, reference, expected):
        error = rms_error(a, b)
        assert error <= THRESHOLD[dtype], name
        assert error <= max(2 * rms_error(torch_a, b), THRESHOLD[dtype] / 10), name
    return got


@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
@pytest.mark.parametrize("cap", [None, 30.0, 100.0])
@pytest.mark.parametrize(("M", "V", "d"), [(1, 63, 24), (37, 1000, 65)])
def test_loss_and_gradients(M, V, d, cap, dtype):
    check(*problem(M, V, d, dtype), cap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [None, 30.0])
def test_several_chunks_of_tokens_and_blocks_of_the_vocabulary(monkeypatch, cap, dtype):
    monkeypatch.setattr(cross_entropy_triton, "MIN_LOGIT_ROWS", 4)
    monkeypatch.setattr(cross_entropy_triton, "LOGITS_BYTES", 256 * (4 * 4 + 16 * dtype.itemsize))
    assert rows_at_once(200, dtype.itemsize) == (4, 16)
    hidden, weight, targets = problem(25, 200, 24, dtype)  # 16 and 9 tokens, by 4
    with configured({KERNEL: {"BLOCK_V": 64, "num_warps": 1}}):
        check(hidden, weight, targets, cap)


@triton.jit
def soft_cap_kernel(x, capped, slope, cap, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    c, s = _soft_cap(tl.load(x + index), cap, True)
    tl.store(capped + index, c)
    tl.store(slope + index, s)


@pytest.mark.parametrize("cap", [2.0, 30.0, 1000.0])
def test_soft_cap_keeps_digits_of_tiny_and_huge_logits(cap):
    x = torch.logspace(-30, 3, 2048)
    x = torch.cat((x, -x)).to(DEVICE)
    capped, slope = torch.empty_like(x), torch.empty_like(x)
    soft_cap_kernel[(1,)](x, capped, slope, cap, SIZE=x.numel())
    tanh = (x.double() / cap).tanh()
    exact_slope = torch.cosh((x.double() / cap).clamp(-40, 40)) ** -2
    visible = exact_slope > 1e-30
    assert (capped.double() / (cap * tanh) - 1).abs().max() < 1e-6
    assert (slope.double() / exact_slope - 1)[visible].abs().max() < 2e-5  # the exponent of a large x is rounded


def test_logits_at_and_far_beyond_the_cap():
    hidden = torch.full((4, 8), 100.0, device=DEVICE)
    weight = torch.cat((torch.ones(50, 8), -torch.ones(50, 8))).to(DEVICE)
    targets = torch.tensor([0, 1, 60, 99], device=DEVICE)
    loss, d_hidden, d_weight = with_gradients(linear_cross_entropy_triton, hidden, weight, targets, 30.0)
    assert loss.item() == pytest.approx(math.log(50) + 30, rel=1e-6)
    assert torch.isfinite(d_hidden).all()
    assert torch.isfinite(d_weight).all()
    got = check(hidden, weight, targets, None)  # 800 nats apart: exp would overflow
    assert got[0].item() == pytest.approx(math.log(50) + 800, rel=1e-6)


def test_saturated_logits_have_an_exact_gradient():
    weight = torch.linspace(4, 6, 60, device=DEVICE)[:, None]
    weight[::3] *= -1
    check(torch.ones(3, 1, device=DEVICE), weight, torch.tensor([0, 1, 59], device=DEVICE), 1.0)  # 1 − tanh² ~ 1e-4


def test_a_target_outside_the_vocabulary_is_nan():
    hidden, weight, targets = problem(3, 63, 24)
    for bad in (63, -1, 2**40):
        targets[1] = bad
        assert linear_cross_entropy_triton(hidden, weight, targets, 30.0).isnan()


def test_gradients_only_of_what_needs_them(monkeypatch):
    hidden, weight, targets = problem(5, 63, 24)
    loss, d_hidden, d_weight = with_gradients(linear_cross_entropy_triton, hidden, weight, targets, 30.0)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    one = linear_cross_entropy_triton(h, weight, targets, 30.0)
    assert torch.equal(torch.autograd.grad(3 * one, h)[0], d_hidden)
    other = linear_cross_entropy_triton(hidden, w, targets, 30.0)
    assert torch.equal(torch.autograd.grad(3 * other, w)[0], d_weight)
    with torch.no_grad():
        none = linear_cross_entropy_triton(h, w, targets, 30.0)
    assert not none.requires_grad
    assert loss == one == other == none


def test_backward_twice_and_the_same_in_every_run():
    hidden, weight, targets = problem(5, 63, 24, torch.bfloat16)
    hidden.requires_grad_()
    loss = linear_cross_entropy_triton(hidden, weight, targets, None)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)
    again = linear_cross_entropy_triton(hidden, weight, targets, None)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again, hidden)[0], first)


@pytest.mark.parametrize("gradient_bytes", [0, 2, 4])
@pytest.mark.parametrize("V", [5, 1000, 50_257, 50_304, 262_144, 5_000_000])
def test_rows_at_once_keep_to_the_memory(V, gradient_bytes):
    logit_rows, rows = rows_at_once(V, gradient_bytes)
    assert 1 <= logit_rows <= rows
    assert rows % logit_rows == 0
    assert V * (4 * logit_rows + gradient_bytes * rows) <= cross_entropy_triton.LOGITS_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_does_not_grow_with_the_tokens(dtype):
    M, V, d = 65_536, 50_257, 768  # M V is beyond 32 bits
    hidden = torch.empty(M, d, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(V, d, device="meta", requires_grad=True)
    with recording(TARGETS["sm_90"]) as launches:
        loss = linear_cross_entropy_triton(hidden, weight, torch.empty(M, dtype=torch.int64, device="meta"), 30.0)
        loss.backward()
    assert hidden.grad.dtype == dtype
    assert weight.grad.dtype == torch.float32
    assert sum(x.grid[0] for x in launches) == M
    names = ("logits", "gradient")
    for launch in launches:
        used = sum(launch.arguments[name].untyped_storage().nbytes() for name in names)
        assert used <= cross_entropy_triton.LOGITS_BYTES


def test_what_does_not_fit_is_refused():
    hidden, weight, targets = problem(5, 63, 24)
    for bad in ((hidden[:, :20], weight, targets), (hidden, weight, targets[:4]), (hidden[0], weight, targets),
                (hidden[:0], weight, targets[:0])):  # fmt: skip
        with pytest.raises(ValueError, match=r"takes hidden \(M, d\)"):
            linear_cross_entropy_triton(*bad, 30.0)
    for bad in ((hidden.double(), weight, targets), (hidden, weight, targets.int())):
        with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
            linear_cross_entropy_triton(*bad, 30.0)
    for cap in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            linear_cross_entropy_triton(hidden, weight, targets, cap)
    with pytest.raises(ValueError, match="tensors here, got"):
        linear_cross_entropy_triton(hidden.to("meta"), weight, targets, 30.0)
