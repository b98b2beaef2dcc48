"""The mLSTMs for CPUs, in PyTorch and in C++: equal to the definition in values and gradients, in all dtypes, at any
length, with any gates."""

import pytest
import torch

from xlstm_scaling.kernels import get_kernel
from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.kernels.mlstm import chunkwise_cpu
from xlstm_scaling.kernels.mlstm.gates import RANGE, chunk_gates
from xlstm_scaling.kernels.mlstm.state import RESET_FORGET, MLSTMState

recurrent, parallel, chunkwise = (get_kernel("mlstm", form) for form in ("recurrent", "parallel", "chunkwise"))
INPUTS, STATE = ("q", "k", "v", "i", "f"), ("C", "n", "m")
OUTPUTS = ("h", "last C", "last n", "last m")
mlstm_for_cpus = get_kernel("mlstm", "chunkwise", "cpu")  # or another: _kernel
THRESHOLDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True, params=["cpu", "cpp"])
def _kernel(request, monkeypatch):
    """Every test runs with each of them, as ``mlstm_for_cpus``."""
    if request.param == "cpp" and not build.usable("mlstm"):
        pytest.skip("no C++ compiler")
    monkeypatch.setitem(globals(), "mlstm_for_cpus", get_kernel("mlstm", "chunkwise", request.param))


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def rms_error(x, reference):
    difference = (x.double() - reference).square().mean().sqrt()
    return (difference / reference.square().mean().sqrt().clamp_min(1e-30)).item()


def draw(T, d_qk=8, d_v=12, B=2, H=3, i=(3.0, 0.5), f=(3.0, 2.0), seed=0):
    """q and k share a mean direction: n·q stays away from 0, where no dtype is exact. float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    direction = normal(B, H, 1, d_qk).sign()
    q, k = direction * (1.2 + 0.2 * normal(B, H, T, d_qk)), direction * (0.3 + 0.6 * normal(B, H, T, d_qk))
    gates = (mean + spread * normal(B, H, T) for mean, spread in (i, f))
    return [q, k, normal(B, H, T, d_v), *gates]


def past(d_qk=8, d_v=12, B=2, H=3):
    """A state that 40 tokens leave behind."""
    return MLSTMState(*recurrent(*draw(40, d_qk, d_v, B, H, seed=7))[1])


def cast(x, dtype):
    """q, k, v in a dtype, gates in fp32; as in the model q, k, v are views of one tensor."""
    if dtype == torch.float64:
        return list(x)
    B, H, T, _ = x[0].shape
    product = torch.cat([y.transpose(1, 2).reshape(B, T, -1) for y in x[:3]], -1).to(dtype)
    parts = product.split([y.shape[-1] * H for y in x[:3]], -1)
    return [y.view(B, T, H, -1).transpose(1, 2) for y in parts] + [y.float() for y in x[3:]]


def cotangents(h, last, seed=3):
    """Random, with a part along h, of the size of each output."""
    g = torch.Generator().manual_seed(seed)
    random = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in (h, *last)]
    size = [y.double().square().mean().sqrt() + 1e-6 for y in (h, *last)]
    return [random[0] + 0.3 * h / size[0], *(r / s for r, s in zip(random[1:], size[1:]))]


def evaluate(kernel, x, state, weights, **options):
    """Outputs and gradients by name; the weights are cotangents of h, C, n, m, None for none."""
    x = [y.detach().clone().requires_grad_() for y in x]
    state = None if state is None else MLSTMState(*(y.detach().clone().requires_grad_() for y in state))
    h, last = kernel(*x, state, **options)
    outputs = (h, *last)
    named = {name: y.detach() for name, y in zip(OUTPUTS, outputs)}
    if weights is not None:
        wanted = [(y, w.to(y.dtype)) for y, w in zip(outputs, weights) if w is not None]
        leaves = x + (list(state) if state else [])
        grads = torch.autograd.grad([y for y, _ in wanted], leaves, [w for _, w in wanted], allow_unused=True)
        named |= {f"d{name}": grad for name, grad in zip(INPUTS + STATE, grads) if grad is not None}
    return named


def compare(x, dtype, state=None, of_h_only=False, names=None, **options):
    """Errors of the CPU kernel and of the PyTorch reference in a dtype against float64, by name."""
    low = cast(x, dtype)
    state_low = None if state is None else MLSTMState(*(y.to(low[3].dtype) for y in state))
    exact = [y.double() for y in low]
    state = None if state is None else MLSTMState(*(y.double() for y in state_low))
    T = x[0].shape[2]
    oracle = recurrent if T < 70 else parallel if T < 600 else chunkwise
    h, last = oracle(*exact, state)
    weights = cotangents(h, last)
    weights = [weights[0].to(dtype).double(), *(None if of_h_only else w for w in weights[1:])]
    expected = evaluate(oracle, exact, state, weights)
    found = evaluate(mlstm_for_cpus, low, state_low, weights, **options)
    reference = evaluate(chunkwise, low, state_low, weights)
    assert found.keys() == expected.keys()
    assert all(torch.isfinite(y).all() for y in found.values())
    names = names or found
    return {n: (rms_error(found[n], expected[n]), rms_error(reference[n], expected[n])) for n in names}


def check(errors, dtype):
    """Below the threshold of the dtype, or where PyTorch is not, at most twice its error."""
    for name, (error, reference) in errors.items():
        assert error <= max(THRESHOLDS[dtype], 2 * reference), f"{name}: {error:.2g}, PyTorch {reference:.2g}"


@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65, 150])
@pytest.mark.parametrize("with_state", [False, True])
def test_float64_equals_the_definition(T, with_state):
    check(compare(draw(T), torch.float64, past() if with_state else None, chunk_size=32), torch.float64)


@pytest.mark.parametrize("chunk", [1, 5, 16, 64, 1000])
def test_any_chunk_size_gives_the_same(chunk):
    check(compare(draw(77), torch.float64, past(), chunk_size=chunk), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_state", [False, True])
def test_groups_of_chunks_give_the_same(monkeypatch, dtype, with_state):
    """A long sequence runs in groups, the last one shorter than the others."""
    monkeypatch.setattr(chunkwise_cpu, "GROUP_BYTES", 3 * 2 * 16 * 16 * dtype.itemsize)
    x = draw(290, d_qk=32, d_v=64, B=1, H=2)
    errors = compare(x, dtype, past(32, 64, 1, 2) if with_state else None, chunk_size=16)
    check(errors, dtype)


def test_gradcheck_of_all_eight_inputs():
    x = [y.requires_grad_() for y in draw(11, d_qk=2, d_v=3, B=1, H=1)]
    state = [y.requires_grad_() for y in past(2, 3, 1, 1)]

    def function(*args):
        h, last = mlstm_for_cpus(*args[:5], MLSTMState(*args[5:]), chunk_size=4)
        return h, *last

    assert torch.autograd.gradcheck(function, x + state, atol=1e-6)


def test_the_gradient_through_eps_and_m():
    """With inputs wide open and small products the eps of the normaliser is no small part of it."""
    x = draw(40, i=(14.0, 0.5), f=(4.0, 1.0))
    x[0] *= 1e-6
    errors = compare(x, torch.float64, past(), chunk_size=16)
    check(errors, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "d_qk", "d_v", "f"),
    [
        (201, 16, 32, (4, 1)),
        (70, 20, 37, (4, 1)),
        (70, 512, 256, (4, 1)),
        (200, 64, 128, (4, 1)),
        (130, 48, 24, (8, 1)),
        (90, 64, 128, (0, 2)),
        (13, 32, 64, (4, 1)),
    ],
)
def test_rounded_dtypes_are_close_to_float64(dtype, T, d_qk, d_v, f):
    check(compare(draw(T, d_qk, d_v, 2, 2, f=f), dtype), dtype)
    check(compare(draw(T, d_qk, d_v, 2, 2, f=f), dtype, past(d_qk, d_v, 2, 2)), dtype)


def test_float16_runs_in_fp32():
    x = draw(100, 16, 32)
    errors = compare(x, torch.float16)
    assert max(error for error, _ in errors.values()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("i", "f"), [(15.0, 15.0), (-15.0, 15.0), (15.0, -15.0), (-15.0, -15.0)])
def test_extreme_gates(dtype, i, f):
    """All open, all closed. With a closed forget gate what h takes from the gates, q and k is a small difference."""
    x = draw(131, 64, 128, 1, 2)
    x[3].fill_(i), x[4].fill_(f)
    names = None if f > 0 else ("h", *OUTPUTS[1:], "dv")
    check(compare(x, dtype, of_h_only=True, names=names), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_at_random_between_the_extremes(dtype):
    x = draw(200, 64, 128, 1, 2, i=(0, 8), f=(0, 8))
    x[3].clamp_(-15, 15), x[4].clamp_(-15, 15)
    check(compare(x, dtype), dtype)


def test_steep_gates_shorten_chunks_and_hard_resets_do_not():
    closed = torch.full((1, 128), -15.0)
    gates = chunk_gates(torch.zeros(1, 128), closed, None, 64, 1.0)
    assert 64 % gates.chunk_size == 0
    assert gates.chunk_size * 15 <= RANGE
    reset = torch.full((1, 128), 4.0)
    reset[0, 70] = -1e6
    assert chunk_gates(torch.zeros(1, 128), reset, None, 64, 1.0).chunk_size == 64
    x = draw(100)
    x[4][:, :, 70] = -1e4
    check(compare(x, torch.float64, past()), torch.float64)


def test_masked_inputs_and_document_starts():
    """i = -inf leaves a token out; a reset gives the output of the second document alone."""
    x = draw(150, 16, 32)
    x[3][:, :, 20:40] = -torch.inf
    check({n: e for n, e in compare(x, torch.float32).items() if n != "di"}, torch.float32)
    for start in (0, 31, 63, 64, 100):
        x[4][:, :, start] = RESET_FORGET
    check(compare(x, torch.float32), torch.float32)
    alone, _ = mlstm_for_cpus(*(y[:, :, 100:] for y in x))
    assert rms_error(mlstm_for_cpus(*x)[0][:, :, 100:], alone) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_sequence_of_one_head(dtype):
    """Certification has 65,536 tokens."""
    x = draw(4096, 32, 32, 1, 1, f=(8.0, 1.0))
    check(compare(x, dtype, of_h_only=True), dtype)


@pytest.mark.parametrize("splits", [(1,), (31, 99), (64, 65, 130)])
def test_states_handed_over(splits):
    """The pieces' outputs and gradients are the whole's."""
    x = draw(150)
    whole = [y.clone().requires_grad_() for y in x]
    pieces = [y.clone().requires_grad_() for y in x]
    h, last = mlstm_for_cpus(*whole)
    outputs, state = [], None
    for start, end in zip((0, *splits), (*splits, 150)):
        part, state = mlstm_for_cpus(*(y[:, :, start:end] for y in pieces), state)
        outputs.append(part)
    weights = cotangents(h.detach(), [y.detach() for y in last])
    for a, b in zip((torch.cat(outputs, 2), *state), (h, *last)):
        assert rms_error(a, b) < 1e-12
    expected = torch.autograd.grad((h, *last), whole, weights)
    found = torch.autograd.grad((torch.cat(outputs, 2), *state), pieces, weights)
    for name, a, b in zip(INPUTS, found, expected):
        assert rms_error(a, b) < 1e-9, name


def test_only_what_is_asked_for():
    x, state = draw(70), past()
    with torch.no_grad():
        h, last = mlstm_for_cpus(*x, state)
    assert not h.requires_grad
    expected, _ = recurrent(*x, state)
    assert rms_error(h, expected) < 1e-12
    v = x[2].clone().requires_grad_()
    h, _ = mlstm_for_cpus(x[0], x[1], v, x[3], x[4], state)
    (h * expected).sum().backward()
    assert torch.isfinite(v.grad).all()
    # a graph that is kept gives the same gradients again
    f = x[4].clone().requires_grad_()
    h, last = mlstm_for_cpus(*x[:4], f, state)
    total = h.square().sum() + last.C.sum()
    first, second = (torch.autograd.grad(total, f, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    state_only = torch.autograd.grad(last.m.sum(), f)[0]
    assert torch.isfinite(state_only).all()


def test_layouts():
    """Contiguous inputs get contiguous gradients; views of one product come out as (B, T, H, d)."""
    x = cast(draw(70), torch.float32)
    contiguous = [y.contiguous().requires_grad_() for y in x]
    views = [y.detach().requires_grad_() for y in x]
    outputs = [mlstm_for_cpus(*y)[0] for y in (contiguous, views)]
    assert outputs[0].is_contiguous()
    assert outputs[1].transpose(1, 2).is_contiguous()
    assert torch.equal(*outputs)
    expanded = torch.ones(1, 1, 1, 1).expand_as(outputs[0])
    grads = [torch.autograd.grad(h, y, expanded) for h, y in zip(outputs, (contiguous, views))]
    for name, a, b in zip(INPUTS, *grads):
        assert rms_error(a, b.double()) < 1e-6, name


def test_bits_do_not_depend_on_threads():
    x = cast(draw(150, 32, 48), torch.float32)
    weights = None
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            weights = weights or cotangents(*mlstm_for_cpus(*x))
            found.append(evaluate(mlstm_for_cpus, x, None, weights))
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        # the gates are PyTorch's, which divides long sums among threads
        assert all(rms_error(other[name], y) < 1e-6 for name, y in found[0].items())


def test_bad_arguments_are_named():
    q, k, v, i, f = draw(8)
    with pytest.raises(ValueError, match=r"'i': \(2, 3, 7\)"):
        mlstm_for_cpus(q, k, v, i[..., :7], f)
    with pytest.raises(ValueError, match="chunk_size = 0"):
        mlstm_for_cpus(q, k, v, i, f, chunk_size=0)


@pytest.mark.parametrize("backend", ["native_custbw", "native_autograd"])
def test_agrees_with_mlstm_kernels(backend):
    """The authors' kernels in PyTorch. custbw leaves out the gradient of the normaliser: only h and dv compare."""
    package = pytest.importorskip("mlstm_kernels.torch")
    kernel = package.get_mlstm_kernel(f"chunkwise--{backend}")
    x = [y.float().contiguous() for y in draw(128, 16, 32)]
    mine, theirs = ([y.clone().requires_grad_() for y in x] for _ in range(2))
    h, _ = mlstm_for_cpus(*mine)
    other = kernel(*theirs, chunk_size=64)
    assert rms_error(h.detach(), other.detach().double()) < 1e-5
    weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    found, expected = (torch.autograd.grad(y, z, weight) for y, z in ((h, mine), (other, theirs)))
    names = INPUTS if backend == "native_autograd" else ("v",)
    for name in names:
        place = INPUTS.index(name)
        assert rms_error(found[place], expected[place].double()) < 1e-4, name
