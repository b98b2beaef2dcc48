"""Causal attention with rotary positions: against the library's, causal, document by document."""

import pytest
import torch
import torch.nn.functional as F

from xlstm_scaling.kernels import get_kernel
from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.models.transformer import rotary_angles

needs_compiler = pytest.mark.skipif(not build.usable("attention"), reason="no C++ compiler")
IMPLEMENTATIONS = [("torch", "reference"), pytest.param(("cpp", "fused"), marks=needs_compiler)]


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda value: value[0])
def attention(request):
    backend, form = request.param
    return get_kernel("rotary_attention", form, backend)


def inputs(B, T, H, d, seed=0, dtype=torch.float32):
    qkv = torch.randn(B, T, 3, H, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return qkv, *rotary_angles(T, d, 1e4, qkv.device)


@pytest.mark.parametrize(("B", "T", "H", "d"), [(2, 50, 3, 16), (1, 131, 2, 64), (2, 300, 1, 18), (1, 1, 2, 4)])
def test_equals_the_library(attention, B, T, H, d):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    qkv, cos, sin = inputs(B, T, H, d)
    y = attention(qkv, cos, sin)
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    q, k = modeling.apply_rotary_pos_emb(q, k, cos.double()[None], sin.double()[None])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, H * d)
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-6)


def test_the_future_does_not_matter_and_documents_are_apart(attention):
    T, cut = 150, 70
    qkv, cos, sin = inputs(2, T, 2, 24)
    starts = torch.zeros(2, T, dtype=torch.bool)
    starts[:, 0] = starts[:, cut] = True
    whole = attention(qkv, cos, sin, starts)
    torch.testing.assert_close(whole[:, :cut], attention(qkv[:, :cut], cos[:cut], sin[:cut]), rtol=1e-5, atol=1e-6)
    # rotations by the same angle cancel: a document's positions may begin anywhere
    later = attention(qkv[:, cut:], cos[: T - cut], sin[: T - cut])
    torch.testing.assert_close(whole[:, cut:], later, rtol=2e-4, atol=2e-5)
    assert not torch.allclose(whole[:, cut:], attention(qkv, cos, sin)[:, cut:], atol=1e-3)


@needs_compiler
def test_gradients_follow_finite_differences():
    qkv, cos, sin = inputs(1, 67, 2, 8)
    fused, reference = (
        get_kernel("rotary_attention", form, b) for form, b in [("fused", "cpp"), ("reference", "torch")]
    )
    starts = torch.rand(1, 67, generator=torch.Generator().manual_seed(1)) < 0.05
    x = qkv.clone().requires_grad_()
    weight = torch.randn(1, 67, 16, generator=torch.Generator().manual_seed(2))
    (fused(x, cos, sin, starts) * weight).sum().backward()
    direction = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def value(step):
        y = reference(qkv.double() + step * direction, cos.double(), sin.double(), starts)
        return (y * weight).sum()

    numeric = (value(1e-5) - value(-1e-5)) / 2e-5
    assert (x.grad.double() * direction).sum() == pytest.approx(numeric.item(), rel=1e-4)


@needs_compiler
def test_bits_do_not_depend_on_threads():
    qkv, cos, sin = inputs(3, 200, 3, 32)
    fused = get_kernel("rotary_attention", "fused", "cpp")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = qkv.clone().requires_grad_()
            y = fused(x, cos, sin)
            y.square().sum().backward()
            results.append((y.detach(), x.grad))
    finally:
        torch.set_num_threads(before)
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_shapes_that_do_not_fit_are_refused(attention):
    qkv, cos, sin = inputs(1, 10, 2, 8)
    with pytest.raises(ValueError, match=r"takes qkv \(B, T, 3, H, d\)"):
        attention(qkv[:, :, :2], cos, sin)
    with pytest.raises(ValueError, match="cos, sin"):
        attention(qkv, cos[:5], sin[:5])
    with pytest.raises(ValueError, match="document_starts"):
        attention(qkv, cos, sin, torch.zeros(1, 9, dtype=torch.bool))
