import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_scaling.fitting.resampling import (
    bootstrap_counts,
    cell_generator,
    percentile_interval,
    refill,
    stratified_counts,
)


def test_a_cell_has_its_own_stream():
    draws = [cell_generator(0, "isoflop", arch, 512).random() for arch in ("xlstm", "transformer", "xlstm")]
    assert draws[0] == draws[2] != draws[1]
    assert cell_generator(1, "isoflop", "xlstm", 512).random() != draws[0]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_stratified_counts_keep_the_size_of_every_cell(cells):
    counts = stratified_counts(cells, 20, 0, "test")
    for label in set(cells):
        members = [index for index, cell in enumerate(cells) if cell == label]
        assert (counts[:, members].sum(axis=1) == len(members)).all()


def test_a_cell_does_not_feel_the_others():
    alone = stratified_counts(["a"] * 5, 50, 0, "test")
    together = stratified_counts(["b"] * 3 + ["a"] * 5, 50, 0, "test")
    np.testing.assert_array_equal(alone, together[:, 3:])


def test_too_few_distinct_runs_are_nan():
    counts = stratified_counts(["a"] * 3, 200, 0, "test", min_distinct=3)
    failed = np.isnan(counts).all(axis=1)
    assert 0 < failed.sum() < 200
    assert ((counts[~failed] > 0).sum(axis=1) == 3).all()


def test_interval_needs_half_of_the_resamples():
    samples = np.arange(10.0)
    assert percentile_interval(samples, 0.8) == pytest.approx((0.9, 8.1))
    samples[:6] = np.nan
    assert np.isnan(percentile_interval(samples, 0.8)).all()
    assert np.isnan(percentile_interval([], 0.8)).all()


def test_bootstrap_of_a_mean_has_its_standard_error():
    data = np.random.default_rng(0).standard_normal(50)
    counts = bootstrap_counts(50, 4000, np.random.default_rng(1))
    means = counts @ data / 50
    assert means.std() == pytest.approx(data.std() / np.sqrt(50), rel=0.05)


def test_refill_draws_from_survivors_or_gives_up():
    samples = np.array([[1.0, 2.0], [np.nan, 5.0], [3.0, 4.0], [5.0, 6.0]])
    filled = refill(samples, np.random.default_rng(0))
    np.testing.assert_array_equal(filled[[0, 2, 3]], samples[[0, 2, 3]])
    assert filled[1].tolist() in samples[[0, 2, 3]].tolist()
    samples[2:] = np.nan
    assert np.isnan(refill(samples, np.random.default_rng(0))).all()
