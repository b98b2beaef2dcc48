"""The Triton mLSTM, forward and backward, against float64 and against an independent implementation."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from xlstm_scaling.kernels.mlstm.chunkwise import mlstm_chunkwise
from xlstm_scaling.kernels.mlstm.chunkwise_triton import mlstm_chunkwise_triton
from xlstm_scaling.kernels.mlstm.recurrent import mlstm_recurrent
from xlstm_scaling.kernels.mlstm.state import RESET_FORGET, MLSTMState
from xlstm_scaling.kernels.triton_launch import INTERPRETED, configured

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and Triton was imported to compile (TRITON_INTERPRET is not 1)", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
THRESHOLD = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 6e-3}
NAMES = ("h", "C", "n", "m", "dq", "dk", "dv", "di", "df", "dC", "dn", "dm")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def gates(kind, shape, g):
    noise = torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)
    return {
        "usual": lambda: (noise[0], 3 + noise[1]),
        "initial": lambda: (noise[0] - 10, 4.5 + noise[1]),
        "wide": lambda: (4 * noise[0], 4 * noise[1]),
        "extreme": lambda: (15 * noise[0].sign(), 15 * noise[1].sign()),
        "open": lambda: (torch.full(shape, -1.0), torch.full(shape, 15.0)),
        "closed": lambda: (torch.full(shape, -15.0), torch.full(shape, -15.0)),
    }[kind]()


def problem(B, H, T, d_qk, d_v, dtype, kind="usual", with_state=True, seed=0):
    """Inputs, initial state and a gradient for every output; q, k, v lie as (B, T, H, d), as in the model."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, H, d, generator=g).to(DEVICE, dtype).transpose(1, 2) for d in (d_qk, d_qk, d_v))
    i, f = (x.to(DEVICE) for x in gates(kind, (B, H, T), g))
    shapes = ((B, H, d_qk, d_v), (B, H, d_qk), (B, H))
    state = [torch.randn(*shape, generator=g).to(DEVICE) for shape in shapes] if with_state else None
    gradients = [torch.randn(*shape, generator=g).to(DEVICE) for shape in ((B, H, T, d_v), *shapes)]
    return [q, k, v, i, f], state, gradients


def results(function, inputs, state, gradients, dtype=None, **options):
    """Every output and every gradient by name; gradients that are None are left out."""
    copies = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (*inputs, *(state or ()))]
    h, last = function(*copies[:5], MLSTMState(*copies[5:]) if state else None, **options)
    outputs = [h, *last]
    loss = sum((x.double() * g.double()).sum() for x, g in zip(outputs, gradients) if g is not None)
    found = torch.autograd.grad(loss, copies, allow_unused=True)
    return dict(zip(NAMES, [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(copies, found))]))


def rms_error(x, reference):
    x, reference = x.detach().double(), reference.detach().double()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def assert_certified(inputs, state, gradients, like_reference=False, **options):
    """Each tensor within the threshold of its dtype of float64.

    The gradient of the first m is one number a head, a sum over all tokens that nearly cancels: where products are
    rounded to 16 bits it is compared with what the PyTorch reference makes of it.
    """
    dtype = inputs[0].dtype
    expected = results(mlstm_recurrent, inputs, state, gradients, torch.float64)
    found = results(mlstm_chunkwise_triton, inputs, state, gradients, **options)
    peer = None
    for name, reference in expected.items():
        assert torch.isfinite(found[name]).all(), name
        error, threshold = rms_error(found[name], reference), THRESHOLD[dtype]
        if like_reference or (name == "dm" and dtype != torch.float32):
            peer = peer or results(mlstm_chunkwise, inputs, state, gradients)
            threshold = max(threshold, 2 * rms_error(peer[name], reference))
        assert error < threshold, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("T", "chunk_size"), [(1, None), (13, None), (64, 64), (101, 64), (130, 1024)], ids=str)
def test_any_length(T, chunk_size):
    assert_certified(*problem(1, 2, T, 16, 24, torch.float32), chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "chunk_size"), [(13, None), (100, 128)], ids=str)
def test_sixteen_bits(T, chunk_size, dtype):
    assert_certified(*problem(1, 2, T, 32, 48, dtype), chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["initial", "wide", "extreme", "open", "closed"])
def test_gates(kind, dtype):
    """Where input gates are open a sum of random products can come near 0 and the normaliser has no floor: then any
    implementation loses digits, ours no more than the PyTorch reference."""
    inputs, _, gradients = problem(1, 1, 100, 16, 32, dtype, kind, with_state=False)
    assert_certified(inputs, None, [gradients[0], None, None, None], like_reference=True, chunk_size=64)


@pytest.mark.parametrize("kind", ["initial", "closed"])
def test_gates_with_state(kind):
    assert_certified(*problem(1, 2, 100, 16, 32, torch.float32, kind), chunk_size=64)


@pytest.mark.parametrize(("d_qk", "d_v"), [(16, 16), (24, 72), (96, 40), (160, 16), (16, 300), (512, 512)])
def test_head_dimensions(d_qk, d_v):
    assert_certified(*problem(1, 1, 20, d_qk, d_v, torch.float32), chunk_size=16)


def test_without_state_and_gradient_of_the_output_alone():
    inputs, _, gradients = problem(2, 2, 90, 16, 16, torch.float32, with_state=False)
    assert_certified(inputs, None, [gradients[0], None, None, None], chunk_size=32)


def test_gradient_of_the_last_state_alone():
    inputs, state, gradients = problem(1, 1, 70, 16, 16, torch.float32)
    assert_certified(inputs, state, [None, *gradients[1:]], chunk_size=32)
    assert_certified(inputs, state, [None, None, None, gradients[3]], chunk_size=32)


@pytest.mark.parametrize("split", [1, 37])
def test_handing_over_the_state_changes_nothing(split):
    inputs, state, gradients = problem(1, 1, 70, 16, 16, torch.float32)

    def in_two(q, k, v, i, f, state, **options):
        first, second = ([x[:, :, part] for x in (q, k, v, i, f)] for part in (slice(split), slice(split, None)))
        h1, state = mlstm_chunkwise_triton(*first, state, **options)
        h2, state = mlstm_chunkwise_triton(*second, state, **options)
        return torch.cat([h1, h2], 2), state

    expected = results(mlstm_recurrent, inputs, state, gradients, torch.float64)
    for name, x in results(in_two, inputs, state, gradients, chunk_size=32).items():
        assert rms_error(x, expected[name]) < THRESHOLD[torch.float32], name


def test_documents_do_not_see_each_other():
    inputs, _, gradients = problem(1, 1, 100, 16, 16, torch.float32, with_state=False)
    inputs[4][:, :, 50] = RESET_FORGET
    whole, _ = mlstm_chunkwise_triton(*inputs, chunk_size=64)
    alone, _ = mlstm_chunkwise_triton(*(x[:, :, 50:] for x in inputs), chunk_size=64)
    assert rms_error(whole[:, :, 50:], alone) < 1e-5
    assert_certified(inputs, None, gradients, chunk_size=64)


def test_padding_does_not_reach_the_state():
    inputs, state, gradients = problem(1, 1, 70, 16, 16, torch.float32)
    short = results(mlstm_chunkwise_triton, inputs, state, gradients, chunk_size=64)
    for x in inputs:  # memory behind the sequence holds NaN
        longer = torch.full((*x.shape[:2], 128, *x.shape[3:]), torch.nan, dtype=x.dtype, device=x.device)
        longer[:, :, :70] = x
        x.set_(longer[:, :, :70])
    for name, x in results(mlstm_chunkwise_triton, inputs, state, gradients, chunk_size=64).items():
        assert torch.equal(x, short[name]), name


@pytest.mark.parametrize("blocks", [{"BK": 16, "BV": 16}, {"BK": 32, "BV": 64}])
def test_blocks_do_not_change_the_result(blocks):
    """Heads wider than a block: several programs share a head."""
    inputs, state, gradients = problem(1, 1, 40, 48, 80, torch.float32)
    kernels = ("states", "outputs", "state_gradients", "query_gradients", "key_gradients", "value_gradients")
    extra = {"outputs": {"BC": 16}, "query_gradients": {"BC": 16}, "key_gradients": {"BC": 16},
             "value_gradients": {"BC": 16}}  # fmt: skip
    with configured({f"mlstm_{name}": {**blocks, **extra.get(name, {})} for name in kernels}):
        assert_certified(inputs, state, gradients, chunk_size=32)


def test_repeats_bit_for_bit():
    x = problem(1, 1, 100, 16, 32, torch.bfloat16)
    first, second = (results(mlstm_chunkwise_triton, *x, chunk_size=64) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_against_an_independent_implementation():
    kernels = pytest.importorskip("mlstm_kernels.torch", reason="mlstm_kernels is not installed")
    peer = kernels.get_mlstm_kernel("chunkwise--native_autograd")

    def theirs(q, k, v, i, f, state, chunk_size):
        C, n, m = state
        h, (C, n, m) = peer(q, k, v, i, f, C, n, m[..., None], return_last_states=True, chunk_size=chunk_size)
        return h, MLSTMState(C, n, m[..., 0])

    for d_qk, d_v in ((16, 32), (32, 16)):
        x = problem(1, 2, 64, d_qk, d_v, torch.float32)
        expected = results(theirs, *x, dtype=torch.float64, chunk_size=16)
        for name, found in results(mlstm_chunkwise_triton, *x, chunk_size=64).items():
            assert rms_error(found, expected[name]) < 2e-5, name


def test_wrong_inputs_are_named():
    (q, k, v, i, f), state, _ = problem(1, 2, 20, 16, 16, torch.float32)
    with pytest.raises(ValueError, match="one dtype"):
        mlstm_chunkwise_triton(q.bfloat16(), k, v, i, f)
    with pytest.raises(ValueError, match="one dtype"):
        mlstm_chunkwise_triton(*(x.double() for x in (q, k, v, i, f)))
    with pytest.raises(ValueError, match="shapes"):
        mlstm_chunkwise_triton(q, k, v, i[..., :5], f)
    with pytest.raises(ValueError, match="state's shapes"):
        mlstm_chunkwise_triton(q, k, v, i, f, MLSTMState(state[0][:, :1], *state[1:]))
    with pytest.raises(ValueError, match="chunk_size"):
        mlstm_chunkwise_triton(q, k, v, i, f, chunk_size=4096)


def test_as_accurate_as_the_pytorch_reference():
    x = problem(1, 2, 130, 32, 32, torch.bfloat16)
    expected = results(mlstm_recurrent, *x, torch.float64)
    reference = results(mlstm_chunkwise, *x)
    for name, found in results(mlstm_chunkwise_triton, *x, chunk_size=128).items():
        assert rms_error(found, expected[name]) < 2 * rms_error(reference[name], expected[name]) + 1e-6, name
