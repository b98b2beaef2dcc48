"""Generation with a state (mLSTM) or a cache (attention): read the prompts, then one token a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from xlstm_scaling.inference.decoder import make_decoder
from xlstm_scaling.models import LanguageModel

#: steps between two looks at the stop condition on a GPU, each of which waits for the device
STEPS_BETWEEN_CHECKS = 16
#: steps whose random numbers go to the device at a time
STEPS_DRAWN = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    ``temperature``: 0 takes the most likely token, otherwise that of the softmax that is sampled. ``top_k``: sample
    among the k most likely tokens. ``top_p``: among the fewest most likely tokens (of those k) whose probabilities sum
    to p or more (Holtzman et al., 2020). ``seed``: sequence i of a batch draws with ``seed + i``.

    Raises:
        ValueError: a setting outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def uniforms(self, batch: int, steps: int = STEPS_DRAWN) -> Iterator[Tensor]:
        """What the draws are made from, ``steps`` at a time, the same for any number: (B, steps) fp64 in [0, 1)."""
        rows = [np.random.default_rng(self.seed + row) for row in range(batch)]
        while True:
            yield torch.from_numpy(np.stack([row.random(steps) for row in rows]))


GREEDY = Sampling()


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """Next tokens (B,) int64 of logits (B, V); ``uniform`` (B,) fp64 in [0, 1), if they are sampled.

    A draw inverts the cumulative distribution in fp64: equal logits and numbers give equal tokens on every device.
    """
    if uniform is None:
        return logits.argmax(-1)
    logits, index = logits.double(), None
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits, index = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    elif sampling.top_p is not None:
        logits, index = logits.sort(dim=-1, descending=True, stable=True)
    share = logits.softmax(-1)
    total = share.cumsum(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        total = share.masked_fill(total - share >= sampling.top_p, 0.0).cumsum(-1)
    choice = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)  # never one of share 0
    choice = choice.clamp_max(logits.shape[-1] - 1)
    return (choice if index is None else index.gather(-1, choice))[:, 0]


@torch.inference_mode()
def prefill(model: LanguageModel, tokens: Tensor, state: list, chunk: int | None = None) -> tuple[Tensor, list]:
    """Read a prompt on top of ``state``, ``chunk`` tokens at a time.

    Activations of one chunk are in memory at once, so memory does not grow with the prompt beyond the state itself.

    Args:
        model: a language model.
        tokens: (B, T) int64, T of at least 1; on any device, a chunk at a time goes to the model's.
        state: of ``model.init_state``, with room for T more tokens; a cache is filled in place.
        chunk: tokens of one forward pass; None reads all at once.

    Returns:
        Logits of the last token (B, V), and the state after T tokens.

    Raises:
        ValueError: no token, a chunk below 1, or a cache that is too short.
    """
    length, device = tokens.shape[1], model.head.weight.device
    if length < 1:
        raise ValueError("prefill needs at least one token")
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill chunk must be at least 1 token, got {chunk}")
    start = 0
    while chunk is not None and length - start > chunk:
        _, state = model.hidden(tokens[:, start : start + chunk].to(device), None, state)  # no logits but the last
        start += chunk
    return model.prefill(tokens[:, start:].to(device), state)


@torch.inference_mode()
def prefill_batch(
    model: LanguageModel, prompts: Sequence[Tensor], room: int, chunk: int | None = None, state: list | None = None
) -> tuple[Tensor, list]:
    """Read prompts of any lengths, longest first, into one state with room for ``room`` more tokens of each.

    Prompts of one length are read together, others apart; a cache is aligned at its end, so that all sequences go on
    in the same slot, at positions of their own.

    Args:
        model: a language model.
        prompts: B tensors (T_i,) int64, T_i not increasing.
        room: tokens to come.
        chunk: tokens of one forward pass; None reads a prompt at once.
        state: an empty state to read into; by default a new one.

    Returns:
        Logits of the last tokens (B, V), and the state of the batch.
    """
    longest = len(prompts[0])
    if state is None:
        state = model.init_state(len(prompts), longest + room)
    if len(prompts[-1]) == longest:
        return prefill(model, torch.stack(list(prompts)), state, chunk)
    logits, start = [], 0
    for length, group in groupby(prompts, len):
        tokens = torch.stack(list(group))
        rows, padding = slice(start, start + len(tokens)), longest - length
        part = [block.take_rows(whole, rows, padding) for block, whole in zip(model.blocks, state)]
        last, part = prefill(model, tokens, part, chunk)
        for block, whole, one in zip(model.blocks, state, part):
            block.put_rows(whole, rows, one, padding)
        logits.append(last)
        start = rows.stop
    return torch.cat(logits), state


def state_bytes(model: LanguageModel, batch: int, length: int) -> int:
    """Bytes of the state or cache of a batch with room for ``length`` tokens, of a model on the meta device."""
    states = model.init_state(batch, length)
    return sum(x.nbytes for state in states for x in (state if isinstance(state, tuple) else (state.k, state.v)))


def _check_prompt(model: LanguageModel, prompt: Tensor, name: str = "prompt_ids") -> Tensor:
    if prompt.numel() == 0:
        raise ValueError(f"{name} must hold at least one token")
    if prompt.is_floating_point() or prompt.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {prompt.dtype}")
    vocab_size, least, most = model.shape.vocab_size, int(prompt.min()), int(prompt.max())
    if least < 0 or most >= vocab_size:
        raise ValueError(f"{name} must lie in [0, {vocab_size}), the vocabulary, got {least} to {most}")
    return prompt.long()


@torch.inference_mode()
def stream(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    prefill_chunk: int | None = None,
    eod_id: int | None = None,
    steps: int | None = None,
    decoder: str = "auto",
) -> Iterator[Tensor]:
    """Continue prompts of any lengths together, and hand out what is new as it comes.

    A sequence's logits are those that it has alone. Tokens stay on the device; only the stop condition is looked at.

    Args:
        model: a language model; its mode and its weights stay as they are.
        prompts: B tensors (T_i,) of integers.
        max_new_tokens: most tokens to add to each.
        sampling: how tokens are chosen.
        prefill_chunk: tokens of a prompt in one forward pass; None reads it at once.
        eod_id: a sequence that produced this token is over and filled up with it; all over, generation stops.
        steps: tokens handed out at a time; by default 1 on a CPU, STEPS_BETWEEN_CHECKS elsewhere.
        decoder: what makes the tokens after the first, a kind of `make_decoder`.

    Yields:
        (B, k) int64 on the model's device: first one token each, then up to ``steps``.

    Raises:
        ValueError: no or an empty prompt, an id outside the vocabulary, or a setting outside its range.
        DecoderError: the decoder that was asked for by name cannot serve the model.
    """
    if not prompts:
        raise ValueError("there is no prompt")
    several = len(prompts) > 1
    checked = [_check_prompt(model, p, f"prompt {i}" if several else "prompt") for i, p in enumerate(prompts, 1)]
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if max_new_tokens == 0:
        return
    device, batch = model.head.weight.device, len(checked)
    steps = steps or (1 if device.type == "cpu" else STEPS_BETWEEN_CHECKS)
    order = sorted(range(batch), key=lambda i: -len(checked[i]))
    inverse = torch.tensor(sorted(range(batch), key=order.__getitem__), device=device)
    ordered = order == list(range(batch))
    uniforms, drawn = sampling.uniforms(batch), None
    ready = [checked[i] for i in order]
    length, greedy = len(ready[0]), sampling.temperature == 0
    run = make_decoder(model, batch, length + max_new_tokens, decoder if max_new_tokens > 1 else "torch", length)
    logits, state = prefill_batch(model, ready, max_new_tokens, prefill_chunk, run.start())
    run.take(state)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    token: Tensor | None = None
    block, over = [], []
    for step in range(max_new_tokens):
        if not greedy and step % STEPS_DRAWN == 0:
            drawn = next(uniforms)[order].to(device)
        if token is None or not greedy:
            logits = logits if token is None else run.step(token)
            token = choose(logits, sampling, None if drawn is None else drawn[:, step % STEPS_DRAWN])
        else:
            token = run.greedy(token)
        if eod_id is not None:
            token = token.masked_fill(finished, eod_id)
            finished = finished | (token == eod_id)
            over.append(finished.all())
        block.append(token)
        last = step + 1 == max_new_tokens
        if last or step % steps == 0:
            new = torch.stack(block, 1)
            new = new if ordered else new[inverse]
            if over and bool(over[-1]):
                yield new[:, : torch.stack(over).tolist().index(True) + 1]
                return
            yield new
            block, over = [], []


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    prefill_chunk: int | None = None,
    eod_id: int | None = None,
    top_p: float | None = None,
    decoder: str = "auto",
) -> Tensor:
    """Continue prompts of one length; settings as in `Sampling` and `stream`.

    Args:
        model: a language model; its mode and its weights stay as they are.
        prompt_ids: (T,) or (B, T) integers.
        max_new_tokens: most tokens to add.
        temperature, top_k, top_p, seed: how tokens are chosen.
        prefill_chunk: tokens of the prompt in one forward pass; None reads it at once.
        eod_id: a sequence that produced this token is over and filled up with it; all over, generation stops.
        decoder: what makes the tokens after the first, a kind of `make_decoder`.

    Returns:
        (B, T + n) int64 with n ≤ ``max_new_tokens``: the prompts followed by what was generated, on the model's device.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or a setting outside its range.
    """
    prompt = prompt_ids[None] if prompt_ids.dim() == 1 else prompt_ids
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise ValueError(f"prompt_ids must be (T,) or (B, T) with at least one token, got {tuple(prompt_ids.shape)}")
    prompt = _check_prompt(model, prompt).to(model.head.weight.device)
    sampling = Sampling(temperature, top_k, top_p, seed)
    new = stream(model, list(prompt), max_new_tokens, sampling, prefill_chunk, eod_id, decoder=decoder)
    return torch.cat([prompt, *new], dim=1)


@torch.inference_mode()
def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    prefill_chunk: int | None = None,
    eod_id: int | None = None,
    decoder: str = "auto",
) -> list[Tensor]:
    """Continue prompts (T_i,) of any lengths together -> (n_i,) int64 of each: what is new, up to its end of document.

    Arguments and errors as in `stream`.
    """
    new = list(stream(model, prompts, max_new_tokens, sampling, prefill_chunk, eod_id, decoder=decoder))
    rows = torch.cat(new, 1) if new else torch.zeros(len(prompts), 0, dtype=torch.int64)
    return [until_end(row, eod_id) for row in rows]


def until_end(row: Tensor, eod_id: int | None) -> Tensor:
    """Tokens (n,) up to the first end of document, which is included."""
    ends = [] if eod_id is None else (row == eod_id).nonzero()[:1, 0].tolist()
    return row[: ends[0] + 1] if ends else row
