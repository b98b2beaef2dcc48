"""Generation on the state or cache against the full forward pass."""

import itertools
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from lively import lively_model
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_scaling.inference.generation import (
    Sampling,
    choose,
    generate,
    generate_batch,
    prefill,
    prefill_batch,
    stream,
)
from xlstm_scaling.inference.timing import _release_freed_memory, _resident_peak

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}


def steady_model(arch, dtype=torch.float32):
    """A lively model whose input gates are half closed: no small normaliser magnifies rounding."""
    model = lively_model(arch, dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gates.bias" in name:
                p[: len(p) // 2] -= 3
            elif p.dim() == 2:
                p *= 0.5
    return model


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
    assert torch.equal(first[:, :15], generate(model, prompt, 10, temperature=2.0, seed=1))
    assert not torch.equal(first, generate(model, prompt, 30, temperature=2.0, seed=2))
    assert torch.equal(generate(model, prompt, 9, temperature=5.0, top_k=1), generate(model, prompt, 9))
    assert torch.equal(generate(model, prompt, 9, temperature=1e-300), generate(model, prompt, 9))


LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -3.0])  # shares .076 .206 .561 .028 .125 .004
KEPT = [
    ({}, [0, 1, 2, 3, 4, 5]),
    ({"temperature": 0.7}, [0, 1, 2, 3, 4, 5]),
    ({"top_k": 2}, [1, 2]),
    ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
    ({"top_p": 1e-9}, [2]),
    ({"top_p": 0.5}, [2]),
    ({"top_p": 0.6}, [1, 2]),
    ({"top_p": 0.85}, [1, 2, 4]),
    ({"top_p": 1.0}, [0, 1, 2, 3, 4, 5]),
    ({"top_p": 0.6, "temperature": 3.0}, [1, 2, 4]),  # shares .151 .211 .295 .108 .179 .056
    ({"top_k": 3, "top_p": 0.9}, [1, 2, 4]),
    ({"top_k": 2, "top_p": 0.7}, [2]),  # .73 of the two that are kept
]


@pytest.mark.parametrize(("settings", "kept"), KEPT, ids=str)
def test_samples_follow_the_softmax_of_the_kept_logits(settings, kept):
    """Chi-square at one in 10,000; the draws are fixed by the seed."""
    draws = 20_000
    sampling = Sampling(**{"temperature": 1.0, **settings})
    uniform = next(Sampling(temperature=1.0, seed=4).uniforms(1, draws))[0]
    drawn = choose(LOGITS.expand(draws, -1), sampling, uniform)
    seen = torch.bincount(drawn, minlength=len(LOGITS)).numpy()
    assert np.flatnonzero(seen).tolist() == kept
    expected = (LOGITS[kept] / sampling.temperature).double().softmax(-1).numpy() * draws
    if len(kept) > 1:
        assert chisquare(seen[kept], expected * draws / expected.sum()).pvalue > 1e-4


def test_random_numbers_do_not_depend_on_how_many_come_at_a_time():
    few, many = Sampling(1.0, seed=2).uniforms(3, 5), next(Sampling(1.0, seed=2).uniforms(3, 20))
    assert torch.equal(torch.cat([next(few) for _ in range(4)], 1), many)
    assert torch.equal(many[1:], next(Sampling(1.0, seed=3).uniforms(2, 20)))


def test_draws_at_the_ends_of_the_unit_interval_are_of_kept_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, Sampling(1.0), ends).tolist() == [1, 2]
    tied = torch.zeros(2, 5)  # the kept set has the size asked for, whatever is tied
    drawn = choose(tied.expand(2, 5).repeat(500, 1), Sampling(1.0, top_k=2), torch.rand(1000, dtype=torch.float64))
    assert len(set(drawn.tolist())) == 2


LENGTHS = [[9, 1, 5], [4, 11, 4, 1, 11], [3, 3]]


def unequal_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(37, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, None), (torch.float32, 3), (torch.float64, 3)], ids=str)
@torch.inference_mode()
def test_logits_of_unequal_prompts_are_those_of_each_alone(arch, dtype, lengths, chunk):
    model, steps = steady_model(arch, dtype), 14
    prompts = sorted(unequal_prompts(lengths), key=len, reverse=True)
    follow = torch.randint(37, (len(prompts), steps), generator=torch.Generator().manual_seed(9))
    logits, state = prefill_batch(model, prompts, steps, chunk)
    together = [logits]
    for piece in follow.split([1, 1, 4, 1, 7], 1):  # decoding by one token and by several
        hidden, state = model.hidden(piece, None, state)
        together += model.logits(hidden).unbind(1)
    together = torch.stack(together, 1)
    for row, prompt in enumerate(prompts):
        alone, single = prefill(model, prompt[None], model.init_state(1, len(prompt) + steps), chunk)
        alone = [alone]
        for token in follow[row, :, None, None]:
            logits, single = model.prefill(token, single)
            alone.append(logits)
        full = model(torch.cat([prompt, follow[row]])[None])[0, len(prompt) - 1 :]
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert full.std() > 0.3
        assert (together[row] - torch.cat(alone)).abs().max() < tolerance
        assert (together[row] - full).abs().max() < tolerance


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_k=20, top_p=0.9, seed=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_tokens_of_unequal_prompts_are_those_of_each_alone(arch, lengths, sampling):
    model, prompts = steady_model(arch), unequal_prompts(lengths, 1)
    together = generate_batch(model, prompts, 12, sampling, prefill_chunk=4)
    for row, (prompt, new) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = generate_batch(model, [prompt], 12, replace(sampling, seed=sampling.seed + row))
        assert torch.equal(new, alone)


def test_unequal_prompts_end_each_at_its_end_of_document(arch):
    model, prompts = steady_model(arch), unequal_prompts([6, 2, 4], 2)
    free = generate_batch(model, prompts, 12)
    eod = int(free[1][3])
    for new, all_new in zip(generate_batch(model, prompts, 12, eod_id=eod), free, strict=True):
        expected = all_new.tolist()
        assert new.tolist() == expected[: expected.index(eod) + 1] if eod in expected else expected


@pytest.mark.parametrize("steps", [1, 3, 5, 100])
def test_tokens_do_not_depend_on_how_many_come_at_a_time(arch, steps):
    model, prompts = steady_model(arch), unequal_prompts([5, 3], 3)
    eod = int(generate_batch(model, prompts, 12)[0][7])
    for eod_id in (None, eod):
        expected = torch.cat(list(stream(model, prompts, 12, eod_id=eod_id)), 1)
        blocks = list(stream(model, prompts, 12, eod_id=eod_id, steps=steps))
        assert torch.equal(torch.cat(blocks, 1), expected)
        assert blocks[0].shape[1] == 1
        assert max(block.shape[1] for block in blocks) <= steps


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation made [elements], views of others included."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_prefill_of_the_xlstm_makes_no_tensor_that_grows_with_the_prompt():
    model, largest = lively_model("xlstm", embedding_dim=8, num_blocks=1, num_heads=1, chunk=64), {}
    for length in (500, 3_000):
        tokens = torch.randint(37, (1, length))
        with Sizes() as sizes:
            prefill(model, tokens, model.init_state(1, length), 128)
        largest[length] = sizes.largest
    assert largest[500] == largest[3_000] >= 128 * 8


def test_memory_of_a_long_prompt_is_that_of_a_short_one():
    """200,000 tokens: hidden states alone would take 26 MB, logits 30 MB, the tokens are 1.6 MB."""
    model, rise = lively_model("xlstm", embedding_dim=32, num_blocks=1, num_heads=1, chunk=64), {}
    for length in (4_096, 4_096, 200_000):  # the first warms up
        tokens = torch.zeros(1, length, dtype=torch.int64)
        _release_freed_memory()
        before = psutil.Process().memory_info().rss
        with _resident_peak() as peak:
            prefill(model, tokens, model.init_state(1, length), 2048)
            rise[length] = peak() - before
    assert rise[200_000] < rise[4_096] + 8e6


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
        (torch.arange(3), {"top_p": 0.0}, "top_p"),
        (torch.arange(3), {"top_p": 1.1}, "top_p"),
        (torch.arange(3), {"seed": -1}, "seed"),
        (torch.arange(3), {"prefill_chunk": 0}, "chunk"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompt, settings, message):
    with pytest.raises(ValueError) as error:
        generate(lively_model("transformer"), prompt, **{"max_new_tokens": 2, **settings})
    assert message in str(error.value)
