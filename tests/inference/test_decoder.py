"""Decoders against the model's full forward pass in float64, their memory, and when they are not used."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import PROGRAMS, lively_model, needs_compiler

from xlstm_scaling.inference import decoder_cpp
from xlstm_scaling.inference.decoder import TOLERANCE, DecoderError, ModuleDecoder, logit_error, make_decoder
from xlstm_scaling.inference.decoder_cpp import CppDecoder
from xlstm_scaling.inference.decoder_graph import SHORTEST_SPAN, GraphDecoder, span_of
from xlstm_scaling.inference.generation import generate, generate_batch, prefill, prefill_batch
from xlstm_scaling.inference.timing import prepare, timed_pass
from xlstm_scaling.kernels import registry
from xlstm_scaling.kernels.cpp import build

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
SHAPES = [
    {},
    {"embedding_dim": 42, "num_heads": 3, "vocab_size": 101},
    {"embedding_dim": 40, "num_heads": 1, "num_blocks": 1},
    {"embedding_dim": 64, "num_heads": 2, "vocab_size": 517},
]


def tokens_of(model, batch, length, seed=0):
    return torch.randint(model.shape.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_error(got, expected):
    return float((got - expected).norm() / expected.norm())


@torch.inference_mode()
def decoded(decoder, tokens, read, chunk=None):
    """Logits (B, T − read + 1, V) of a prompt of ``read`` tokens and of decoding the rest of tokens (B, T)."""
    if read:
        logits, state = prefill(decoder.model, tokens[:, :read], decoder.start(), chunk)
        decoder.take(state)
        logits = [logits.clone()]
    else:
        decoder.take(decoder.start())
        logits = []
    return torch.stack(logits + [decoder.step(token).clone() for token in tokens[:, read:].unbind(1)], 1)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_logits_are_those_of_the_full_forward_pass_in_float64(arch, program, batch, sizes):
    model, reference = lively_model(arch, **sizes), lively_model(arch, torch.float64, **sizes)
    tokens = tokens_of(model, batch, 17)
    with torch.inference_mode():
        expected = reference(tokens)
    for read in (0, 1, 9):
        assert relative_error(decoded(program(model, batch, 17), tokens, read), expected[:, max(0, read - 1) :]) < 2e-4


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    arch = data.draw(st.sampled_from(["xlstm", "transformer"]))
    heads = data.draw(st.integers(1, 4))
    width = heads * 2 * data.draw(st.integers(1, 13))
    model = lively_model(
        arch, vocab_size=data.draw(st.integers(2, 70)), embedding_dim=width, num_blocks=data.draw(st.integers(1, 3)),
        num_heads=heads,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():  # half closed: no small normaliser magnifies rounding
            if "gates.bias" in name:
                p[: len(p) // 2] -= 3
            elif p.dim() == 2:
                p *= 0.5
    batch, read, steps = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 5)), data.draw(st.integers(1, 5))
    model.logit_cap = data.draw(st.sampled_from([None, 30.0]))
    tokens = tokens_of(model, batch, read + steps)
    reference = decoded(ModuleDecoder(model, batch, read + steps), tokens, read)
    assert relative_error(decoded(CppDecoder(model, batch, read + steps), tokens, read), reference) < 1e-4


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("chunk", [None, 100])
def test_after_a_long_prompt(arch, program, chunk):
    """Longer than what the C++ attends to at a time (512 slots), and than the first span of a graph."""
    sizes = {"embedding_dim": 12, "num_blocks": 1, "chunk": 64}
    model, reference = lively_model(arch, **sizes), lively_model(arch, torch.float64, **sizes)
    tokens = tokens_of(model, 2, 1036)
    with torch.inference_mode():
        expected = reference(tokens)[:, 1019:]
    assert relative_error(decoded(program(model, 2, 1040), tokens, 1020, chunk), expected) < 2e-4


@pytest.mark.parametrize("program", PROGRAMS)
@torch.inference_mode()
def test_unequal_prompts_are_decoded_as_each_alone(arch, program):
    model, steps = lively_model(arch), 6
    prompts = [tokens_of(model, 1, length, length)[0] for length in (600, 11, 11, 1)]
    follow = tokens_of(model, 4, steps, 3)
    decoder = program(model, 4, 600 + steps)
    _, state = prefill_batch(model, prompts, steps, 64, decoder.start())
    decoder.take(state)
    together = torch.stack([decoder.step(token).clone() for token in follow.unbind(1)], 1)
    reference = lively_model(arch, torch.float64)
    for row, prompt in enumerate(prompts):
        full = reference(torch.cat([prompt, follow[row]])[None])[0, len(prompt) :]
        assert relative_error(together[row], full) < 2e-4


@needs_compiler
@torch.inference_mode()
def test_bits_depend_neither_on_the_batch_nor_on_the_threads(arch):
    model = lively_model(arch, embedding_dim=48, num_heads=2, vocab_size=800)
    tokens = tokens_of(model, 7, 20)
    _, state = model.prefill(tokens[:, :12], model.init_state(7, 20))
    threads, runs = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            decoder = CppDecoder(model, 7, 20)
            decoder.take(state)
            runs[count] = torch.stack([decoder.step(token).clone() for token in tokens[:, 12:].unbind(1)], 1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[1], runs[2]) and torch.equal(runs[1], runs[3])
    for row in range(7):
        alone = CppDecoder(model, 1, 20)
        part = [block.take_rows(one, slice(row, row + 1), 0) for block, one in zip(model.blocks, state)]
        for one, whole in zip(part, state):
            if arch == "transformer":
                one.length = whole.length
        alone.take(part)
        steps = torch.cat([alone.step(token).clone() for token in tokens[row, 12:, None]])
        assert torch.equal(steps, runs[1][row])


@needs_compiler
@pytest.mark.parametrize("batch", [1, 3])
def test_bf16_matrices_are_widened_not_rounded_again(arch, batch):
    """In fp32 with the rounded matrices: a cache in bf16 is rounded once more, an mLSTM's state is not."""
    model = prepare(lively_model(arch, embedding_dim=42, num_heads=3, vocab_size=101), torch.bfloat16)
    rounded = lively_model(arch, embedding_dim=42, num_heads=3, vocab_size=101)
    rounded.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    tokens = tokens_of(model, batch, 12)
    with torch.inference_mode():
        expected = rounded(tokens)
    got = decoded(CppDecoder(model, batch, 12), tokens, 0)
    assert relative_error(got, expected) < (2e-4 if arch == "xlstm" else 2e-2)
    unprepared = lively_model(arch, embedding_dim=42, num_heads=3, vocab_size=101)
    unprepared.compute_dtype = torch.bfloat16
    assert torch.equal(decoded(CppDecoder(unprepared, batch, 12), tokens, 0), got)


@pytest.mark.parametrize("program", PROGRAMS)
@torch.inference_mode()
def test_the_model_goes_on_where_a_decoder_stopped_and_the_other_way_round(arch, program):
    model, reference = lively_model(arch), lively_model(arch, torch.float64)
    tokens = tokens_of(model, 2, 20)
    expected, decoder = reference(tokens), program(model, 2, 20)
    logits, state = model.prefill(tokens[:, :4], model.init_state(2, 20))  # not the decoder's own: it is copied
    decoder.take(state)
    for position in range(4, 20):
        if position % 8 < 4:
            logits = decoder.step(tokens[:, position])
        else:
            state = decoder.hand_back() if position % 8 == 4 else state
            logits, state = model.prefill(tokens[:, position, None], state)
            if position % 8 == 7:
                decoder.take(state)
        assert relative_error(logits, expected[:, position]) < 2e-4


@pytest.mark.parametrize("program", PROGRAMS)
@torch.inference_mode()
def test_the_state_is_that_of_the_model(arch, program):
    model, reference = lively_model(arch), lively_model(arch, torch.float64)
    tokens = tokens_of(model, 2, 15)
    decoder, (_, expected) = program(model, 2, 15), reference.prefill(tokens, reference.init_state(2, 15))
    decoded(decoder, tokens, 0)
    for mine, one in zip(decoder.hand_back(), expected):
        pairs = zip(mine, one) if arch == "xlstm" else [(mine.k, one.k), (mine.v, one.v)]
        assert all(relative_error(x, y) < 1e-4 for x, y in pairs)
        assert arch == "xlstm" or mine.length == one.length == 15


@pytest.mark.parametrize("program", PROGRAMS)
@torch.inference_mode()
def test_a_full_cache_is_an_error_that_changes_nothing(program):
    model = lively_model("transformer")
    decoder = program(model, 2, 6)
    tokens = tokens_of(model, 2, 6)
    decoded(decoder, tokens, 4)
    before = [x.clone() for one in decoder.state for x in (one.k, one.v)]
    with pytest.raises(ValueError, match="KV cache holds 6 tokens, 7 are needed"):
        decoder.step(tokens[:, 0])
    assert all(torch.equal(x, y) for x, y in zip(before, [x for one in decoder.state for x in (one.k, one.v)]))
    assert decoder.length == 6
    longer = model.prefill(tokens_of(model, 2, 7), model.init_state(2, 7))[1]
    with pytest.raises(ValueError, match="room for 2 and 6"):
        decoder.take(longer)
    decoded(decoder, tokens, 4)  # from the start again


def test_states_of_another_batch_are_refused(arch):
    model = lively_model(arch)
    for batch in (1, 3):
        with pytest.raises(ValueError, match="the decoder"):
            ModuleDecoder(model, 2, 8).take(model.init_state(batch, 8))
    with pytest.raises(ValueError, match="positive"):
        ModuleDecoder(model, 0, 8)


@pytest.mark.parametrize("program", PROGRAMS[:2])
@torch.inference_mode()
def test_memory_is_static(arch, program):
    model = lively_model(arch)
    decoder, tokens = program(model, 2, 12), tokens_of(model, 2, 12)

    def places():
        return [x.data_ptr() for one in decoder.state for x in (one if arch == "xlstm" else (one.k, one.v))]

    before, first = places(), decoded(decoder, tokens, 5)
    assert torch.equal(decoded(decoder, tokens, 5), first)  # nothing is left of the first sequences
    assert places() == before
    assert decoder.step(tokens[:, 0]).data_ptr() == decoder.step(tokens[:, 0]).data_ptr() if arch == "xlstm" else True


@pytest.mark.parametrize("program", PROGRAMS)
@torch.inference_mode()
def test_greedy_tokens_are_the_likeliest(arch, program):
    model = lively_model(arch, vocab_size=131)
    one, other = program(model, 3, 20), program(model, 3, 20)
    for decoder in (one, other):
        decoder.take(decoder.start())
    token = tokens_of(model, 3, 1)[:, 0]
    for _ in range(15):
        expected = other.step(token).argmax(-1)
        token = one.greedy(token)
        assert token.dtype == torch.int64 and torch.equal(token, expected)
    with torch.no_grad():
        model.head.weight.zero_()
    assert one.greedy(token).tolist() == [0, 0, 0]  # the first of equals


@needs_compiler
def test_what_a_step_refuses(arch):
    decoder = CppDecoder(lively_model(arch), 2, 8)
    for tokens, message in [
        (torch.tensor([1, 37]), "[0, 37)"),
        (torch.tensor([-1, 0]), "[0, 37)"),
        (torch.tensor([1]), "a step takes (2,) int64"),
        (torch.tensor([1, 2], dtype=torch.int32), "int64"),
    ]:
        with pytest.raises(ValueError) as error:
            decoder.step(tokens)
        assert message in str(error.value)


# which decoder is made


@needs_compiler
def test_the_fast_decoder_is_made_and_checked(arch):
    model = lively_model(arch)
    decoder = make_decoder(model, 2, 10)
    assert type(decoder) is CppDecoder
    assert logit_error(decoder) < 1e-4 < TOLERANCE[torch.float32]
    assert decoder.length == 0
    assert type(make_decoder(model, 2, 10, "torch")) is ModuleDecoder
    assert type(make_decoder(lively_model(arch, torch.float64), 2, 10)) is ModuleDecoder
    for length in (1, 2, 3):
        shortest = make_decoder(lively_model(arch), 1, length)
        assert type(shortest) is (ModuleDecoder if arch == "transformer" and length == 1 else CppDecoder)


@needs_compiler
@pytest.mark.parametrize("fault", ["matrix", "eps", "head"])
def test_a_decoder_that_is_wrong_is_never_used(arch, fault, monkeypatch):
    if fault == "matrix":
        real = CppDecoder._matrix
        monkeypatch.setattr(CppDecoder, "_matrix", lambda self, weight: real(self, weight.flip(0)))
    elif fault == "eps":
        model_type = decoder_cpp._Model
        monkeypatch.setattr(decoder_cpp, "_Model", lambda **fields: model_type(**fields | {"norm_eps": 3.0}))
    else:
        monkeypatch.setattr(CppDecoder, "step", lambda self, tokens: self._logits.fill_(math.nan))
    model = lively_model(arch)
    with pytest.warns(UserWarning, match="its logits differ"):
        assert type(make_decoder(model, 2, 10)) is ModuleDecoder
    with pytest.raises(DecoderError, match="its logits differ"):
        make_decoder(model, 2, 10, "cpp")


def test_without_cpp_the_model_decodes(arch, monkeypatch):
    functions = build.library, build.usable, registry.select
    monkeypatch.setenv(build.SWITCH_VARIABLE, "0")
    for function in functions:
        function.cache_clear()
    try:
        model = lively_model(arch)
        assert type(make_decoder(model, 1, 8)) is ModuleDecoder
        with pytest.raises(DecoderError, match="switched off"):
            make_decoder(model, 1, 8, "cpp")
        assert generate(model, torch.arange(3), 5).shape == (1, 8)
    finally:
        for function in functions:
            function.cache_clear()


def test_kinds_that_do_not_fit_are_refused(arch):
    model = lively_model(arch)
    with pytest.raises(ValueError, match="decoder must be one of"):
        make_decoder(model, 1, 8, "fast")
    with pytest.raises(DecoderError, match="need a GPU"):
        make_decoder(model, 1, 8, "graph")
    with pytest.raises(DecoderError, match=r"torch\.float64"):
        make_decoder(lively_model(arch, torch.float64), 1, 8, "cpp")


@pytest.mark.parametrize("lengths", [[7], [9, 1, 5]], ids=str)
def test_generated_tokens_do_not_depend_on_the_decoder(arch, lengths):
    model = lively_model(arch)
    prompts = [tokens_of(model, 1, length, length)[0] for length in lengths]
    kinds = ["torch", "auto"] + (["cpp"] if build.compiler() else [])
    first, *others = [generate_batch(model, prompts, 20, decoder=kind) for kind in kinds]
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other))


@needs_compiler
def test_the_timed_pass_decodes_with_it(arch, monkeypatch):
    steps = []
    real = CppDecoder.greedy
    monkeypatch.setattr(CppDecoder, "greedy", lambda self, tokens: steps.append(self.length) or real(self, tokens))
    ttft_s, times = timed_pass(lively_model(arch), torch.zeros(2, 5, dtype=torch.int64), 3)
    assert ttft_s > 0 and len(times) == 3
    assert steps == ([0, 0, 0] if arch == "xlstm" else [5, 6, 7])


# CUDA graphs


@pytest.mark.parametrize("max_length", [1, 100, 256, 700, 5000, 100_000])
def test_spans_hold_the_cache_and_waste_little(max_length):
    spans = [span_of(slots, max_length) for slots in range(1, max_length + 1)]
    assert all(slots <= span <= max_length for slots, span in enumerate(spans, 1))
    assert spans == sorted(spans) and len(set(spans)) < 50
    assert all(span <= max(1.25 * slots + SHORTEST_SPAN, SHORTEST_SPAN) for slots, span in enumerate(spans, 1))


def test_nothing_of_a_graph_goes_to_the_host(arch):
    """A meta tensor has no numbers: what asks for one is an error."""
    model = lively_model(arch).to("meta")
    decoder = GraphDecoder(model, 2, 300, capture=False)
    for span in (256, 300):
        decoder.compute(span)
    assert decoder._logits.shape == (2, 37)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_graph_gives_the_logits_of_the_model(arch, dtype):
    model = prepare(lively_model(arch, embedding_dim=64), dtype, "cuda")
    tokens = tokens_of(model, 3, 300).cuda()
    decoder = make_decoder(model, 3, 300, "graph", 250)
    first = decoded(decoder, tokens, 250)
    expected = decoded(ModuleDecoder(model, 3, 300), tokens, 250)
    assert relative_error(first, expected) < TOLERANCE[dtype]
    assert torch.equal(decoded(decoder, tokens, 250), first)
