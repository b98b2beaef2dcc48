"""A mini xLSTM or Transformer of the registry's kernels, trained 200 steps: each kernel must follow PyTorch's curve.

With the input gates of the paper (bias -10) training is no chaos: fp32 kernels stay within 1e-6 of each other, and a dq
that is 10 % too large is a thousand times as far away. With gates near 0, |n·q| crosses exp(-m) all the time, gradients
jump there, and rounding alone moves the curve by 0.03.
"""

import pytest
import torch
import torch.nn.functional as F

from xlstm_scaling.kernels import get_kernel, registry
from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.models.transformer import rotary_angles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton") if DEVICE == "cuda" else ("torch", "cpu", "cpp")
REFERENCE = {
    "mlstm": "chunkwise",
    "rms_norm": "reference",
    "head_norm_gate": "reference",
    "gated_silu": "reference",
    "linear_cross_entropy": "reference",
    "rotary_attention": "reference",
}
WIDTH, HEADS, VOCABULARY, TOKENS, BATCH, STEPS, BLOCKS = 32, 2, 24, 33, 8, 200, 1
#: largest and mean distance of two curves [nat/token]
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2e-2, 3e-3)}


def candidates():
    """Every kernel that trains on this device, but the slow definition and the reference itself."""
    found = []
    for (op, backend), modules in registry._MODULES.items():
        if backend not in BACKENDS or op not in REFERENCE:
            continue
        if backend == "cpp" and not build.usable(registry.CPP_LIBRARIES[op]):
            continue
        names = [kernel.form for kernel in registry.kernels(op, backend)] if _importable(modules) else []
        skipped = {"step", "recurrent"} | ({REFERENCE[op]} if backend == "torch" else set())
        # where there is a compiler nothing trains with the PyTorch forms for CPUs
        fallback = backend == "cpu" and build.usable(registry.CPP_LIBRARIES[op])
        for dtype in TOLERANCE:  # 16 bits matter where states are carried on
            if op == "rotary_attention" and dtype != torch.float32:
                continue  # the C++ form leaves 16 bits to PyTorch
            rare = fallback or (dtype != torch.float32 and op != "mlstm")
            marks = [pytest.mark.exhaustive] if rare else []
            found += [pytest.param(op, form, backend, dtype, marks=marks) for form in names if form not in skipped]
    return found


def _importable(modules):
    import importlib

    try:
        for name in modules:
            importlib.import_module(f"xlstm_scaling.kernels.{name}")
    except ModuleNotFoundError:
        return False
    return True


def batch(step):
    """Tokens that go up by a step that each sequence has of its own: the model must remember."""
    g = torch.Generator().manual_seed(step)
    stride = torch.tensor([1, 5, 11, 17])[torch.randint(0, 4, (BATCH, 1), generator=g)]
    tokens = (torch.randint(0, VOCABULARY, (BATCH, 1), generator=g) + stride * torch.arange(TOKENS + 1)) % VOCABULARY
    return tokens[:, :-1].to(DEVICE), tokens[:, 1:].to(DEVICE)


def parameters(mixing):
    g = torch.Generator().manual_seed(0)

    def normal(*shape, std):
        return std * torch.randn(*shape, generator=g)

    p = {"embedding": normal(VOCABULARY, WIDTH, std=0.3), "head": normal(VOCABULARY, WIDTH, std=0.2)}
    p["norm"] = torch.ones(WIDTH)
    for b in range(BLOCKS):
        p |= {f"{name}{b}": torch.ones(WIDTH) for name in ("norm", "head_norm", "ffn_norm")}
        p |= {f"qkv{b}": normal((2 if mixing == "mlstm" else 3) * WIDTH, WIDTH, std=0.2)}
        p |= {f"gate{b}": normal(WIDTH, WIDTH, std=0.1)}
        p |= {f"gates{b}": normal(2 * HEADS, WIDTH, std=0.1), f"bias{b}": torch.tensor([-10.0, -10.0, 3.0, 5.0])}
        p |= {f"out{b}": normal(WIDTH, WIDTH, std=0.1), f"gate_up{b}": normal(4 * WIDTH, WIDTH, std=0.2)}
        p[f"down{b}"] = normal(WIDTH, 2 * WIDTH, std=0.1)
    return {name: value.to(DEVICE).requires_grad_() for name, value in p.items()}


def loss(p, kernels, mixing, tokens, targets, dtype):
    def linear(x, name):
        return F.linear(x, p[name].to(x.dtype))

    def mlstm(x, b):
        B, T, _ = x.shape
        q, k, v = linear(x, f"qkv{b}").split([WIDTH // 2, WIDTH // 2, WIDTH], -1)
        q, k, v = (y.view(B, T, HEADS, -1).transpose(1, 2) for y in (q, k, v))
        gates = 15 * torch.tanh(F.linear(x.float(), p[f"gates{b}"], p[f"bias{b}"]) / 15)
        i, f = gates.view(B, T, 2, HEADS).permute(2, 0, 3, 1)
        h, _ = kernels["mlstm"](q, k, v, i, f, None)
        return kernels["head_norm_gate"](h.transpose(1, 2), linear(x, f"gate{b}"), p[f"head_norm{b}"])

    def attention(x, b):
        B, T, _ = x.shape
        cos, sin = rotary_angles(T, WIDTH // HEADS, 1e4, x.device)
        return kernels["rotary_attention"](linear(x, f"qkv{b}").view(B, T, 3, HEADS, -1), cos, sin)

    stream = p["embedding"][tokens].to(dtype)
    x = kernels["rms_norm"](stream, p["norm0"])
    for b in range(BLOCKS):
        y = mlstm(x, b) if mixing == "mlstm" else attention(x, b)
        x, stream = kernels["rms_norm"](linear(y, f"out{b}"), p[f"ffn_norm{b}"], stream)
        y = linear(kernels["gated_silu"](linear(x, f"gate_up{b}")), f"down{b}")
        x, stream = kernels["rms_norm"](y, p["norm" if b == BLOCKS - 1 else f"norm{b + 1}"], stream)
    return kernels["linear_cross_entropy"](x.flatten(0, 1), p["head"], targets.flatten(), 30.0)


def curve(dtype, mixing="mlstm", **changed):
    """Loss of every step, with some kernels in place of the reference."""
    kernels = {op: get_kernel(op, form, "torch") for op, form in REFERENCE.items()} | changed
    p = parameters(mixing)
    optimizer = torch.optim.AdamW(p.values(), lr=1e-3, eps=1e-4, weight_decay=0.01, fused=True)
    losses = []
    for step in range(STEPS):
        value = loss(p, kernels, mixing, *batch(step), dtype)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(p.values()), 0.5)
        optimizer.step()
        losses.append(value.item())
    return torch.tensor(losses)


@pytest.fixture(scope="module")
def reference():
    curves = {("mlstm", dtype): curve(dtype) for dtype in TOLERANCE}
    return curves | {("attention", torch.float32): curve(torch.float32, "attention")}


def follows(losses, reference, dtype):
    distance = (losses - reference).abs()
    return distance.max() < TOLERANCE[dtype][0] and distance.mean() < TOLERANCE[dtype][1]


def test_the_mini_model_learns(reference):
    for (mixing, dtype), losses in reference.items():
        assert losses[0] > 3
        assert losses[-20:].mean() < 0.2, (mixing, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "form", "backend", "dtype"), candidates(), ids=str)
def test_a_model_trained_with_a_kernel_follows_the_reference(reference, op, form, backend, dtype):
    mixing = "attention" if op == "rotary_attention" else "mlstm"
    losses = curve(dtype, mixing, **{op: get_kernel(op, form, backend)})
    distance = (losses - reference[mixing, dtype]).abs()
    assert follows(losses, reference[mixing, dtype], dtype), (
        f"largest distance {distance.max():.2g}, mean {distance.mean():.2g}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)], ids=str)
def test_a_model_trained_with_a_wrong_kernel_does_not(reference, dtype):
    """The finite loss of a kernel whose dk is lost, as the field had it, gives it away."""
    right = get_kernel("mlstm", "chunkwise")
    losses = curve(dtype, mlstm=lambda q, k, v, i, f, state: right(q, k.detach(), v, i, f, state))
    assert torch.isfinite(losses).all()
    assert not follows(losses, reference["mlstm", dtype], dtype)
