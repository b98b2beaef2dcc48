"""What an architecture has to say about itself so that everything else can count it.

A new architecture adds one module beside ``xlstm.py`` and ``transformer.py`` with a subclass of ``Architecture``
and one line in ``accounting/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

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
        return self.linear + self.sequence_mixing + self.other

    @property
    def forward_backward(self) -> float:
        """The backward pass costs twice the forward pass, by convention."""
        return 3 * self.forward


class Architecture(ABC):
    """Parameters, training FLOPs, and inference FLOPs and bytes of one family of models.

    All counts are exact integers where the formula is one (a chunk size that does not divide the context gives a
    fraction). T is the number of tokens of one sequence.
    """

    name: str

    @abstractmethod
    def shape(
        self, embedding_dim: int, num_blocks: int, num_heads: int, vocab_size: int, chunk_size: int = 64
    ) -> ModelShape:
        """Derive head and feed-forward widths. Raises ValueError on dimensions that do not divide."""

    # parameters

    @abstractmethod
    def block_linear_params(self, shape: ModelShape) -> int:
        """Weights of the linear maps of one block (each costs 2 FLOPs a token), without biases."""

    @abstractmethod
    def block_other_params(self, shape: ModelShape) -> int:
        """Norm scales and biases of one block."""

    # training

    @abstractmethod
    def block_mixing_flops(self, shape: ModelShape, context_length: int, convention: str) -> float:
        """Forward FLOPs of the sequence mixing of one block over one sequence."""

    @abstractmethod
    def block_other_flops(self, shape: ModelShape, context_length: int) -> float:
        """Forward FLOPs of gate and feed-forward activations of one block over one sequence."""

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
