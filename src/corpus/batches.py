"""Which tokens a training step sees: a function of (seed, step) alone.

The train split is read as windows of T + 1 tokens at stride T (inputs x[:-1], targets x[1:]). Every epoch shifts the
grid of windows by an offset in [0, T) and visits each window once, in the order of a keyed pseudo-random permutation
that needs no memory and can be evaluated anywhere. A run's sequences are one endless stream, epoch after epoch, and
step s takes sequences s * batch_size ... (s + 1) * batch_size - 1 of it: batch size changes how the stream is cut, not
its order.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from math import isqrt

import numpy as np

from .errors import CorpusError
from .shards import TokenSplit

ROUNDS = 6


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014), keyed: uint64 -> uint64."""
    z = (values ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=256)
def _epoch_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """Keys of the rounds, and one for the offset of the grid."""
    words = [hashlib.blake2b(f"{seed}:{epoch}:{i}".encode(), digest_size=8).digest() for i in range(ROUNDS + 1)]
    return tuple(int.from_bytes(word, "little") for word in words)


def permute(indices: np.ndarray, n: int, seed: int, epoch: int = 0) -> np.ndarray:
    """A pseudo-random permutation of 0 ... n - 1, evaluated at `indices`: int64 (B,) -> int64 (B,), in O(B).

    A Feistel network over Z_a x Z_b with a * b just above n, and cycle walking back into the range
    (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _epoch_keys(seed, epoch)[:ROUNDS]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x // b, x % b
        for i, key in enumerate(keys):
            if i % 2:
                right = (right + (_mix(left.astype(np.uint64), key) % np.uint64(b)).astype(np.int64)) % b
            else:
                left = (left + (_mix(right.astype(np.uint64), key) % np.uint64(a)).astype(np.int64)) % a
        return left * b + right

    out = network(np.atleast_1d(np.asarray(indices, dtype=np.int64)))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out


class BatchSchedule:
    """The windows that each step of a run trains on.

    num_tokens: of the train split; context_length: T; batch_size: sequences a step, over all devices.
    windows_per_epoch = num_tokens // T - 1, so that every offset of the grid fits.
    Raises CorpusError if the split has fewer windows than a batch.
    """

    def __init__(self, num_tokens: int, context_length: int, batch_size: int, seed: int) -> None:
        if context_length < 1 or batch_size < 1:
            raise ValueError(f"context_length and batch_size must be positive, not {context_length}, {batch_size}")
        self.num_tokens = num_tokens
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.windows_per_epoch = max(num_tokens // context_length - 1, 0)
        if self.windows_per_epoch < batch_size:
            raise CorpusError(
                f"The corpus is too small for the plan: {num_tokens:,} training tokens hold {self.windows_per_epoch:,}"
                f" windows of context length {context_length:,}, fewer than one batch of {batch_size:,} sequences,"
                f" which needs {(batch_size + 1) * context_length:,} tokens. Lower the batch size or the context length"
                " of the training recipe, or choose a larger corpus."
            )

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of a step's first sequence; a batch may straddle two epochs."""
        return step * self.batch_size // self.windows_per_epoch

    def epochs(self, num_steps: int) -> float:
        """Passes over the training tokens after `num_steps` steps."""
        return num_steps * self.batch_size / self.windows_per_epoch

    def window_starts(self, step: int, rows: slice | None = None) -> np.ndarray:
        """First token of each window of a step: int64 (batch_size,), or the given rows of it (a micro-batch, a rank).

        Depends on (num_tokens, context_length, seed) and the position in the stream only.
        """
        if step < 0:
            raise ValueError(f"step must not be negative: {step}")
        sequences = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        if rows is not None:
            sequences = sequences[rows]
        epochs, indices = np.divmod(sequences, self.windows_per_epoch)
        starts = np.empty_like(sequences)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            windows = permute(indices[inside], self.windows_per_epoch, self.seed, epoch)
            starts[inside] = self.offset(epoch) + windows * self.context_length
        return starts

    def offset(self, epoch: int) -> int:
        """The shift of an epoch's grid of windows, in [0, T)."""
        return _epoch_keys(self.seed, epoch)[ROUNDS] % self.context_length


class ValidationWindows:
    """The windows of T + 1 tokens at stride T of the validation split, in order; the same for every run.

    With max_tokens fewer windows are taken, evenly spread over the split (a prefix would be its first documents only).
    starts: int64 (n,) first tokens; num_target_tokens = n * T; tokens past the last whole window are not used.
    Raises CorpusError if the split holds no window.
    """

    def __init__(self, num_tokens: int, context_length: int, max_tokens: int | None = None) -> None:
        self.num_tokens = num_tokens
        self.context_length = context_length
        available = max(num_tokens - 1, 0) // context_length
        if available == 0:
            raise CorpusError(
                f"The corpus is too small for the plan: the validation split has {num_tokens:,} tokens, fewer than one"
                f" window of context length {context_length:,} ({context_length + 1:,} tokens). Raise"
                " corpus.validation_fraction or corpus.max_validation_tokens, or lower the context length."
            )
        count = available if max_tokens is None else min(available, max(max_tokens // context_length, 1))
        self.starts = np.arange(count, dtype=np.int64) * available // count * context_length

    def __len__(self) -> int:
        return self.starts.size

    @property
    def num_target_tokens(self) -> int:
        """Tokens that a validation loss averages over."""
        return len(self) * self.context_length

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """First tokens, int64 (batch_size,) at a time; the last batch may be smaller."""
        for first in range(0, len(self), batch_size):
            yield self.starts[first : first + batch_size]


def get_windows(
    split: TokenSplit, starts: np.ndarray, context_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs int64 (B, T), targets int64 (B, T) and document starts of the inputs bool (B, T) of some windows."""
    tokens = split.gather(starts, context_length + 1)
    return tokens[:, :-1], tokens[:, 1:], split.document_starts(starts, context_length)


def get_batch(
    split: TokenSplit, schedule: BatchSchedule, step: int, rows: slice | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batch of a step, or the given rows of it: inputs, targets int64 (B, T), document starts bool (B, T).

    Raises ValueError for a schedule made for another number of tokens.
    """
    if schedule.num_tokens != split.num_tokens:
        raise ValueError(f"the schedule is for {schedule.num_tokens} tokens, the split has {split.num_tokens}")
    return get_windows(split, schedule.window_starts(step, rows), schedule.context_length)
