"""The models: parameters as counted, the Transformer against Hugging Face, cached decoding, documents apart."""

import math

import pytest
import torch

from xlstm_scaling.accounting import count_params, make_shape
from xlstm_scaling.models import MODELS, build_model

SHAPES = {
    "xlstm": make_shape("xlstm", 32, 2, 2, 61),
    "transformer": make_shape("transformer", 32, 2, 4, 61),
    "hybrid": make_shape("hybrid", 32, 3, 2, 61, attention_every=2),
}
ARCHS = sorted(SHAPES)


def double_model(arch, seed=0):
    """A float64 model with gates off their initial zero, so that every parameter matters."""
    model = build_model(SHAPES[arch], compute_dtype=torch.float64, seed=seed).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    return model


def tokens(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_model_is_counted_exactly(arch):
    for dim, blocks, heads in [(32, 1, 2), (64, 3, 4), (96, 2, 3)]:
        shape = make_shape(arch, dim, blocks, heads, 100)
        assert build_model(shape).num_params() == count_params(shape)


def test_every_architecture_has_accounting():
    from xlstm_scaling.accounting import ARCHITECTURES

    assert set(MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_position_sees_the_future(arch):
    model, x = double_model(arch), tokens(2, 20)
    changed = x.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12], b[:, 12])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("split", [1, 5, 16, 20])
def test_prefill_then_steps_equal_the_full_pass(arch, split):
    model, x = double_model(arch), tokens(3, 21)
    full = model(x)
    logits, state = model.prefill(x[:, :split], model.init_state(3, 21))
    outputs = [logits]
    for t in range(split, 21):
        logits, state = model.prefill(x[:, t : t + 1], state)
        outputs.append(logits)
    torch.testing.assert_close(torch.stack(outputs, 1), full[:, split - 1 :], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_chunked_prefill_equals_the_full_pass(arch):
    model, x = double_model(arch), tokens(2, 30)
    state = model.init_state(2, 30)
    for part in x.split([7, 13, 10], dim=1):
        logits, state = model.prefill(part, state)
    torch.testing.assert_close(logits, model(x)[:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_documents_do_not_see_each_other(arch):
    """What follows a document start equals a sequence that begins there."""
    model, x = double_model(arch), tokens(2, 24)
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[:, 9] = True
    together = model(x, starts)
    alone = model(x[:, 9:])
    torch.testing.assert_close(together[:, 9:], alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model(x)[:, 9:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_loss_is_the_cross_entropy_of_the_logits(arch):
    model, x = double_model(arch), tokens(2, 18)
    logits = model(x[:, :-1])
    assert logits.abs().max() <= 30
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    assert model.loss(x[:, :-1], x[:, 1:]).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_bf16_loss_is_close_to_fp32(arch):
    x = tokens(4, 64)
    losses = [
        build_model(SHAPES[arch], compute_dtype=dtype, seed=0).loss(x[:, :-1], x[:, 1:]).item()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[0] == pytest.approx(math.log(61), rel=0.1)  # an untrained model knows next to nothing


@pytest.mark.parametrize("arch", ARCHS)
def test_initialisation_follows_the_seed_and_the_design(arch):
    shape = make_shape(arch, 256, 4, 4, 500)
    a, b, c = (build_model(shape, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)
    assert a.embedding.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 256)), rel=0.02)
    down = a.blocks[0].ffn.down.weight.std().item()
    assert down == pytest.approx({"xlstm": 1.0, "transformer": 0.5, "hybrid": 1.0}[arch] * 2 / 4 / 16, rel=0.02)
    if arch != "transformer":
        layer = a.blocks[0].mlstm
        assert not layer.gates.weight.any()
        assert layer.gates.bias[:4].tolist() == [-10.0] * 4
        assert layer.gates.bias[4:].tolist() == [3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("arch", ARCHS)
def test_decay_on_linear_weights_only(arch):
    model = build_model(SHAPES[arch], seed=0)
    decayed, rest = model.decay_groups(0.1)
    assert sum(p.numel() for g in (decayed, rest) for p in g["params"]) == model.num_params()
    assert all(p.ndim == 2 for p in decayed["params"])
    assert any(p is model.embedding.weight for p in rest["params"])


def test_transformer_equals_hugging_face_llama():
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is a test dependency")
    shape = make_shape("transformer", 48, 3, 4, 61)
    model = build_model(shape, compute_dtype=torch.float32, seed=3, logit_cap=None)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=61,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    llama = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
        llama.model.embed_tokens.weight.copy_(model.embedding.weight)
        llama.lm_head.weight.copy_(model.head.weight)
        llama.model.norm.weight.copy_(model.norm.weight)
        for ours, theirs in zip(model.blocks, llama.model.layers):
            q, k, v = ours.attention.qkv.weight.chunk(3)
            gate, up = ours.ffn.gate_up.weight.chunk(2)
            pairs = [
                (theirs.self_attn.q_proj, q), (theirs.self_attn.k_proj, k), (theirs.self_attn.v_proj, v),
                (theirs.self_attn.o_proj, ours.attention.out.weight), (theirs.mlp.gate_proj, gate),
                (theirs.mlp.up_proj, up), (theirs.mlp.down_proj, ours.ffn.down.weight),
                (theirs.input_layernorm, ours.attention_norm.weight),
                (theirs.post_attention_layernorm, ours.ffn_norm.weight),
            ]  # fmt: skip
            for module, weight in pairs:
                module.weight.copy_(weight)
        x = tokens(2, 40)
        torch.testing.assert_close(model(x), llama(x).logits, rtol=2e-4, atol=2e-4)


def test_unknown_architecture_is_named():
    from dataclasses import replace

    with pytest.raises(ValueError, match="no model for architecture 'mamba'; known: xlstm, transformer"):
        build_model(replace(SHAPES["xlstm"], arch="mamba"))


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("xlstm", {}),
        ("xlstm", {"kernel_form": "parallel", "kernel_backend": "torch"}),
        ("transformer", {}),
        ("hybrid", {}),
    ],
)
def test_a_model_says_which_kernels_it_asks_for(arch, options, monkeypatch):
    from xlstm_scaling.models import layers, xlstm

    model, seen, original = build_model(SHAPES[arch], **options), set(), layers.select

    def spy(op, device, form=None, backend="auto", *args, **kwargs):
        seen.add((op, form, backend))
        return original(op, device, form, backend, *args, **kwargs)

    for module in (layers, xlstm):
        monkeypatch.setattr(module, "select", spy)
    x = tokens(2, 12)
    model.loss(x, x).backward()
    assert seen == set(MODELS[arch].operations(**options))


def test_a_new_architecture_brings_its_own_kernels(monkeypatch):
    from types import SimpleNamespace

    from xlstm_scaling.kernels.certification.usage import used_kernels

    class Recurrent(MODELS["xlstm"].kinds["xlstm"]):
        @classmethod
        def operations(cls, **options):
            return [("mlstm", "recurrent", "torch")]

    monkeypatch.setitem(MODELS, "third", type("Third", (MODELS["xlstm"],), {"kinds": {"xlstm": Recurrent}}))
    spec = SimpleNamespace(arch="third", model_options={"kernel_form": "chunkwise"}, compute_dtype="float32")
    first, *others = used_kernels(spec, "cpu")
    assert first == ("mlstm", "recurrent", "torch", "float32")
    assert [op for op, *_ in others] == ["rms_norm", "linear_cross_entropy"]  # every model's
