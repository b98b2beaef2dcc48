"""What every language model here is: embedding, a stack of blocks, a norm, an untied head with soft-capped logits."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlstm_scaling.accounting import ModelShape, architecture
from xlstm_scaling.kernels.cross_entropy import soft_cap
from xlstm_scaling.models.layers import NORM_EPS, Linear, RMSNorm, fast, small_init_

LOGIT_CAP = 30.0
#: an operation of ``kernels``, and the form (None = the fastest) and backend that are asked for
Operation = tuple[str, str | None, str]


class Block(nn.Module, ABC):
    """A residual block: sequence mixing, then feed-forward."""

    @classmethod
    @abstractmethod
    def operations(cls, **options: Any) -> list[Operation]:
        """What training a block with these options asks ``kernels.select`` for."""

    @abstractmethod
    def forward(self, x: Tensor, document_starts: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """x (B, T, d), document_starts (B, T) bool or None, state or None -> x, state after T tokens.

        Without a state the block reads from an empty context and returns ``None`` as state.
        """

    @abstractmethod
    def init_state(self, batch_size: int, max_length: int, dtype: torch.dtype) -> Any:
        """An empty state for up to ``max_length`` tokens."""

    @abstractmethod
    def take_rows(self, state: Any, rows: slice, padding: int) -> Any:
        """The empty state of some sequences of an empty ``state``, which read ``padding`` tokens less than others."""

    @abstractmethod
    def put_rows(self, state: Any, rows: slice, part: Any, padding: int) -> None:
        """Put what these sequences have read into ``state``: all its rows are one batch then, ``padding`` apart."""

    @abstractmethod
    def reset_parameters(self, num_blocks: int, generator: torch.Generator | None) -> None:
        """Initialise (models.md, "Initialisation")."""


class LanguageModel(nn.Module):
    """Token ids in, losses or logits out. ``shape`` fixes every dimension.

    ``compute_dtype``: dtype of activations and matrix products; parameters are fp32 master weights.
    ``norm_eps``: of every norm. ``options``: of the blocks.
    """

    #: the blocks of this architecture, by the kind that its accounting names
    kinds: ClassVar[dict[str, type[Block]]]
    #: keep only the inputs of blocks for the backward pass, which computes the rest again (Chen et al., 2016)
    activation_checkpointing = False

    def __init__(
        self,
        shape: ModelShape,
        compute_dtype: torch.dtype = torch.float32,
        logit_cap: float | None = LOGIT_CAP,
        seed: int | None = None,
        norm_eps: float = NORM_EPS,
        **options: Any,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.compute_dtype = compute_dtype
        self.logit_cap = logit_cap
        self.embedding = nn.Embedding(shape.vocab_size, shape.embedding_dim)
        blocks = architecture(shape.arch).block_shapes(shape)
        chosen = self.options_by_kind(options)
        self.blocks = nn.ModuleList(self.kinds[one.arch](one, norm_eps=norm_eps, **chosen[one.arch]) for one in blocks)
        self.norm = RMSNorm(shape.embedding_dim, norm_eps)
        self.head = Linear(shape.embedding_dim, shape.vocab_size)
        self.reset_parameters(seed)

    @classmethod
    def operations(cls, **options: Any) -> list[Operation]:
        """What training a model with these options of its blocks asks ``kernels.select`` for; each is certified."""
        own: list[Operation] = [("rms_norm", None, "auto"), ("linear_cross_entropy", None, "auto")]
        chosen = cls.options_by_kind(options)
        asked = [operation for kind, block in cls.kinds.items() for operation in block.operations(**chosen[kind])]
        return list(dict.fromkeys([*asked, *own]))

    @classmethod
    def options_by_kind(cls, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The options that each kind of block takes. Raises TypeError on one that none of them has."""
        known = {kind: signature(block).parameters.keys() & options.keys() for kind, block in cls.kinds.items()}
        if unknown := options.keys() - set().union(*known.values()):
            raise TypeError(f"{cls.__name__} has no option {', '.join(sorted(unknown))}")
        return {kind: {name: options[name] for name in options if name in names} for kind, names in known.items()}

    def reset_parameters(
        self, seed: int | None = None, around: Callable[[Block], AbstractContextManager] = nullcontext
    ) -> None:
        """Initialise all parameters from ``seed`` alone (from the global generator where it is None).

        ``around``: entered for each block while it is initialised, one after the other.
        """
        generator = None if seed is None else torch.Generator(device=self.head.weight.device).manual_seed(seed)
        small_init_(self.embedding.weight, self.shape.embedding_dim, generator)
        small_init_(self.head.weight, self.shape.embedding_dim, generator)
        for block in self.blocks:
            with around(block):
                block.reset_parameters(self.shape.num_blocks, generator)

    def compile_blocks(self, cache: Path) -> None:
        """Compile every block with torch.compile for the shapes it meets; ``cache`` is shared by processes.

        Norms and gates become PyTorch's, fused by the compiler; the mLSTM and attention stay what they are.
        """
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache).absolute()))
        for block in self.blocks:
            block.compile(dynamic=False)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def init_state(self, batch_size: int, max_length: int) -> list:
        """An empty state (or cache) for every block."""
        return [block.init_state(batch_size, max_length, self.compute_dtype) for block in self.blocks]

    def hidden(
        self, tokens: Tensor, document_starts: Tensor | None = None, state: list | None = None
    ) -> tuple[Tensor, list]:
        """tokens (B, T) int64 -> normed hidden (B, T, d), list of block states (None without ``state``)."""
        x = self.embedding(tokens).to(self.compute_dtype)
        states = []
        again = self.activation_checkpointing and state is None and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            if again:
                x, block_state = checkpoint(block, x, document_starts, use_reentrant=False, preserve_rng_state=False)
            else:
                x, block_state = block(x, document_starts, None if state is None else state[index])
            states.append(block_state)
        return self.norm(x), states

    def forward(self, tokens: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 -> soft-capped logits (B, T, V) in fp32 (fp64 in a double model)."""
        return self.logits(self.hidden(tokens, document_starts)[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., d) -> soft-capped logits (..., V)."""
        logits = self.head(hidden)
        return soft_cap(logits if logits.dtype == torch.float64 else logits.float(), self.logit_cap)

    def loss(self, tokens: Tensor, targets: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """tokens, targets (B, T) int64, document_starts (B, T) bool or None -> mean loss [nat/token], scalar."""
        hidden, _ = self.hidden(tokens, document_starts)
        loss = fast("linear_cross_entropy", hidden)
        return loss(hidden.flatten(0, 1), self.head.weight, targets.flatten(), self.logit_cap)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, state: list) -> tuple[Tensor, list]:
        """Read tokens (B, T) on top of ``state`` -> logits of the last token (B, V), state."""
        hidden, state = self.hidden(tokens, None, state)
        return self.logits(hidden[:, -1]), state

    def decay_groups(self, weight_decay: float) -> list[dict]:
        """Optimiser groups: weight decay on the weights of linear layers only."""
        linear = {id(m.weight) for m in self.modules() if isinstance(m, nn.Linear)}
        decay = [p for p in self.parameters() if id(p) in linear]
        rest = [p for p in self.parameters() if id(p) not in linear]
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
