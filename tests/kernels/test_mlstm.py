"""The forms of the mLSTM: equal to each other and to float64, for any T, with states handed over."""

import pytest
import torch

from xlstm_scaling.kernels import get_kernel, kernels
from xlstm_scaling.kernels.mlstm.state import RESET_FORGET, MLSTMState

FORMS = ["parallel", "chunkwise"]


def inputs(T, d_qk=8, d_v=12, B=2, H=3, dtype=torch.float64, seed=0, gate_scale=2.0):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, H, T, d_qk, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(B, H, T, d_v, generator=g, dtype=torch.float64)
    i = gate_scale * torch.randn(B, H, T, generator=g, dtype=torch.float64)
    f = 2 + gate_scale * torch.randn(B, H, T, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, i, f)]


def some_state(B=2, H=3, d_qk=8, d_v=12, seed=1):
    g = torch.Generator().manual_seed(seed)
    return MLSTMState(
        torch.randn(B, H, d_qk, d_v, generator=g, dtype=torch.float64),
        torch.randn(B, H, d_qk, generator=g, dtype=torch.float64),
        torch.randn(B, H, generator=g, dtype=torch.float64),
    )


def rms_error(a, b):
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-6)).item()


def unstabilised(q, k, v, i, f):
    """The cell as it is defined, without the max-state: C = f C + exp(i) k v^T (valid in float64 for small gates)."""
    B, H, T, d = q.shape
    C, n = torch.zeros(B, H, d, v.shape[-1], dtype=q.dtype), torch.zeros(B, H, d, dtype=q.dtype)
    outputs = []
    for t in range(T):
        forget, exp_i = torch.sigmoid(f[:, :, t])[..., None], torch.exp(i[:, :, t])[..., None]
        C = forget[..., None] * C + exp_i[..., None] * k[:, :, t, :, None] * v[:, :, t, None, :]
        n = forget * n + exp_i * k[:, :, t]
        q_t = q[:, :, t] / d**0.5
        denominator = (q_t * n).sum(-1).abs().clamp_min(1.0)
        outputs.append((q_t[..., None, :] @ C)[..., 0, :] / denominator[..., None])
    return torch.stack(outputs, 2)


def test_recurrent_is_the_definition():
    x = inputs(40, gate_scale=0.5)
    h, _ = get_kernel("mlstm", "recurrent")(*x)
    assert rms_error(h, unstabilised(*x)) < 1e-5  # they differ by the 1e-6 in the normaliser


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65, 150])
@pytest.mark.parametrize("with_state", [False, True])
def test_forms_agree_in_output_state_and_gradient(form, T, with_state):
    state = some_state() if with_state else None
    results = []
    for name in ("recurrent", form):
        x = [y.clone().requires_grad_() for y in inputs(T)]
        s = None if state is None else MLSTMState(*(y.clone().requires_grad_() for y in state))
        options = {"chunk_size": 32} if name == "chunkwise" else {}
        h, last = get_kernel("mlstm", name)(*x, s, **options)
        weight = torch.sin(torch.arange(h.numel(), dtype=h.dtype)).view_as(h)
        # C and n are relative to exp(m): compare what does not depend on where the maximum lies
        scale = torch.exp(last.m)
        total = (h * weight).sum() + (scale[..., None, None] * last.C).sum() + (scale[..., None] * last.n).sum()
        grads = torch.autograd.grad(total, x + (list(s) if s else []), allow_unused=True)
        results.append((h, last, grads))
    (h0, s0, g0), (h1, s1, g1) = results
    assert rms_error(h1, h0) < 1e-12
    for name, a, b in zip(MLSTMState._fields, s1, s0):
        assert rms_error(a, b) < 1e-12, name
    for name, a, b in zip(["q", "k", "v", "i", "f", "C", "n", "m"], g1, g0):
        assert rms_error(a, b) < 1e-9, f"gradient of {name}"


@pytest.mark.parametrize("chunk", [1, 5, 16, 64, 1000])
def test_any_chunk_size_gives_the_same(chunk):
    x = inputs(77)
    expected, last = get_kernel("mlstm", "recurrent")(*x)
    h, state = get_kernel("mlstm", "chunkwise")(*x, chunk_size=chunk)
    assert rms_error(h, expected) < 1e-12
    assert rms_error(state.C, last.C) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [1, 31, 64, 99])
def test_state_handed_over_at_a_split(form, split):
    x = inputs(100)
    kernel = get_kernel("mlstm", form)
    whole, last = kernel(*x)
    first, state = kernel(*(y[:, :, :split] for y in x))
    second, end = kernel(*(y[:, :, split:] for y in x), state)
    assert rms_error(torch.cat((first, second), 2), whole) < 1e-12
    assert rms_error(end.C, last.C) < 1e-12


@pytest.mark.parametrize("form", [*FORMS, "recurrent"])
@pytest.mark.parametrize(("i_value", "f_value"), [(15.0, 15.0), (-15.0, 15.0), (15.0, -15.0), (-15.0, -15.0)])
def test_extreme_gates_stay_finite_in_fp32(form, i_value, f_value):
    q, k, v, i, f = inputs(130, dtype=torch.float32)
    i, f = torch.full_like(i, i_value), torch.full_like(f, f_value)
    x = [y.requires_grad_() for y in (q, k, v, i, f)]
    h, _ = get_kernel("mlstm", form)(*x)
    reference, _ = get_kernel("mlstm", "recurrent")(*(y.detach().double() for y in x))
    assert torch.isfinite(h).all()
    # a normaliser close to zero amplifies rounding: then no form may be worse than twice the definition in fp32
    definition, _ = get_kernel("mlstm", "recurrent")(*(y.detach() for y in x))
    assert rms_error(h.double(), reference) < max(2e-5, 2 * rms_error(definition.double(), reference))
    for name, grad in zip("qkvif", torch.autograd.grad(h.square().sum(), x)):
        assert torch.isfinite(grad).all(), name


@pytest.mark.parametrize("form", FORMS)
def test_fp32_and_bf16_are_close_to_float64(form):
    x = inputs(200, d_qk=16, d_v=32)
    reference, _ = get_kernel("mlstm", "recurrent")(*x)
    h32, _ = get_kernel("mlstm", form)(*(y.float() for y in x))
    assert rms_error(h32.double(), reference) < 2e-5
    q, k, v = (y.bfloat16() for y in x[:3])
    rounded, _ = get_kernel("mlstm", "recurrent")(*(y.double() for y in (q, k, v)), *x[3:])
    h16, _ = get_kernel("mlstm", form)(q, k, v, *(y.float() for y in x[3:]))
    assert rms_error(h16.double(), rounded) < 2e-2


def test_a_closed_forget_gate_separates_documents():
    """After the reset the output is the one of the second document alone."""
    q, k, v, i, f = inputs(90, gate_scale=1.0)
    f[:, :, 50] = RESET_FORGET
    h, _ = get_kernel("mlstm", "chunkwise")(q, k, v, i, f, chunk_size=16)
    alone, _ = get_kernel("mlstm", "chunkwise")(*(y[:, :, 50:] for y in (q, k, v, i, f)), chunk_size=16)
    assert rms_error(h[:, :, 50:], alone) < 1e-6


def test_gradcheck_of_the_chunkwise_form():
    x = [y.requires_grad_() for y in inputs(11, d_qk=2, d_v=3, B=1, H=1)]
    function = get_kernel("mlstm", "chunkwise")
    assert torch.autograd.gradcheck(lambda *args: function(*args, chunk_size=4)[0], x, atol=1e-6)


def test_registry_names_what_there_is():
    assert {kernel.form for kernel in kernels("mlstm")} == {"step", "recurrent", "parallel", "chunkwise"}
    with pytest.raises(ValueError, match=r"no form 'fast' .* known: chunkwise, parallel, recurrent"):
        get_kernel("mlstm", "fast")
    with pytest.raises(ValueError, match="no kernels for operation 'slstm'"):
        get_kernel("slstm", "step")


def test_shapes_that_do_not_match_are_named():
    q, k, v, i, f = inputs(8)
    with pytest.raises(ValueError, match=r"'i': \(2, 3, 7\)"):
        get_kernel("mlstm", "chunkwise")(q, k, v, i[..., :7], f)
