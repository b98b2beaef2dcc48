"""Answers to claims about inference: time to first token (TTFT) and step time, from a table of measurements.

Columns of the table (SI units; docs/claims.md): `REQUIRED`, and what a claim needs of `OPTIONAL`. FLOPs and bytes are
those of `accounting` (prefill, and one generated token), weights and activations in two bytes, mLSTM states in four.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.accounting import ModelShape, prefill_flops, step_bytes
from xlstm_scaling.fitting.resampling import bootstrap_counts
from xlstm_scaling.fitting.runtime_versions import doubling_growth, is_steady
from xlstm_scaling.study.files import read_table

from .evidence import Evidence, answer
from .ledger import NAN, Answer, NotAnswerable

Array = NDArray[np.float64]
REQUIRED = ("model_type", "model_tag", "batch_size", "prefill_length_tokens", "ttft_s", "step_time_s")
OPTIONAL = ("num_heads", "embedding_dim", "num_blocks", "ffn_dim", "vocab_size", "qk_dim_factor", "chunk_size")
#: the authors' names of their two families
FAMILIES = {"xlstm": "xlstm", "transformer": "llama2", "llama3": "llama3"}
RAW = "ttft_raw_pickle_s"
GENERATED = 100  # tokens that a step time is taken over


def read_measurements(path: Path) -> pd.DataFrame:
    """Return a table of measurements (.csv, .parquet).

    Raises:
        FileNotFoundError, ValueError: of `read_table`, or a column of `REQUIRED` is absent.
    """
    table = read_table(path)
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    return table


def _measured(
    evidence: Evidence, arch: str | None = None, size: str | None = None, column: str | None = None
) -> pd.DataFrame:
    """Measurements of a family and a size in which a column is there."""
    table = evidence.inference
    if table is None:
        raise NotAnswerable("inference measurements (--inference-table)")
    if arch is not None:
        family = FAMILIES[arch]
        table = table[(table["model_type"] == family) & (size is None or table["model_tag"] == f"{family}_{size}")]
    if column is not None:
        if column not in table.columns:
            raise NotAnswerable(f"the column {column} of the measurements")
        table = table[table[column] > 0]  # the authors' pickle marks what did not fit into memory by a negative time
        if arch == "transformer" and column == "ttft_s" and RAW not in table.columns:
            raise NotAnswerable(f"the column {RAW} of the measurements: without it, which TTFTs these are is not known")
    if table.empty:
        raise NotAnswerable(f"measurements of {' '.join(part for part in (arch, size) if part)}")
    return table


def _shapes(rows: pd.DataFrame, arch: str) -> list[ModelShape]:
    names = [name for name in OPTIONAL if arch == "xlstm" or name not in ("qk_dim_factor", "chunk_size")]
    absent = [name for name in names if name not in rows.columns or rows[name].isna().any()]
    if absent:
        raise NotAnswerable(f"the columns {', '.join(absent)} of the measurements")
    shapes = []
    for row in rows.itertuples():
        head_dim = int(row.embedding_dim // row.num_heads)
        sizes = {name: int(getattr(row, name)) for name in OPTIONAL[:5]}
        qk, chunk = (int(head_dim * row.qk_dim_factor), int(row.chunk_size)) if arch == "xlstm" else (head_dim, None)
        shapes.append(ModelShape(arch=arch, head_dim_qk=qk, head_dim_v=head_dim, chunk_size=chunk, **sizes))
    return shapes


def _one(evidence: Evidence, arch: str, size: str, prefill: int, batch: int, column: str) -> float:
    rows = _measured(evidence, arch, size, column)
    rows = rows[(rows["prefill_length_tokens"] == prefill) & (rows["batch_size"] == batch)]
    if rows.empty:
        raise NotAnswerable(f"{column} of {arch} {size} at prefill {prefill}, batch {batch}")
    return float(rows[column].iloc[0])


def _solve(columns: Array, y: Array, weights: Array) -> Array:
    root = np.sqrt(weights)
    scale = np.abs(columns).max(axis=0)
    return np.linalg.lstsq(columns / scale * root[:, None], y * root, rcond=None)[0] / scale


@answer
def prefill_rate(evidence: Evidence, arch: str, size: str, per_sequence: float, column: str = "ttft_s") -> Answer:
    """Effective rate alpha [FLOP/s] of TTFT = FLOPs / alpha + eps + per_sequence batch, by least squares in time.

    Args:
        size: e.g. 7b.
        per_sequence: overhead of a sequence [s], held fixed as in the published fits.
        column: `ttft_s`, or `ttft_raw_pickle_s` for the times as measured.
    """
    rows = _measured(evidence, arch, size, column)
    rows = rows[rows["prefill_length_tokens"] > 0]
    batch, length = (rows[name].to_numpy(dtype=np.int64) for name in ("batch_size", "prefill_length_tokens"))
    flops = np.array(
        [float(prefill_flops(*cell)) for cell in zip(_shapes(rows, arch), length.tolist(), batch.tolist())]
    )
    y = rows[column].to_numpy(dtype=np.float64) - per_sequence * batch
    design = np.column_stack([flops, np.ones_like(flops)])
    fitted = _solve(design, y, np.ones_like(y))
    generator = evidence.generator("prefill_rate", arch, size, column)
    counts = bootstrap_counts(len(y), evidence.num_resamples, generator)
    samples = np.array([1.0 / _solve(design, y, drawn)[0] for drawn in counts])
    error = float(np.sqrt(np.mean((design @ fitted - y) ** 2)))
    note = f"eps = {1e3 * fitted[1]:.3f} ms; root mean square error {1e3 * error:.2f} ms."
    return Answer(float(1.0 / fitted[0]), *evidence.interval(samples), len(y), note)


def _step_design(evidence: Evidence, arch: str, size: str | None) -> tuple[Array, Array, Array]:
    """(bytes, batch size, step time [s]) of the measurements of a model, or of all sizes, with a prefill."""
    rows = _measured(evidence, arch, size, "step_time_s")
    rows = rows[rows["prefill_length_tokens"] > 0]
    batch, length = (rows[name].to_numpy(dtype=np.int64) for name in ("batch_size", "prefill_length_tokens"))
    moved = []
    for shape, start, sequences in zip(_shapes(rows, arch), length.tolist(), batch.tolist()):
        ends = (start, start + GENERATED - 1)  # bytes are linear in the position
        moved.append(sum(float(step_bytes(shape, end, sequences)) for end in ends) / 2)
    return np.array(moved), batch.astype(np.float64), rows["step_time_s"].to_numpy(dtype=np.float64)


@answer
def step_time_error(evidence: Evidence, arch: str, size: str, beta: float, eps: float, per_sequence: float) -> Answer:
    """Ratio of two root mean square errors of ln(step time): at given constants, over that of least squares in ln t.

    t = bytes / beta + eps + per_sequence batch, beta in bytes/s, eps and per_sequence in s; 1 at an optimum.
    """
    from scipy.optimize import least_squares

    moved, batch, time = _step_design(evidence, arch, size)
    terms = np.column_stack([moved, np.ones_like(moved), batch])

    def residual(logs: Array) -> Array:
        return np.log(terms @ np.exp(logs)) - np.log(time)

    given = float(np.sqrt(np.mean(residual(np.log([1.0 / beta, eps, per_sequence])) ** 2)))
    starts = np.log([[1.0 / beta, eps, per_sequence], [time.max() / moved.max(), 0.1 * time.min(), 1e-5]])
    fits = [least_squares(residual, start, bounds=(np.log(1e-20), np.log(1e3))) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    least = float(np.sqrt(2 * best.cost / len(time)))
    rate = float(np.exp(-best.x[0]))
    note = (
        f"At the least, {least:.3f}, beta is {rate:.3g} bytes/s; at the published constants the error is {given:.3f}."
    )
    return Answer(given / least, n_runs=len(time), note=note)


@answer
def step_time_bandwidth(evidence: Evidence, size: str, beta: float) -> Answer:
    """The published bandwidth of xLSTM's step time: is it determined at all?

    An mLSTM's step moves the same bytes at every position: for one model bytes = w + s batch, so the columns bytes, 1
    and batch are linearly dependent, and every beta, also a negative one, fits equally well. Demonstrated where the
    design has rank 2 and the errors at `beta` and at its positive opposite agree. `value` is `beta` then; `right` is
    the bandwidth of one fit to all sizes, which differ in w (relative least squares).
    """
    moved, batch, time = _step_design(evidence, "xlstm", size)
    design = np.column_stack([moved, np.ones_like(moved), batch])
    rank = int(np.linalg.matrix_rank(design / design.max(axis=0)))
    rest, errors = design[:, 1:], []
    for rate in (beta, -beta):
        y = time - moved / rate
        errors.append(float(np.sqrt(np.mean((rest @ _solve(rest, y, np.ones_like(y)) - y) ** 2))))
    shown = rank < 3 and abs(errors[0] - errors[1]) < 1e-9 * float(time.mean())
    pooled, batches, times = _step_design(evidence, "xlstm", None)
    columns = np.column_stack([pooled, np.ones_like(pooled), batches])
    right = float(1.0 / _solve(columns, times, times**-2.0)[0])
    note = (
        f"Rank {rank} of 3 columns; root mean square error {1e3 * errors[0]:.6f} ms at {beta:.3g} and at {-beta:.3g}."
    )
    if len(np.unique(pooled / batches)) <= len(np.unique(moved / batch)):
        right = NAN
    return Answer(beta if shown else NAN, n_runs=len(time), note=note, right=right, demonstrated=shown)


@answer
def ttft_disagreement(evidence: Evidence, of: str) -> Answer:
    """TTFTs of which two files of the authors give different values.

    Args:
        of: `count`, the least (`min`) or largest (`max`) ratio of the value that the fits used over the measured one,
            or `llama3`, the median of |measured / Llama-3's - 1| over the same models, batches and prefills.
    """
    rows = _measured(evidence, "transformer", None, RAW)
    rows = rows[rows["ttft_s"] > 0]
    ratio = rows["ttft_s"] / rows[RAW]
    differ = np.abs(ratio - 1.0) > 1e-6
    if of == "count":
        lengths = rows.loc[differ, "prefill_length_tokens"]
        note = f"At prefills of {', '.join(str(int(length)) for length in sorted(lengths.unique()))} tokens."
        return Answer(float(differ.sum()), n_runs=len(rows), note=note, right=0.0)
    if not differ.any():
        raise NotAnswerable("TTFTs that differ")
    if of in ("min", "max"):
        prompted = ratio[differ & (rows["prefill_length_tokens"] > 0)]
        note = f"{int(differ.sum()) - len(prompted)} of {int(differ.sum())} have no prompt (prefill 0)"
        if len(prompted):
            note += f"; with a prompt the ratio is {prompted.min():.3f} to {prompted.max():.3f}"
        found = ratio[differ].min() if of == "min" else ratio[differ].max()
        return Answer(float(found), n_runs=int(differ.sum()), note=f"{note}.")
    keys = ["size", "batch_size", "prefill_length_tokens"]
    other = evidence.inference[evidence.inference["model_type"] == "llama3"].dropna(subset=["ttft_s"])
    if other.empty:
        raise NotAnswerable("measurements of Llama-3")
    other = other.assign(size=other["model_tag"].str.split("_").str[1])[[*keys, "ttft_s"]]
    mine = rows[differ].assign(size=rows["model_tag"].str.split("_").str[1])[[*keys, RAW, "ttft_s"]]
    both = mine.merge(other, on=keys, suffixes=("", "_llama3"))
    off = {name: float((both[name] / both["ttft_s_llama3"] - 1.0).abs().median()) for name in (RAW, "ttft_s")}
    note = f"{len(both)} pairs; the values that the fits used are off by {off['ttft_s']:.2f}."
    return Answer(off[RAW], n_runs=len(both), note=note)


@answer
def ttft_growth(evidence: Evidence, column: str, prefill: int, arch: str = "transformer") -> Answer:
    """How often a TTFT grows when its prompt doubles from ``prefill`` tokens, median over models and batches.

    Args:
        column: `ttft_s`, or `ttft_raw_pickle_s` for the times as measured.
        arch: transformer, xlstm, or llama3.
    """
    table = _measured(evidence, arch, None, column)
    names = {"model_tag": "model", "prefill_length_tokens": "prefill_length"}
    growth = doubling_growth(table.rename(columns=names), column)
    if prefill not in growth.index:
        raise NotAnswerable(f"{column} of {arch} at prefills {prefill} and {2 * prefill}")
    steps = ", ".join(f"{value:.2f} from {length:.0f}" for length, value in growth.items())
    note = f"{steps}: {'rises' if is_steady(growth) else 'does not rise'} steadily, as that of the FLOPs does."
    return Answer(float(growth[prefill]), n_runs=len(table), note=note)


@answer
def prefill_memory(evidence: Evidence, arch: str, size: str, batch: int = 8) -> Answer:
    """Bytes that are reserved for each further token of a prefill: slope over tokens, at `batch` sequences or more."""
    column = "memory_reserved_gen1_bytes"
    rows = _measured(evidence, arch, size, column)
    rows = rows[(rows["prefill_length_tokens"] > 0) & (rows["batch_size"] >= batch)]
    tokens = (rows["batch_size"] * rows["prefill_length_tokens"]).to_numpy(dtype=np.float64)
    design, reserved = np.column_stack([tokens, np.ones_like(tokens)]), rows[column].to_numpy(dtype=np.float64)
    if len(np.unique(tokens)) < 2:
        raise NotAnswerable(f"{column} of {arch} {size} at two numbers of tokens")
    slope = float(_solve(design, reserved, np.ones_like(tokens))[0])
    generator = evidence.generator("prefill_memory", arch, size)
    counts = bootstrap_counts(len(tokens), evidence.num_resamples, generator)
    samples = np.array([_solve(design, reserved, drawn)[0] for drawn in counts])
    vocab = float(rows["vocab_size"].iloc[0])
    note = f"{slope / vocab:.1f} bytes for each of {vocab:.0f} logits."
    return Answer(slope, *evidence.interval(samples), len(tokens), note)


@answer
def time_ratio(
    evidence: Evidence, size: str, prefill: int, of: str, batch: int = 1, other_size: str | None = None
) -> Answer:
    """xLSTM's time over the Transformer's at one size, prefill and batch; `of` is a column of times.

    `other_size` is the Transformer's size where it is another one.
    """
    own = of if of != RAW else "ttft_s"  # xLSTM's times are the same in both files
    mine = _one(evidence, "xlstm", size, prefill, batch, own)
    theirs = _one(evidence, "transformer", other_size or size, prefill, batch, of)
    note = f"{1e3 * mine:.3f} ms against {1e3 * theirs:.3f} ms, one measurement each."
    return Answer(mine / theirs, n_runs=2, note=note)


@answer
def time_growth(evidence: Evidence, arch: str, size: str, of: str, prefill: int, base: int, batch: int = 1) -> Answer:
    """Time at one prefill over the time at a shorter one."""
    late, early = (_one(evidence, arch, size, length, batch, of) for length in (prefill, base))
    return Answer(late / early, n_runs=2, note=f"{1e3 * early:.3f} ms to {1e3 * late:.3f} ms, one measurement each.")
