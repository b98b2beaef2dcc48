"""Decoding on a GPU: a step is one CUDA graph, replayed; nothing waits for the host.

Tokens, positions, state and results are static tensors. A graph has fixed shapes, so the attention of a step reads a
fixed number of slots, its span, with a mask of those that are filled: one graph a span, each up to a quarter longer
than the one before, so that at most a fifth of the slots that are read are empty. (One graph over the whole cache would
read all of it for every token; the position is on the device either way, so a span serves every length in it.) An xLSTM
has one graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_scaling.inference.decoder import Decoder
from xlstm_scaling.kernels.rotary_attention import rotate
from xlstm_scaling.models import LanguageModel
from xlstm_scaling.models.transformer import KVCache, TransformerBlock, rotary_angles
from xlstm_scaling.models.xlstm import XLSTMBlock

#: slots of the shortest span, and what spans are multiples of
SHORTEST_SPAN = 256
#: eager steps before a capture: Triton compiles, libraries allocate
WARM_UP_STEPS = 3


def span_of(slots: int, max_length: int) -> int:
    """Slots that the step reads which fills slot number ``slots`` (from 1)."""
    if slots <= SHORTEST_SPAN:
        return min(SHORTEST_SPAN, max_length)
    quarter = max(SHORTEST_SPAN, 1 << ((slots - 1).bit_length() - 3))
    return min(-(-slots // quarter) * quarter, max_length)


class GraphDecoder(Decoder):
    """Static tensors, and on CUDA a graph over them; ``capture=False`` computes the same without a graph, anywhere."""

    @staticmethod
    def refusal(model: LanguageModel, quiet: bool = False) -> str | None:
        """Why it cannot serve a model, or None."""
        if unknown := {type(block) for block in model.blocks} - {XLSTMBlock, TransformerBlock}:
            return f"there is no graph for {', '.join(sorted(kind.__name__ for kind in unknown))}"
        if model.head.weight.device.type != "cuda":
            return f"the model is on {model.head.weight.device}, CUDA graphs need a GPU"
        return None

    def __init__(
        self, model: LanguageModel, batch_size: int, max_length: int, prompt_length: int = 0, capture: bool = True
    ) -> None:
        super().__init__(model, batch_size, max_length)
        self._capture, self._graphs, self._pool = capture, {}, None
        device, wide = model.head.weight.device, model.compute_dtype == torch.float64
        with torch.inference_mode(False):
            self._tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self._best = torch.zeros_like(self._tokens)
            self._slot = torch.zeros(1, dtype=torch.int64, device=device)
            self._padding = torch.zeros_like(self._tokens)
            size = (batch_size, model.shape.vocab_size)
            self._logits = torch.zeros(size, dtype=torch.float64 if wide else torch.float32, device=device)
        if capture and self.cached:
            for span in sorted({span_of(slots, max_length) for slots in range(prompt_length + 1, max_length + 1)}):
                self._graph(span)
        elif capture:
            self._graph(0)
        self.start()

    # the step, on static tensors alone

    @torch.no_grad()
    def compute(self, span: int) -> None:
        """One step from ``_tokens`` into ``_logits``, ``_best`` and the state; no number goes to the host."""
        model = self.model
        x = model.embedding(self._tokens[:, None]).to(model.compute_dtype)
        attend = self._reader(span) if self.cached else None
        for block, memory in zip(model.blocks, self.state):
            if isinstance(memory, KVCache):
                normed, x = block.ffn_norm.add(attend(block, block.attention_norm(x), memory), x)
                x = x + block.ffn(normed)
                continue
            x, new = block(x, None, memory)
            for static, made in zip(memory, new):  # Triton's step has updated C in place
                if static is not made:
                    static.copy_(made)
        if self.cached:
            self._slot.add_(1)
        self._logits.copy_(model.logits(model.norm(x)[:, -1]))
        torch.argmax(self._logits, -1, out=self._best)

    def _reader(self, span: int) -> Callable[[TransformerBlock, Tensor, KVCache], Tensor]:
        """Attention of this step's token to the first ``span`` slots: rotation and mask are those of all blocks."""
        attention = next(block.attention for block in self.model.blocks if isinstance(block, TransformerBlock))
        device = self._tokens.device
        cos, sin = rotary_angles(1, attention.head_dim, attention.theta, device, self._slot - self._padding)
        slots = torch.arange(span, device=device)
        seen = ((slots <= self._slot) & (slots >= self._padding[:, None]))[:, None, None]  # (B, 1, 1, span)
        return lambda block, x, cache: self._attend(block, x, cache, cos, sin, seen, span)

    def _attend(
        self, block: TransformerBlock, x: Tensor, cache: KVCache, cos: Tensor, sin: Tensor, seen: Tensor, span: int
    ) -> Tensor:
        attention = block.attention
        qkv = attention.qkv(x).view(len(x), 1, 3, attention.heads, attention.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        cache.k.index_copy_(2, self._slot, rotate(k, cos, sin))
        cache.v.index_copy_(2, self._slot, v)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), cache.k[:, :, :span], cache.v[:, :, :span], seen)
        return attention.out(y.transpose(1, 2).reshape(len(x), 1, -1))

    # graphs

    def _graph(self, span: int) -> torch.cuda.CUDAGraph:
        """The graph of a span, captured when it is first asked for: the state is kept."""
        if span not in self._graphs:
            with torch.inference_mode(False):
                slot = self._slot.clone()
                states = [memory for memory in self.state if not isinstance(memory, KVCache)]
                kept = [[x.clone() for x in memory] for memory in states]
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_STEPS):
                        self._slot.copy_(slot)  # what it writes there, the next real step overwrites
                        self.compute(span)
                torch.cuda.current_stream().wait_stream(stream)
                self._slot.copy_(slot)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool):
                    self.compute(span)
                for memory, before in zip(states, kept):
                    for x, y in zip(memory, before):
                        x.copy_(y)
            self._pool = self._pool or graph.pool()
            self._graphs[span] = graph
        return self._graphs[span]

    def _taken(self) -> None:
        if self.cached:
            self._slot.fill_(self.length)
            self._padding.zero_() if self.padding is None else self._padding.copy_(self.padding)

    def _run(self, tokens: Tensor) -> None:
        self._check_room()
        self._tokens.copy_(tokens)
        span = span_of(self.length + 1, self.max_length) if self.cached else 0
        if self._capture:
            self._graph(span).replay()
        else:
            self.compute(span)
        for cache in self.caches:
            cache.length += 1

    def step(self, tokens: Tensor) -> Tensor:
        self._run(tokens)
        return self._logits

    def greedy(self, tokens: Tensor) -> Tensor:
        self._run(tokens)
        return self._best.clone()
