"""The loss by position, out to several training contexts T, on long documents that were held out.

Long windows of several T are read from their start. Beside them windows of T at stride T / 2 over the same tokens, so
that a token is predicted after few tokens, after T / 2 to T of them, and after more than a model has trained on. Two
numbers come of it for each bin of positions: the loss, and its excess over the loss of *the same tokens* after T / 2 to
T tokens. Tokens far into a document are not those at its start; the excess is free of that.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from xlstm_scaling.corpus import TokenSplit
from xlstm_scaling.evaluation.losses import token_losses
from xlstm_scaling.evaluation.windows import Windows, bin_edges, long_windows
from xlstm_scaling.models import LanguageModel

log = logging.getLogger(__name__)

_TEXT = ("arch", "run_id", "status", "detail")
_INTEGERS = (
    *("context_length", "num_params", "position_min", "position_max"),
    *("num_targets", "num_windows", "num_documents", "num_pairs"),
)
COLUMNS = (
    *("arch", "run_id", "context_length", "isoflop_tag", "num_params", "num_flops", "val_loss"),
    *("position_min", "position_max", "position", "num_targets", "num_windows", "num_documents"),
    *("loss", "loss_se", "loss_lo", "loss_hi", "num_pairs", "reference_loss"),
    *("excess", "excess_se", "excess_lo", "excess_hi", "confidence", "status", "detail"),
)


@dataclass(frozen=True)
class EvaluatedRun:
    """A trained run; ``about`` are its columns of the table, ``build`` loads its model when its turn comes."""

    context_length: int
    about: Mapping[str, Any]
    build: Callable[[], LanguageModel]


class Sums:
    """Sums over the predictions of each document and bin, float64 (num_documents, num_bins) each: ``counts`` of
    predictions, ``windows`` with one, ``loss``; ``pairs`` of predictions of one token, ``reference``, ``excess``."""

    def __init__(self, num_documents: int, edges: np.ndarray) -> None:
        self.edges = edges
        names = ("counts", "windows", "loss", "pairs", "reference", "excess")
        self.counts, self.windows, self.loss, self.pairs, self.reference, self.excess = (
            np.zeros((num_documents, edges.size)) for _ in names
        )

    def add(self, document: int, first: int, losses: np.ndarray) -> None:
        """Losses (n,) of one window after first + 1 … first + n tokens."""
        bins = self._bins(first, losses.size)
        counts = np.bincount(bins, minlength=self.edges.size)
        self.counts[document] += counts
        self.windows[document] += counts > 0
        self.loss[document] += np.bincount(bins, losses, self.edges.size)

    def pair(self, document: int, first: int, losses: np.ndarray, reference: np.ndarray) -> None:
        """Losses (n,) after first + 1 … first + n tokens, and those of the same tokens after T / 2 to T."""
        bins = self._bins(first, losses.size)
        self.pairs[document] += np.bincount(bins, minlength=self.edges.size)
        self.reference[document] += np.bincount(bins, reference, self.edges.size)
        self.excess[document] += np.bincount(bins, losses - reference, self.edges.size)

    def _bins(self, first: int, count: int) -> np.ndarray:
        return np.searchsorted(self.edges, np.arange(first + 1, first + count + 1))


def check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting outside its range, by its name."""
    for key in (
        *("bins_per_doubling", "num_runs", "max_documents", "windows_per_document", "min_tokens"),
        *("batch_windows", "chunk_tokens"),
    ):
        if int(settings[key]) < 1:
            raise ValueError(f"evaluation.{key} must be at least 1, got {settings[key]}")
    if not float(settings["multiple"]) > 1:
        raise ValueError(f"evaluation.multiple must be above 1 training context, got {settings['multiple']}")
    if not 0 < float(settings["confidence"]) < 1:
        raise ValueError(f"evaluation.confidence must lie between 0 and 1, got {settings['confidence']}")


def clustered_mean(sums: np.ndarray, counts: np.ndarray, confidence: float) -> tuple[float, float, float, float]:
    """Mean over predictions, its standard error over documents, and its interval.

    sums, counts: of each document, (G,). The mean is a ratio of two sums over documents, drawn together: cluster-robust
    variance with the factor G / (G − 1), and Student's t with G − 1 degrees of freedom (Cameron & Miller, 2015, II.C,
    VI.D). NaN without a prediction; no interval from one document.
    """
    inside = counts > 0
    sums, counts = sums[inside], counts[inside]
    if not counts.size:
        return (math.nan,) * 4
    mean = float(sums.sum() / counts.sum())
    if counts.size < 2:
        return mean, math.nan, math.nan, math.nan
    deviations = sums - mean * counts
    error = math.sqrt(counts.size / (counts.size - 1) * float(deviations @ deviations)) / float(counts.sum())
    reach = float(stats.t.ppf(0.5 + confidence / 2, counts.size - 1)) * error
    return mean, error, mean - reach, mean + reach


def read_windows(split: TokenSplit, windows: Windows, rows: slice) -> np.ndarray:
    """Tokens of some windows, int64 (B, longest + 1); shorter ones are filled up with token 0 at their end."""
    tokens = np.zeros((windows.starts[rows].size, int(windows.lengths[rows].max()) + 1), dtype=np.int64)
    for row, (start, length) in enumerate(zip(windows.starts[rows], windows.lengths[rows], strict=True)):
        tokens[row, : length + 1] = split.gather(np.array([start]), int(length) + 1)[0]
    return tokens


def short_windows(model: LanguageModel, tokens: torch.Tensor, context_length: int, chunk: int, rows: int) -> np.ndarray:
    """Losses of windows of T at stride T // 2, the first at T // 2, over tokens (B, L + 1): float64 (B, K, T).

    ``rows``: windows at a time. What lies past the tokens is NaN.
    """
    T, half, batch = context_length, context_length // 2, tokens.shape[0]
    firsts = list(range(half, tokens.shape[1] - 1 - (T - half), half))
    losses = np.full((batch, len(firsts), T), np.nan)
    whole = sum(first + T < tokens.shape[1] for first in firsts)
    step = max(1, rows // batch)
    parts = [range(place, min(place + step, whole)) for place in range(0, whole, step)]
    for part in [*parts, *(range(place, place + 1) for place in range(whole, len(firsts)))]:
        read = torch.cat([tokens[:, firsts[place] : firsts[place] + T + 1] for place in part])
        seen = token_losses(model, read, chunk).double().cpu().numpy()
        losses[:, part.start : part.stop, : seen.shape[1]] = np.stack(np.split(seen, len(part)), axis=1)
    return losses


def add_window(sums: Sums, document: int, long: np.ndarray, short: np.ndarray, context_length: int) -> None:
    """Sum up one long window: its losses (n,), and those of the windows of T over it, (K, T), of `short_windows`."""
    T, half = context_length, context_length // 2
    sums.add(document, 0, long)
    previous = long[:T]  # the first window of T is the start of the long one
    for place, window in enumerate(short):
        first = half * (place + 1)
        if first + T - half >= long.size:  # of a longer window of the batch
            break
        window = window[: long.size - first]
        sums.add(document, 0, window)
        known = min(window.size, T - half)
        # after up to T / 2 tokens here, T / 2 more in the window before
        begin = T - 2 * half
        sums.pair(document, begin, window[begin:known], previous[begin + half : known + half])
        beyond = window[T - half :]
        place_in_long = first + T - half
        sums.pair(document, place_in_long, long[place_in_long : place_in_long + beyond.size], beyond)
        previous = window


def run_sums(
    model: LanguageModel,
    split: TokenSplit,
    windows: Windows,
    edges: np.ndarray,
    context_length: int,
    settings: Mapping[str, Any],
    done: Callable[[int], None] = lambda count: None,
) -> Sums:
    """Losses by document and bin; ``done`` is told of each batch's windows."""
    device, size, chunk = model.head.weight.device, int(settings["batch_windows"]), int(settings["chunk_tokens"])
    names, index = np.unique(windows.documents, return_inverse=True)
    sums = Sums(names.size, edges)
    for first in range(0, len(windows), size):
        rows = slice(first, first + size)
        tokens = torch.from_numpy(read_windows(split, windows, rows)).to(device)
        long = token_losses(model, tokens, chunk).double().cpu().numpy()
        # as many tokens at a time as a chunk of the long windows has
        short = short_windows(model, tokens, context_length, chunk, max(1, size * chunk // context_length))
        for row, (length, document) in enumerate(zip(windows.lengths[rows], index[rows], strict=True)):
            add_window(sums, int(document), long[row, :length], short[row], context_length)
        done(tokens.shape[0])
    return sums


def run_rows(sums: Sums, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each bin that holds a prediction."""
    rows, least, confidence = [], int(settings["min_tokens"]), float(settings["confidence"])
    ends = sums.edges.tolist()
    for place, (low, high) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        counts, pairs = sums.counts[:, place], sums.pairs[:, place]
        total, paired = int(counts.sum()), int(pairs.sum())
        if not total:
            continue
        row: dict[str, Any] = {"position_min": low + 1, "position_max": high, "position": math.sqrt((low + 1) * high)}
        row |= {"num_targets": total, "num_windows": int(sums.windows[:, place].sum())}
        row |= {"num_documents": int((counts > 0).sum()), "num_pairs": paired, "confidence": confidence}
        values = clustered_mean(sums.loss[:, place], counts, confidence)
        row |= dict(zip(("loss", "loss_se", "loss_lo", "loss_hi"), values, strict=True))
        if paired:
            row["reference_loss"] = float(sums.reference[:, place].sum() / paired)
            values = clustered_mean(sums.excess[:, place], pairs, confidence)
            row |= dict(zip(("excess", "excess_se", "excess_lo", "excess_hi"), values, strict=True))
        few = total < least
        row |= {"status": "too_few_tokens" if few else "ok", "detail": f"fewer than {least} tokens" if few else ""}
        rows.append(row)
    return rows


def make_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table ``length`` of docs/tables.md with every column and its type, also where it is empty."""
    table = pd.DataFrame(list(rows), columns=list(COLUMNS))
    kinds = dict.fromkeys(_INTEGERS, "int64") | dict.fromkeys(_TEXT, "str")
    return table.astype({name: kinds.get(name, "float64") for name in COLUMNS})


def length_table(
    runs: Sequence[EvaluatedRun],
    split: TokenSplit,
    settings: Mapping[str, Any],
    device: str = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """Loss by position of every run: the table ``length`` of docs/tables.md.

    Args:
        runs: trained runs; one model at a time is in memory.
        split: tokens that were held out.
        settings: group ``evaluation`` of the configuration.
        device: where the models run.
        progress: whether to show a bar on stderr.

    Returns:
        One row a run and bin; no row for a training context that no document is longer than (a warning says so).

    Raises:
        ValueError: a setting outside its range.
    """
    check(settings)
    offsets, multiple, rows = split.document_offsets, float(settings["multiple"]), []
    windows = {T: _windows(offsets, T, settings) for T in sorted({run.context_length for run in runs})}
    total = sum(len(windows[run.context_length]) for run in runs)
    bar = tqdm(total=total, unit="window", file=sys.stderr, disable=not progress, mininterval=0.5)
    with bar:
        for run in runs:
            T = run.context_length
            if not len(windows[T]):
                continue
            bar.set_description(str(run.about["run_id"]), refresh=False)
            edges = bin_edges(T, multiple, int(settings["bins_per_doubling"]))
            model = run.build().to(device).eval()
            sums = run_sums(model, split, windows[T], edges, T, settings, bar.update)
            rows += [{**run.about, "context_length": T, **row} for row in run_rows(sums, settings)]
    return make_table(rows)


def _windows(offsets: np.ndarray, context_length: int, settings: Mapping[str, Any]) -> Windows:
    """`long_windows` of the settings; a warning where documents are too short for them."""
    multiple = float(settings["multiple"])
    windows = long_windows(
        offsets, context_length, multiple, int(settings["max_documents"]), int(settings["windows_per_document"])
    )
    documents, longest = np.unique(windows.documents).size, round(multiple * context_length)
    if not len(windows):
        log.warning(
            "no held-out document is longer than the training context of %s tokens (the longest has %s): the loss "
            "beyond it is not evaluated",
            f"{context_length:,}", f"{int(np.diff(offsets).max(initial=0)):,}",
        )  # fmt: skip
    elif windows.lengths[-1] < longest:
        whole = np.unique(windows.documents[windows.lengths == longest]).size
        log.warning(
            "%d of %d held-out documents longer than %s tokens hold %g times as many: the bins far out have fewer",
            whole, documents, f"{context_length:,}", multiple,
        )  # fmt: skip
    return windows
