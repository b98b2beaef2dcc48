"""The fused head and loss against the plain one."""

import pytest
import torch

from xlstm_scaling.kernels import get_kernel
from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.kernels.cross_entropy import linear_cross_entropy_reference


@pytest.fixture(params=["torch", "cpp"])
def linear_cross_entropy(request):
    if request.param == "cpp" and not build.usable("rows"):
        pytest.skip("no C++ compiler")
    return get_kernel("linear_cross_entropy", "chunked", request.param)


@pytest.mark.parametrize("cap", [None, 30.0, 100.0])
@pytest.mark.parametrize(("M", "V"), [(1, 5), (300, 17), (700, 3000)])
def test_loss_and_gradients(linear_cross_entropy, cap, M, V):
    g = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(M, 24, generator=g, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(V, 24, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (M,), generator=g)
    expected = linear_cross_entropy_reference(hidden, weight, targets, cap)
    d_hidden, d_weight = torch.autograd.grad(expected, (hidden, weight))
    h32, w32 = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    loss = linear_cross_entropy(h32, w32, targets, cap)
    got = torch.autograd.grad(2 * loss, (h32, w32))
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    for name, a, b in zip(("hidden", "weight"), got, (d_hidden, d_weight)):
        error = (a / 2 - b).norm() / b.norm()
        assert error < 2e-5, f"gradient of {name}: {error}"


def test_logits_at_the_cap_do_not_overflow(linear_cross_entropy):
    hidden = torch.full((4, 8), 100.0, requires_grad=True)
    weight = torch.cat((torch.ones(50, 8), -torch.ones(50, 8))).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 60, 99]), 30.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
