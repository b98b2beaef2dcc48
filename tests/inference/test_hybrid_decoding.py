"""Decoding of a model with a state in some blocks and a cache in others."""

import pytest
import torch
from lively import PROGRAMS, lively_model

from xlstm_scaling.accounting.serving import state_bytes as accounted_state_bytes
from xlstm_scaling.inference.decoder import make_decoder
from xlstm_scaling.inference.generation import generate, generate_batch, prefill, prefill_batch, state_bytes

#: mLSTM, mLSTM, mLSTM, attention, mLSTM; heads of another size in the attention block (18 = 3 x 6, not 36)
SIZES = {"num_blocks": 5, "embedding_dim": 72, "num_heads": 2}


def tokens_of(model, batch, length, seed=0):
    return torch.randint(model.shape.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("batch", "sizes"), [(1, SIZES), (3, SIZES), (2, {"num_blocks": 2})], ids=str)
@torch.inference_mode()
def test_logits_are_those_of_the_full_forward_pass_in_float64(program, batch, sizes):
    model, reference = lively_model("hybrid", **sizes), lively_model("hybrid", torch.float64, **sizes)
    tokens = tokens_of(model, batch, 17)
    expected = reference(tokens)
    for read in (1, 9):
        decoder = program(model, batch, 17)
        logits, state = prefill(model, tokens[:, :read], decoder.start())
        decoder.take(state)
        got = torch.stack([logits, *(decoder.step(token).clone() for token in tokens[:, read:].unbind(1))], 1)
        assert float((got - expected[:, read - 1 :]).norm() / expected[:, read - 1 :].norm()) < 2e-4


@pytest.mark.parametrize("program", PROGRAMS)
@torch.inference_mode()
def test_unequal_prompts_are_decoded_as_each_alone(program):
    model, steps = lively_model("hybrid", **SIZES), 4
    prompts = [tokens_of(model, 1, length, length)[0] for length in (530, 7, 1)]
    follow = tokens_of(model, 3, steps, 3)
    decoder = program(model, 3, 530 + steps)
    _, state = prefill_batch(model, prompts, steps, 64, decoder.start())
    decoder.take(state)
    together = torch.stack([decoder.step(token).clone() for token in follow.unbind(1)], 1)
    for row, prompt in enumerate(prompts):
        alone = program(model, 1, len(prompt) + steps)
        _, state = prefill(model, prompt[None], alone.start())
        alone.take(state)
        expected = torch.stack([alone.step(token[row : row + 1]).clone()[0] for token in follow.unbind(1)])
        torch.testing.assert_close(together[row], expected, rtol=2e-4, atol=2e-4)


def test_greedy_tokens_are_those_of_repeated_full_forward_passes():
    model = lively_model("hybrid", torch.float64, **SIZES)
    prompt = tokens_of(model, 1, 5)[0]
    tokens = prompt
    with torch.inference_mode():
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens[None])[:, -1].argmax(-1)])
    assert generate(model, prompt, 6)[0].tolist() == tokens.tolist()
    assert generate_batch(model, [prompt, prompt[:2]], 6)[0].tolist() == tokens.tolist()[5:]


def test_the_cache_is_full_as_a_transformers_is():
    model = lively_model("hybrid", **SIZES)
    decoder = make_decoder(model, 1, 3)
    decoder.take(decoder.start())
    for _ in range(3):
        decoder.step(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="KV cache holds 3 tokens, 4 are needed"):
        decoder.step(torch.zeros(1, dtype=torch.int64))


def test_states_take_what_is_counted():
    model = lively_model("hybrid", **SIZES)
    assert state_bytes(model, 2, 50) == accounted_state_bytes(model.shape, 50, 2, act=4)
    model = lively_model("hybrid", **SIZES)
    grown = accounted_state_bytes(model.shape, 51, 1, act=2) - accounted_state_bytes(model.shape, 50, 1, act=2)
    assert grown == 2 * 2 * 72  # keys and values of the one attention block in bf16
