"""The loss by position: what windows it reads, that states change nothing, and that planted losses are found again."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from xlstm_scaling.accounting import make_shape
from xlstm_scaling.evaluation.length import COLUMNS, EvaluatedRun, Sums, add_window, clustered_mean, length_table
from xlstm_scaling.evaluation.losses import token_losses
from xlstm_scaling.evaluation.windows import bin_edges, long_windows
from xlstm_scaling.models import build_model

VOCABULARY, T = 37, 16
SETTINGS = {
    "multiple": 8.0,
    "bins_per_doubling": 2,
    "num_runs": 1,
    "max_documents": 8,
    "windows_per_document": 2,
    "min_tokens": 3,
    "batch_windows": 4,
    "chunk_tokens": 24,
    "confidence": 0.95,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small models are faster so, above all where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Split:
    """A token split in memory: documents of the lengths given."""

    def __init__(self, lengths, seed=0):
        self.document_offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = np.random.default_rng(seed).integers(VOCABULARY, size=sum(lengths))

    def gather(self, starts, length):
        return np.stack([self.tokens[start : start + length] for start in starts])


def lively(arch, seed=0):
    """A model whose losses depend on what it has read: its parameters are moved away from their initial values."""
    options = {"kernel_chunk_size": 4} if arch == "xlstm" else {}
    model = build_model(make_shape(arch, 16, 2, 2, VOCABULARY, chunk_size=4), seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((2.0 if "gates.bias" in name else 0.3) * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=("xlstm", "transformer"))
def arch(request):
    return request.param


def run(arch, context_length=T, build=None):
    about = {"arch": arch, "run_id": f"{arch}-{context_length}", "isoflop_tag": 1e9, "num_params": 10}
    about |= {"num_flops": 1e9, "val_loss": 3.0}
    return EvaluatedRun(context_length, about, build or (lambda: lively(arch)))


# windows and bins


def test_windows_lie_in_one_document_and_whole_ones_come_first():
    offsets = np.concatenate([[0], np.cumsum([10, 200, 17, 18, 129, 130, 60, 500])])
    windows = long_windows(offsets, T, 8, 4, 3)
    ends = windows.starts + windows.lengths
    assert (windows.starts >= offsets[windows.documents]).all()
    assert (ends < offsets[windows.documents + 1]).all()  # the last token read or predicted is the document's
    assert sorted(set(windows.documents.tolist())) == [1, 4, 5, 7]
    assert (windows.lengths == 8 * T).all()
    counts = np.bincount(windows.documents, minlength=8)
    assert counts.tolist() == [0, 3, 0, 0, 1, 1, 0, 3]  # their starts at least T apart
    few = long_windows(offsets, T, 8, 7, 1)
    assert sorted(set(few.documents.tolist())) == [1, 3, 4, 5, 6, 7]  # 16 predictions are not beyond T
    assert (np.diff(few.lengths) <= 0).all()
    assert len(long_windows(offsets, 600, 8, 7, 1)) == 0
    assert set(long_windows(offsets, T, 8, 2, 1).documents.tolist()) == {1, 5}  # spread over the split


@pytest.mark.parametrize(("context", "multiple", "per"), [(16, 8, 2), (1000, 8, 3), (256, 5.5, 1), (7, 3, 4)])
def test_bins_are_geometric_and_meet_at_the_training_context(context, multiple, per):
    edges = bin_edges(context, multiple, per)
    assert edges[0] == 1
    assert edges[-1] == round(multiple * context)
    assert context in edges
    assert (np.diff(edges) > 0).all()
    wide = edges[edges > 8 * 2 ** (1 / per)]
    assert np.allclose(np.diff(np.log2(wide[:-1])), 1 / per, atol=0.3)


# losses


def test_losses_through_a_state_are_those_of_one_forward_pass(arch):
    model, tokens = lively(arch), torch.randint(VOCABULARY, (3, 61))
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    whole = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 60)
    for chunk in (1, 7, 20, 60, 100):
        torch.testing.assert_close(token_losses(model, tokens, chunk), whole, atol=2e-5, rtol=1e-5)
    assert whole.std() > 0.5
    with pytest.raises(ValueError, match="at least 1 token"):
        token_losses(model, tokens, 0)


def test_the_mean_over_the_training_context_is_the_loss_that_validation_sees(arch):
    model, tokens = lively(arch), torch.randint(VOCABULARY, (5, 8 * T + 1))
    losses = token_losses(model, tokens, 9)
    with torch.no_grad():
        expected = model.loss(tokens[:, :T], tokens[:, 1 : T + 1])
    assert float(losses[:, :T].mean()) == pytest.approx(float(expected), rel=1e-5)


def test_logits_come_a_few_rows_at_a_time(monkeypatch):
    from xlstm_scaling.evaluation import losses

    model, tokens = lively("xlstm"), torch.randint(VOCABULARY, (2, 31))
    whole = token_losses(model, tokens, 16)
    monkeypatch.setitem(losses.MAX_LOGITS, "cpu", 4 * VOCABULARY)
    torch.testing.assert_close(token_losses(model, tokens, 16), whole)


# the table


def naive(model, split, context_length, settings):
    """Every prediction by a forward pass of its own -> rows of (document, tokens read, loss, reference or NaN)."""
    half, rows = context_length // 2, []
    windows = long_windows(
        split.document_offsets, context_length, settings["multiple"], settings["max_documents"],
        settings["windows_per_document"],
    )  # fmt: skip

    def losses(start, length):
        tokens = torch.from_numpy(split.gather([start], length + 1))
        with torch.no_grad():
            logits = model(tokens[:, :-1])[0]
        return F.cross_entropy(logits, tokens[0, 1:], reduction="none").double().numpy()

    for start, length, document in zip(windows.starts, windows.lengths, windows.documents):
        firsts = range(0, int(length), half)
        firsts = [first for first in firsts if not first or first + context_length - half < length]
        short = {first: losses(start + first, min(context_length, length - first)) for first in firsts}
        reference = {}
        for first, values in short.items():
            for place, value in enumerate(values):
                if place >= context_length - half:
                    reference[first + place] = value
        for place, value in enumerate(losses(start, length)):
            rows.append((document, place + 1, value, reference[place] if place >= context_length else np.nan))
        for first, values in short.items():
            for place, value in enumerate(values if first else ()):
                known = reference.get(first + place, np.nan) if context_length - 2 * half <= place else np.nan
                rows.append((document, place + 1, value, known if place < context_length - half else np.nan))
    return pd.DataFrame(rows, columns=["document", "read", "loss", "reference"])


@pytest.mark.parametrize("context", [16, 11])
def test_the_table_is_that_of_a_forward_pass_for_each_window(arch, context):
    split = Split([30, 145, 15, 140, 75])
    table = length_table([run(arch, context)], split, SETTINGS, progress=False)
    expected = naive(lively(arch), split, context, SETTINGS)
    assert list(table.columns) == list(COLUMNS)
    assert table.num_targets.sum() == len(expected)
    for row in table.itertuples():
        here = expected[expected.read.between(row.position_min, row.position_max)]
        assert row.num_targets == len(here)
        assert row.num_documents == here.document.nunique()
        assert row.loss == pytest.approx(here.loss.mean(), rel=1e-5)
        paired = here[here.reference.notna()]
        assert row.num_pairs == len(paired), row
        if len(paired):
            assert row.reference_loss == pytest.approx(paired.reference.mean(), rel=1e-5)
            assert row.excess == pytest.approx((paired.loss - paired.reference).mean(), abs=2e-5)
        sums = here.groupby("document").loss.agg(["sum", "size"])
        values = clustered_mean(sums["sum"].to_numpy(), sums["size"].to_numpy(), 0.95)
        if len(sums) > 1:
            assert (row.loss_se, row.loss_lo, row.loss_hi) == pytest.approx(values[1:], rel=1e-3)
    assert set(table.loc[table.position_min > context, "num_pairs"]) != {0}
    assert table.num_documents.iloc[-1] < table.num_documents.iloc[0]  # not all documents reach as far


def test_planted_losses_are_found_again():
    """A token costs its place in the document, and 0.5 more when more than T tokens were read: the excess is 0.5."""
    edges, sums, half = bin_edges(T, 8, 2), Sums(1, bin_edges(T, 8, 2)), T // 2
    place = np.arange(8 * T, dtype=float)
    short = np.stack([place[first : first + T] for first in range(half, 7 * T + 1, half)])
    add_window(sums, 0, place + 0.5 * (place >= T), short, T)
    beyond = edges > T
    np.testing.assert_allclose(sums.excess[0, beyond], 0.5 * sums.pairs[0, beyond])
    assert sums.pairs[0, beyond].sum() == 7 * T
    assert not sums.excess[0, ~beyond].any()
    np.testing.assert_array_equal(sums.counts[0, beyond], sums.pairs[0, beyond])


def test_random_tokens_cost_what_the_logits_say_at_every_position(arch):
    """Uniform tokens and a model that knows it: ln V everywhere, whatever was read."""
    model = lively(arch)
    torch.nn.init.zeros_(model.head.weight)
    table = length_table([run(arch, build=lambda: model)], Split([150] * 3), SETTINGS, progress=False)
    assert np.allclose(table.loss, np.log(VOCABULARY), rtol=1e-6)
    assert np.allclose(table.excess.dropna(), 0, atol=1e-6)


def test_few_tokens_are_said_and_kept():
    table = length_table([run("xlstm")], Split([100, 140]), SETTINGS | {"min_tokens": 40}, progress=False)
    few = table[table.status == "too_few_tokens"]
    assert len(few) and (few.num_targets < 40).all() and few.loss.notna().all()
    assert (table[table.status == "ok"].num_targets >= 40).all()
    assert few.detail.iloc[0] == "fewer than 40 tokens"


def test_documents_that_are_too_short_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        table = length_table([run("xlstm"), run("xlstm", 64)], Split([60, 30]), SETTINGS, progress=False)
    assert "0 of 2 held-out documents longer than 16 tokens hold 8 times as many" in caplog.text
    assert "no held-out document is longer than the training context of 64 tokens (the longest has 60)" in caplog.text
    assert set(table.context_length) == {16}
    assert table.position_min.max() <= 59
    empty = length_table([run("xlstm", 64)], Split([60, 30]), SETTINGS, progress=False)
    assert empty.empty
    assert (empty.dtypes == table.dtypes).all()


@pytest.mark.parametrize(
    ("key", "value"), [("multiple", 1.0), ("chunk_tokens", 0), ("min_tokens", 0), ("confidence", 1.0)]
)
def test_a_setting_outside_its_range_is_named(key, value):
    with pytest.raises(ValueError, match=f"evaluation.{key}"):
        length_table([], Split([60]), SETTINGS | {key: value})


def test_intervals_over_documents_cover():
    """Documents of different lengths whose means differ: the interval holds the truth about as often as it says."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        counts = generator.integers(50, 150, size=10)
        means = 3.0 + 0.1 * generator.standard_normal(10)
        sums = counts * means + generator.standard_normal(10) * np.sqrt(counts)
        _, _, low, high = clustered_mean(sums, counts, 0.95)
        hits += low <= 3.0 <= high
    assert 0.92 <= hits / 1000 <= 0.98
    assert clustered_mean(np.array([6.0, 0.0]), np.array([2, 0]), 0.95)[0] == 3.0
    assert np.isnan(clustered_mean(np.array([6.0, 0.0]), np.array([2, 0]), 0.95)[1:]).all()
    assert np.isnan(clustered_mean(np.zeros(0), np.zeros(0), 0.95)).all()
