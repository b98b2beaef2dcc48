"""Long windows inside documents, and the bins of positions that their losses are averaged in. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Windows of predictions, none of which crosses a document start; the longest first.

    starts: int64 (n,), first token read of each; lengths: int64 (n,), predictions of each, so that tokens starts …
    starts + lengths are read or predicted; documents: int64 (n,), index of the document in its split.
    """

    starts: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return self.starts.size


def long_windows(
    offsets: np.ndarray, context_length: int, multiple: float, max_documents: int, windows_per_document: int
) -> Windows:
    """Windows of up to ``multiple`` training contexts in documents that are longer than one.

    Args:
        offsets: first token of every document and the end of the last, int64 (num_documents + 1,).
        context_length: T, tokens of a training context.
        multiple: longest window, in training contexts.
        max_documents: those that hold a whole window come first, spread evenly over the split, then the longest.
        windows_per_document: evenly spread over a document, their starts at least T tokens apart.

    Returns:
        The windows; none where no document is longer than T.
    """
    predictions = np.diff(offsets) - 1
    longest = round(multiple * context_length)
    usable = np.flatnonzero(predictions > context_length)
    whole = usable[predictions[usable] >= longest]
    chosen = whole[np.arange(min(max_documents, whole.size)) * whole.size // max(min(max_documents, whole.size), 1)]
    shorter = usable[predictions[usable] < longest]
    shorter = shorter[np.argsort(-predictions[shorter], kind="stable")][: max_documents - chosen.size]
    starts, lengths, documents = [], [], []
    for document in np.sort(np.concatenate([chosen, shorter])).tolist():
        length = min(int(predictions[document]), longest)
        room = int(predictions[document]) - length
        count = min(windows_per_document, 1 + room // context_length)
        starts += [int(offsets[document]) + place * room // max(count - 1, 1) for place in range(count)]
        lengths += [length] * count
        documents += [document] * count
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    return Windows(*(np.asarray(values, dtype=np.int64)[order] for values in (starts, lengths, documents)))


def bin_edges(context_length: int, multiple: float, bins_per_doubling: int) -> np.ndarray:
    """Upper ends of geometric bins of the tokens read, int64, from 1 to ``multiple`` · T; T is one of them.

    Bin k holds the predictions after more than edges[k − 1] tokens (0 for the first) and at most edges[k].
    """
    longest = round(multiple * context_length)
    below = int(np.ceil(bins_per_doubling * np.log2(context_length)))
    above = int(np.ceil(bins_per_doubling * np.log2(longest / context_length)))
    powers = context_length * 2.0 ** (np.arange(-below, above + 1) / bins_per_doubling)
    return np.unique(np.clip(np.round(powers), 1, longest).astype(np.int64))
