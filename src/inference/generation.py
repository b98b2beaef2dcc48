"""Generation with a state (xLSTM) or a cache (Transformer): read the prompt, then one token a step."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_scaling.models import LanguageModel


@torch.inference_mode()
def prefill(model: LanguageModel, tokens: Tensor, state: list, chunk: int | None = None) -> tuple[Tensor, list]:
    """Read a prompt on top of ``state``, ``chunk`` tokens at a time.

    Activations of one chunk are in memory at once, so memory does not grow with the prompt beyond the state itself.

    Args:
        model: a language model.
        tokens: (B, T) int64, T of at least 1.
        state: of ``model.init_state``, with room for T more tokens; a cache is filled in place.
        chunk: tokens of one forward pass; None reads all at once.

    Returns:
        Logits of the last token (B, V), and the state after T tokens.

    Raises:
        ValueError: no token, a chunk below 1, or a cache that is too short.
    """
    length = tokens.shape[1]
    if length < 1:
        raise ValueError("prefill needs at least one token")
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill chunk must be at least 1 token, got {chunk}")
    start = 0
    while chunk is not None and length - start > chunk:
        _, state = model.hidden(tokens[:, start : start + chunk], None, state)  # no logits before the last token
        start += chunk
    return model.prefill(tokens[:, start:], state)


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Next tokens (B,) int64 of logits (B, V): the largest at temperature 0, else a draw.

    Drawn from softmax(logits / temperature); ``top_k`` keeps the k largest logits.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kept, index = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        choice = torch.multinomial(kept.softmax(-1), 1, generator=generator)
        return index.gather(-1, choice)[:, 0]
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check_prompt(model: LanguageModel, prompt_ids: Tensor) -> Tensor:
    prompt = prompt_ids[None] if prompt_ids.dim() == 1 else prompt_ids
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise ValueError(f"prompt_ids must be (T,) or (B, T) with at least one token, got {tuple(prompt_ids.shape)}")
    if prompt.is_floating_point() or prompt.dtype == torch.bool:
        raise ValueError(f"prompt_ids must be integers, got {prompt.dtype}")
    vocab_size = model.shape.vocab_size
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab_size:
        raise ValueError(f"prompt_ids must lie in [0, {vocab_size}), got {int(prompt.min())} to {int(prompt.max())}")
    return prompt.long().to(model.head.weight.device)


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
) -> Tensor:
    """Continue prompts of one length.

    Args:
        model: a language model; its mode and its weights stay as they are.
        prompt_ids: (T,) or (B, T) integers.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the most likely token, otherwise the temperature of the softmax that is sampled.
        top_k: sample among the k most likely tokens; None among all.
        seed: of the samples; the same seed gives the same tokens on the same machine.
        prefill_chunk: tokens of the prompt in one forward pass; None reads it at once.
        eod_id: a sequence that produced this token is over and filled up with it; all over, generation stops.

    Returns:
        (B, T + n) int64 with n ≤ ``max_new_tokens``: the prompts followed by what was generated, on the model's device.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or a setting outside its range.
    """
    prompt = _check_prompt(model, prompt_ids)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if max_new_tokens == 0:
        return prompt
    batch, length = prompt.shape
    generator = None if temperature == 0 else torch.Generator(prompt.device).manual_seed(seed)
    logits, state = prefill(model, prompt, model.init_state(batch, length + max_new_tokens), prefill_chunk)
    finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    tokens = [prompt]
    for step in range(max_new_tokens):
        token = sample(logits, temperature, top_k, generator)
        if eod_id is not None:
            token = token.masked_fill(finished, eod_id)
            finished |= token == eod_id
        tokens.append(token[:, None])
        if step + 1 == max_new_tokens or bool(finished.all()):
            break
        logits, state = model.prefill(token[:, None], state)
    return torch.cat(tokens, dim=1)
