"""Generation on the state or cache against the full forward pass."""

import itertools

import pytest
import torch
from lively import lively_model

from xlstm_scaling.inference.generation import generate, prefill, sample

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}


def relative_error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("pieces", [[13], [1] * 13, [5, 1, 7], [4, 4, 5], [3, 1, 1, 8], [1, 12]], ids=str)
@torch.inference_mode()
def test_cached_logits_equal_the_full_forward_pass_at_every_position(arch, dtype, pieces):
    model = lively_model(arch, dtype)
    tokens = torch.randint(37, (3, sum(pieces)), generator=torch.Generator().manual_seed(0))
    state, logits = model.init_state(3, sum(pieces)), []
    for start, end in itertools.pairwise([0, *itertools.accumulate(pieces)]):
        hidden, state = model.hidden(tokens[:, start:end], None, state)
        logits.append(model.logits(hidden))
    full = model(tokens)
    assert full.dtype == dtype
    assert relative_error(torch.cat(logits, 1), full) < TOLERANCE[dtype]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 21])
@pytest.mark.parametrize("chunk", [None, 1, 3, 4, 16, 100])
@torch.inference_mode()
def test_chunked_prefill_gives_the_logits_of_the_last_token(arch, length, chunk):
    model = lively_model(arch, torch.float64)
    tokens = torch.randint(37, (2, length), generator=torch.Generator().manual_seed(length))
    logits, _ = prefill(model, tokens, model.init_state(2, length), chunk)
    assert relative_error(logits, model(tokens)[:, -1]) < 1e-10


def naive_greedy(model, tokens, steps):
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize("chunk", [None, 2, 5])
@torch.inference_mode()
def test_greedy_tokens_are_those_of_repeated_full_forward_passes(arch, chunk):
    model = lively_model(arch, torch.float64)
    prompt = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(generate(model, prompt, 12, prefill_chunk=chunk), naive_greedy(model, prompt, 12))


def test_a_batch_is_its_sequences(arch):
    model = lively_model(arch, torch.float64)
    prompt = torch.randint(37, (3, 6), generator=torch.Generator().manual_seed(2))
    together = generate(model, prompt, 8)
    assert together.shape == (3, 14)
    for one, row in zip(together, prompt, strict=True):
        assert torch.equal(one, generate(model, row, 8)[0])


def test_seed_alone_decides_the_samples(arch):
    model = lively_model(arch)
    prompt = torch.arange(5)
    first = generate(model, prompt, 30, temperature=2.0, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, generate(model, prompt, 30, temperature=2.0, seed=1))
    assert not torch.equal(first, generate(model, prompt, 30, temperature=2.0, seed=2))
    assert torch.equal(generate(model, prompt, 9, temperature=5.0, top_k=1), generate(model, prompt, 9))


def test_samples_follow_the_softmax_of_the_kept_logits():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40_000, 4)
    for temperature, top_k in ((1.0, None), (0.7, None), (2.0, 2)):
        drawn = sample(logits, temperature, top_k, torch.Generator().manual_seed(0))
        scaled = logits[0] / temperature
        if top_k is not None:
            scaled = scaled.masked_fill(scaled < scaled.sort(descending=True).values[top_k - 1], -torch.inf)
        share = torch.bincount(drawn, minlength=4) / len(drawn)
        assert torch.allclose(share, scaled.softmax(-1), atol=0.012)


def test_end_of_document_fills_up_and_stops(arch):
    model = lively_model(arch)
    prompt = torch.randint(37, (2, 4), generator=torch.Generator().manual_seed(6))
    free = generate(model, prompt, 10)
    eod = int(free[0, 6])
    stopped = generate(model, prompt, 10, eod_id=eod)
    assert torch.equal(
        stopped[0, : 4 + free[0, 4:].tolist().index(eod)], free[0, : 4 + free[0, 4:].tolist().index(eod)]
    )
    for row in stopped[:, 4:].tolist():
        if eod in row:
            assert set(row[row.index(eod) :]) == {eod}
    alone = generate(model, prompt[0], 10, eod_id=eod)
    assert alone.shape[1] == 4 + free[0, 4:].tolist().index(eod) + 1


def test_no_new_tokens_returns_the_prompt(arch):
    assert generate(lively_model(arch), torch.arange(4), 0).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (torch.zeros(0, dtype=torch.long), {}, "at least one token"),
        (torch.zeros(1, 2, 3, dtype=torch.long), {}, "(T,) or (B, T)"),
        (torch.zeros(3), {}, "integers"),
        (torch.tensor([1, 37]), {}, "[0, 37)"),
        (torch.tensor([-1]), {}, "[0, 37)"),
        (torch.arange(3), {"max_new_tokens": -1}, "max_new_tokens"),
        (torch.arange(3), {"temperature": -0.1}, "temperature"),
        (torch.arange(3), {"top_k": 0}, "top_k"),
        (torch.arange(3), {"prefill_chunk": 0}, "chunk"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompt, settings, message):
    with pytest.raises(ValueError) as error:
        generate(lively_model("transformer"), prompt, **{"max_new_tokens": 2, **settings})
    assert message in str(error.value)
