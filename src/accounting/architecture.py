"""What an architecture has to say about itself so that everything else can count it.

A kind of block (``BlockCounts``) says what one block has, costs, moves and keeps; an architecture, which blocks follow
each other. A new architecture adds one module beside ``xlstm.py`` and ``transformer.py`` and one entry in
``counts.ARCHITECTURES``: a ``UniformArchitecture`` where its block is new, an ``Architecture`` of known blocks as
``hybrid.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from xlstm_scaling.accounting.layout import Layout
from xlstm_scaling.accounting.shapes import ModelShape

#: FLOP conventions that are formulas; ``traced`` (torch's counter on the real model) lives with the models.
CONVENTIONS = ("paper", "chinchilla", "tfla", "6nd")


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one sequence, by part.

    ``linear``: matrix products of all linear layers and of the head; ``sequence_mixing``: attention or mLSTM cell;
    ``other``: biases and activations of the gates and the feed-forward.
    """

    linear: float
    sequence_mixing: float
    other: float

    @property
    def forward(self) -> float:
        """All parts together."""
        return self.linear + self.sequence_mixing + self.other

    @property
    def forward_backward(self) -> float:
        """The backward pass costs twice the forward pass, by convention."""
        return 3 * self.forward


class BlockCounts(ABC):
    """One kind of block: parameters, training FLOPs and memory, inference FLOPs, bytes and memory.

    All counts are exact integers where the formula is one (a chunk size that does not divide the context gives a
    fraction). T is the number of tokens of one sequence. ``act``, ``state``: bytes of an activation, which keys and
    values are too, and of a number of the mLSTM's state.
    """

    #: whether a step reads all tokens before it, so that chunks of a prompt need a mask
    attends: bool

    # parameters

    @abstractmethod
    def block_linear_params(self, shape: ModelShape) -> int:
        """Weights of the linear maps of one block (each costs 2 FLOPs a token), without biases."""

    @abstractmethod
    def block_other_params(self, shape: ModelShape) -> int:
        """Norm scales and biases of one block."""

    @abstractmethod
    def block_parameters(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Name -> dimensions of every parameter of one block, as in the model."""

    # training

    @abstractmethod
    def block_mixing_flops(self, shape: ModelShape, context_length: int, convention: str) -> float:
        """Forward FLOPs of the sequence mixing of one block over one sequence."""

    @abstractmethod
    def block_other_flops(self, shape: ModelShape, context_length: int) -> float:
        """Forward FLOPs of gate and feed-forward activations of one block over one sequence."""

    @abstractmethod
    def kept_activations(self, shape: ModelShape, context_length: int, layout: Layout) -> dict[str, float]:
        """Bytes by item that one block keeps from its forward to its backward pass, for one micro-batch: what each
        ``save_for_backward`` in ``kernels/`` names. Linear layers keep their input and, where they compute in another
        dtype, their weights in that dtype; norms their input. "block input" is one of the items."""

    @abstractmethod
    def backward_bytes(self, shape: ModelShape, context_length: int, layout: Layout) -> float:
        """Gradients of activations that live at once in the backward pass of a block: those around the feed-forward's
        activation and of the residual stream, or around sequence mixing, whichever is more. An estimate."""

    # inference, with the scalar factors of the runtime model: norm 3, skip 1, swish 1, sigmoid 1, softmax 5

    @abstractmethod
    def block_backbone_flops_per_token(self, shape: ModelShape) -> float:
        """Everything of a block that is not sequence mixing, one token."""

    @abstractmethod
    def block_prefill_mixing_flops(self, shape: ModelShape, prefill_length: int) -> float:
        """Sequence mixing of one block while one prompt of ``prefill_length`` tokens is read."""

    @abstractmethod
    def block_step_mixing_flops(self, shape: ModelShape, position: int) -> float:
        """Sequence mixing of one block for one generated token after ``position`` tokens."""

    @abstractmethod
    def block_prefill_mixing_bytes(self, shape: ModelShape, prefill_length: int, act: int, state: int) -> float:
        """Bytes moved by the sequence mixing of one block in prefill, one sequence."""

    @abstractmethod
    def block_step_mixing_bytes(self, shape: ModelShape, position: int, act: int, state: int) -> float:
        """Bytes moved by the sequence mixing of one block for one generated token, one sequence."""

    @abstractmethod
    def block_activation_bytes_per_token(self, shape: ModelShape, act: int) -> float:
        """Inputs read and outputs written by the linear layers and norms of one block, one token."""

    @abstractmethod
    def block_prefill_scores(self, shape: ModelShape, prefill_length: int) -> float:
        """Entries of the score matrices (query meets key) of one block in prefill, one sequence."""

    @abstractmethod
    def block_step_scores(self, shape: ModelShape, position: int) -> float:
        """Entries of the score matrices of one block for one generated token, one sequence."""

    @abstractmethod
    def prefill_streams(self, shape: ModelShape, prefill_length: int) -> float:
        """Parts of one sequence's mixing that are independent of each other in prefill."""

    @abstractmethod
    def block_state_bytes(self, shape: ModelShape, tokens: int, act: int) -> float:
        """Bytes that one block keeps of one sequence after ``tokens`` tokens: keys and values, or a state."""

    @abstractmethod
    def block_inference_bytes_per_token(self, shape: ModelShape, act: int) -> int:
        """Bytes of the activations around one block's sequence mixing while a prompt is read, as the models in
        ``models/`` allocate them, one token."""


@dataclass(frozen=True)
class Part:
    """``blocks`` blocks of one kind in a model; ``shape``: the model's, with the heads of this kind."""

    kind: BlockCounts
    shape: ModelShape
    blocks: int

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> dimensions of the parameters of one block."""
        return self.kind.block_parameters(self.shape)


class Architecture(ABC):
    """One family of models: their shapes, and which blocks they consist of."""

    #: as configs and tables name it, and as figures and reports do
    name: str
    label: str

    @abstractmethod
    def shape(
        self, embedding_dim: int, num_blocks: int, num_heads: int, vocab_size: int, chunk_size: int = 64,
        **options: int,
    ) -> ModelShape:  # fmt: skip
        """Derive head and feed-forward widths. Raises ValueError on dimensions that do not divide, TypeError on
        ``options`` that it has not."""

    @abstractmethod
    def block_shapes(self, shape: ModelShape) -> tuple[ModelShape, ...]:
        """The shape of every block, from the first to the last; ``arch`` names the kind of block."""

    @abstractmethod
    def kinds(self) -> dict[str, BlockCounts]:
        """The kinds of block by the name that ``block_shapes`` gives them."""

    def parts(self, shape: ModelShape) -> tuple[Part, ...]:
        """The blocks by kind, in the order of their first one."""
        blocks, kinds = self.block_shapes(shape), self.kinds()
        return tuple(Part(kinds[one.arch], one, blocks.count(one)) for one in dict.fromkeys(blocks))


class UniformArchitecture(Architecture, BlockCounts):
    """An architecture all of whose blocks are alike: it is its own kind of block."""

    def block_shapes(self, shape: ModelShape) -> tuple[ModelShape, ...]:
        return (shape,) * shape.num_blocks

    def kinds(self) -> dict[str, BlockCounts]:
        return {self.name: self}

    def parts(self, shape: ModelShape) -> tuple[Part, ...]:
        return (Part(self, shape, shape.num_blocks),)
