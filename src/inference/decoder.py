"""Decoding: one token of every sequence a step, by the fastest program that there is for the model's device.

A ``Decoder`` is bound to a model, a batch size and a maximum length, and holds the state or cache. Prompts are read by
the model into the decoder's own memory:

    decoder = make_decoder(model, batch_size, max_length)
    logits, state = model.prefill(prompts, decoder.start())
    decoder.take(state)
    logits = decoder.step(tokens)

On a CPU a step is one call of C++ for the whole model (``decoder_cpp``), on a GPU one CUDA graph (``decoder_graph``);
without either it is the model's own forward pass.
"""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from xlstm_scaling.accounting import parts
from xlstm_scaling.models import LanguageModel
from xlstm_scaling.models.transformer import KVCache

KINDS = ("auto", "torch", "cpp", "graph")
#: largest difference from the model's own logits, relative to the largest of them, by dtype of activations: what rounds
#: differently, magnified by a small normaliser; a wrong kernel is off by about 1
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.03, torch.float64: 1e-8}
#: model -> (class of decoder, batch size) that have reproduced its logits
_verified: weakref.WeakKeyDictionary[LanguageModel, set[tuple[type, int]]] = weakref.WeakKeyDictionary()


class DecoderError(ValueError):
    """A decoder cannot serve a model, or does not reproduce its logits; the message says why."""


class Decoder(ABC):
    """Decodes with static memory: nothing is allocated but the results.

    ``batch_size`` sequences, up to ``max_length`` tokens each, the prompt's included (an xLSTM has no such limit).
    Weights are read where the model keeps them: they may be changed in place, not replaced.
    """

    def __init__(self, model: LanguageModel, batch_size: int, max_length: int) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size and max_length must be positive, got {batch_size} and {max_length}")
        self.model, self.batch_size, self.max_length = model, batch_size, max_length
        with torch.inference_mode(False):  # what it makes could not be changed elsewhere
            self.state: list[Any] = model.init_state(batch_size, max_length)

    @property
    def caches(self) -> list[KVCache]:
        """The memories of the attention blocks."""
        return [memory for memory in self.state if isinstance(memory, KVCache)]

    @property
    def cached(self) -> bool:
        """Whether there is any cache, with room for ``max_length`` tokens."""
        return any(isinstance(memory, KVCache) for memory in self.state)

    def start(self) -> list:
        """The decoder's own state, empty, for a prompt to be read into: give what comes back to ``take``."""
        for memory in self.state:
            if isinstance(memory, KVCache):
                memory.length, memory.padding = 0, None
            else:
                for x in memory:
                    x.zero_()
        return list(self.state)

    def take(self, state: list) -> None:
        """Go on from a state of the model for ``batch_size`` sequences. What is not the decoder's own is copied.

        Raises ValueError for another batch size, or for a cache of more tokens than ``max_length``.
        """
        if len(state) != len(self.state):
            raise ValueError(f"a state of {len(state)} blocks for a model of {len(self.state)}")
        for mine, given in zip(self.state, state):
            if not isinstance(mine, KVCache):
                if given.C.shape != mine.C.shape:
                    raise ValueError(f"a state {tuple(given.C.shape)}, the decoder's is {tuple(mine.C.shape)}")
                for x, y in zip(mine, given):
                    if x is not y:
                        x.copy_(y)
                continue
            if len(given.k) != self.batch_size or given.length > self.max_length:
                raise ValueError(
                    f"a cache of {len(given.k)} sequences and {given.length} tokens, "
                    f"the decoder has room for {self.batch_size} and {self.max_length}"
                )
            if given.k.data_ptr() != mine.k.data_ptr():
                mine.k[:, :, : given.length] = given.k[:, :, : given.length]
                mine.v[:, :, : given.length] = given.v[:, :, : given.length]
            mine.length, mine.padding = given.length, given.padding
        self._taken()

    def _taken(self) -> None:  # noqa: B027
        """Called when ``state`` has changed from outside."""

    def hand_back(self) -> list:
        """The state after the last step, for the model to go on with; ``take`` it again before the next step."""
        return list(self.state)

    @property
    def length(self) -> int:
        """Tokens in the cache, the padding of the longest row included; 0 in an xLSTM."""
        return self.caches[0].length if self.cached else 0

    @property
    def padding(self) -> Tensor | None:
        """Slots before the first token of every sequence (B,), in a batch of unequal lengths; None without a cache."""
        return self.caches[0].padding if self.cached else None

    def _check_room(self) -> None:
        if self.cached and self.length >= self.max_length:
            raise ValueError(f"KV cache holds {self.max_length} tokens, {self.length + 1} are needed")

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """tokens (B,) int64 on the model's device -> their next logits (B, V) fp32, overwritten by the next step.

        Raises ValueError where the cache is full; the state is then as it was.
        """

    def greedy(self, tokens: Tensor) -> Tensor:
        """tokens (B,) int64 -> the likeliest next tokens (B,) int64; errors as of ``step``."""
        return self.step(tokens).argmax(-1)


def attends(model: LanguageModel) -> bool:
    """Whether a model has a cache, of limited length."""
    return any(part.kind.attends for part in parts(model.shape))


class ModuleDecoder(Decoder):
    """The model's own forward pass: any device, any dtype."""

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        self._check_room()
        logits, self.state = self.model.prefill(tokens[:, None], self.state)
        return logits


def decoder_class(model: LanguageModel, kind: str = "auto") -> type[Decoder]:
    """The class of decoders for a model where it is; ``kind`` and errors as of `make_decoder`."""
    if kind not in KINDS:
        raise ValueError(f"decoder must be one of {', '.join(KINDS)}, got {kind!r}")
    chosen = kind
    if kind == "auto":
        chosen = {"cpu": "cpp", "cuda": "graph"}.get(model.head.weight.device.type, "torch")
    if chosen == "torch":
        return ModuleDecoder
    if chosen == "cpp":
        from xlstm_scaling.inference.decoder_cpp import CppDecoder as Fast
    else:
        from xlstm_scaling.inference.decoder_graph import GraphDecoder as Fast
    reason = Fast.refusal(model, kind == "auto")
    if reason is None:
        return Fast
    if kind != "auto":
        raise DecoderError(f"the decoder {kind!r} cannot be used: {reason}")
    return ModuleDecoder


def make_decoder(
    model: LanguageModel, batch_size: int, max_length: int, kind: str = "auto", prompt_length: int = 0
) -> Decoder:
    """A decoder for a model where it is, checked against the model.

    The first decoder of its class and batch size for a model has to reproduce the model's logits on random tokens (four
    tokens through the model). One that does not is never used: ``auto`` then warns and takes the model's forward pass.

    Args:
        model: in evaluation mode.
        batch_size, max_length: sequences, and most tokens of each, the prompt's included.
        kind: ``auto``, ``torch`` (the model's own forward pass), ``cpp`` (CPUs) or ``graph`` (CUDA).
        prompt_length: tokens that will be read before the first step; CUDA graphs are captured for what follows.

    Raises:
        ValueError: an unknown kind, or sizes that are not positive.
        DecoderError: the kind that was asked for cannot serve this model, or does not reproduce its logits.
    """
    chosen = decoder_class(model, kind)
    if chosen is ModuleDecoder or (max_length < 2 and attends(model)):  # nothing to decode
        return ModuleDecoder(model, batch_size, max_length)
    decoder = chosen(model, batch_size, max_length, prompt_length)
    known = _verified.setdefault(model, set())
    if (chosen, batch_size) in known:
        return decoder
    error, limit = logit_error(decoder), TOLERANCE[model.compute_dtype]
    if error <= limit:
        known.add((chosen, batch_size))
        return decoder
    reason = f"its logits differ by {error:.2g} of the largest from the model's, more than {limit:g}"
    if kind != "auto":
        raise DecoderError(f"the decoder {kind!r} cannot be used: {reason}")
    warnings.warn(f"{chosen.__name__} is not used: {reason}. Please report this.", stacklevel=2)
    return ModuleDecoder(model, batch_size, max_length)


@torch.no_grad()
def logit_error(decoder: Decoder, seed: int = 0) -> float:
    """The largest difference between a decoder's logits and its model's on random tokens, over the largest logit.

    Up to two tokens are read by the model, up to two decoded by both; the decoder's state is empty afterwards. Numbers
    that are not finite count as equal where both have them.
    """
    model, batch = decoder.model, decoder.batch_size
    length = min(4, decoder.max_length) if decoder.cached else 4
    read = max(1, length - 2)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.shape.vocab_size, (batch, length), generator=generator).to(model.head.weight.device)
    _, state = model.prefill(tokens[:, :read], model.init_state(batch, length))
    decoder.take(state)
    worst = 0.0
    for token in tokens[:, read:].unbind(1):
        got = decoder.step(token).nan_to_num()
        expected, state = model.prefill(token[:, None], state)
        expected = expected.nan_to_num()
        scale = expected.abs().max().clamp_min(1e-6)
        worst = max(worst, float((got - expected).abs().max() / scale))
    decoder.start()
    decoder._taken()
    return worst
