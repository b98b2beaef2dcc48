"""The fused decoding step against the recurrent form in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from xlstm_scaling.kernels import get_kernel
from xlstm_scaling.kernels.mlstm.state import RESET_FORGET, MLSTMState
from xlstm_scaling.kernels.mlstm.step_triton import mlstm_step_triton
from xlstm_scaling.kernels.triton_launch import INTERPRETED, TARGETS, configured, recording

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and Triton was imported to compile (TRITON_INTERPRET is not 1)", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
THRESHOLD = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 6e-3}
mlstm_step = get_kernel("mlstm", "step", "torch")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def rms_error(a, b):
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-6)).item()


def inputs(T, B, H, d_qk, d_v, dtype, gate_scale=2.0, gate_dtype=torch.float32):
    """T tokens (T first), their gates, rounded to their dtypes."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(T, B, H, d_qk, generator=g) for _ in range(2))
    v = torch.randn(T, B, H, d_v, generator=g)
    i = gate_scale * torch.randn(T, B, H, generator=g)
    f = 2 + gate_scale * torch.randn(T, B, H, generator=g)
    return [*(x.to(DEVICE, dtype) for x in (q, k, v)), i.to(DEVICE, gate_dtype), f.to(DEVICE, gate_dtype)]


def empty_state(B, H, d_qk, d_v, dtype=torch.float32):
    kwargs = {"dtype": dtype, "device": DEVICE}
    return MLSTMState(torch.zeros(B, H, d_qk, d_v, **kwargs), torch.zeros(B, H, d_qk, **kwargs),
                      torch.zeros(B, H, **kwargs))  # fmt: skip


def decode(step, x, state):
    """(outputs, states) of every token; states are copied, as C may be updated in place."""
    outputs, states = [], []
    for token in zip(*x):
        h, state = step(*token, state)
        outputs.append(h)
        states.append(MLSTMState(*(y.clone() for y in state)))
    return torch.stack(outputs), states


def check(x, shape, dtype, **configuration):
    expected, expected_states = decode(mlstm_step, [y.double() for y in x], empty_state(*shape, torch.float64))
    reference, _ = decode(mlstm_step, x, empty_state(*shape))
    with configured({"mlstm_step_kernel": configuration}):
        got, states = decode(mlstm_step_triton, x, empty_state(*shape))
    assert got.dtype == dtype
    error = rms_error(got, expected)
    assert error <= THRESHOLD[dtype]
    assert error <= max(2 * rms_error(reference, expected), THRESHOLD[dtype] / 10)
    for state, exact in zip(states, expected_states):  # fp32 arithmetic whatever the inputs
        for name, a, b in zip(MLSTMState._fields, state, exact):
            assert rms_error(a, b) <= 2e-5, name


@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 24, 65), (1, 2, 65, 24)], ids=str)
def test_twenty_tokens(shape, dtype):
    check(inputs(20, *shape, dtype), shape, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 16, 32), (1, 2, 512, 40)], ids=str)
def test_other_shapes(shape):
    check(inputs(3, *shape, torch.float32), shape, torch.float32)


def test_rows_of_the_memory_in_several_tiles():
    check(inputs(4, 2, 2, 40, 50, torch.float32), (2, 2, 40, 50), torch.float32, BLOCK_K=16, BLOCK_V=16, num_warps=1)


@pytest.mark.parametrize(("i", "f"), [(15, 15), (15, -15), (-15, 15), (-15, -15), (0, RESET_FORGET)])
def test_extreme_gates(i, f):
    shape = (1, 2, 24, 20)
    x = inputs(20, *shape, torch.float32)
    check([*x[:3], x[3] + i, x[4] + f], shape, torch.float32)


def test_gates_of_16_bits():
    check(inputs(3, 1, 2, 16, 16, torch.bfloat16, gate_dtype=torch.bfloat16), (1, 2, 16, 16), torch.bfloat16)


def test_strided_views():
    B, H, d_qk, d_v = 2, 3, 20, 36
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, 4, H * (2 * d_qk + d_v), generator=g).to(DEVICE)
    split = qkv.split([H * d_qk, H * d_qk, H * d_v], dim=-1)
    q, k, v = (x.view(B, 4, H, -1).transpose(1, 2)[:, :, 1] for x in split)
    i, f = torch.randn(B, 4, 2, H, generator=g).to(DEVICE).permute(2, 0, 3, 1)[..., 1]
    last_not_contiguous = torch.stack((k, k), -1)[..., 0]
    h, _ = mlstm_step(q, k, v, i, f, empty_state(B, H, d_qk, d_v))
    for key in (k, last_not_contiguous):
        got, _ = mlstm_step_triton(q, key, v, i, f, empty_state(B, H, d_qk, d_v))
        assert rms_error(got, h) < 2e-6


def test_memory_in_place_and_the_rest_in_new_tensors():
    q, k, v, i, f = (y[0] for y in inputs(1, 1, 2, 16, 40, torch.float32))
    state = empty_state(1, 2, 16, 40)
    _, new = mlstm_step_triton(q, k, v, i, f, state)
    assert new.C is state.C
    assert new.C.abs().min() > 0
    # other programs may still read the old n and m
    assert new.n.data_ptr() != state.n.data_ptr()
    assert new.m.data_ptr() != state.m.data_ptr()
    assert state.n.abs().max() == 0
    assert state.m.abs().max() == 0


def test_the_same_in_every_run():
    x = [y[0] for y in inputs(1, 2, 2, 24, 65, torch.bfloat16)]
    runs = [mlstm_step_triton(*x, empty_state(2, 2, 24, 65)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


def test_one_launch_that_fills_the_device_at_small_batches():
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    state = MLSTMState(*(empty(*s, dtype=torch.float32) for s in ((1, 8, 256, 512), (1, 8, 256), (1, 8))))
    with recording(TARGETS["sm_90"]) as launches:
        q, k, v, i, f = empty(1, 8, 256), empty(1, 8, 256), empty(1, 8, 512), empty(1, 8), empty(1, 8)
        h, _ = mlstm_step_triton(q, k, v, i, f, state)
    assert h.shape == (1, 8, 512)
    assert [x.name for x in launches] == ["mlstm_step_kernel"]
    assert launches[0].grid[0] >= 128


def test_a_gradient_is_refused():
    x = [y[0] for y in inputs(1, 1, 1, 8, 8, torch.float32)]
    x[2].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        mlstm_step_triton(*x, empty_state(1, 1, 8, 8))
    with torch.no_grad():
        mlstm_step_triton(*x, empty_state(1, 1, 8, 8))


def test_what_does_not_fit_is_refused():
    q, k, v, i, f = (y[0] for y in inputs(1, 2, 2, 8, 12, torch.float32))
    state = empty_state(2, 2, 8, 12)
    for bad in ((q, k[..., :4], v, i, f), (q, k, v[:1], i, f), (q, k, v, i[..., None], f), (q[0], k, v, i, f)):
        with pytest.raises(ValueError, match="shapes"):
            mlstm_step_triton(*bad, state)
    with pytest.raises(ValueError, match="shapes"):
        mlstm_step_triton(q, k, v, i, f, empty_state(2, 2, 12, 8))
    with pytest.raises(ValueError, match="fp32"):
        mlstm_step_triton(q, k, v, i, f, MLSTMState(*(y.double() for y in state)))
    with pytest.raises(ValueError, match="fp32"):
        mlstm_step_triton(q, k.bfloat16(), v, i, f, state)
    with pytest.raises(ValueError, match="contiguous"):
        mlstm_step_triton(q, k, v, i, f, state._replace(C=state.C.mT.contiguous().mT))
    with pytest.raises(ValueError, match="tensors here, got"):
        mlstm_step_triton(q.to("meta"), k, v, i, f, state)
