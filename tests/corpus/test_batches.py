import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_scaling.corpus import BatchSchedule, CorpusError, TokenDataset, ValidationWindows, get_batch, get_windows
from xlstm_scaling.corpus.batches import permute

seeds = st.integers(0, 2**63 - 1)


@given(st.integers(1, 3000), seeds, st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_the_permutation_is_a_bijection(n, seed, epoch):
    image = permute(np.arange(n), n, seed, epoch)
    np.testing.assert_array_equal(np.sort(image), np.arange(n))


@given(st.integers(2**20, 2**44), seeds)
@settings(max_examples=50, deadline=None)
def test_the_permutation_of_a_large_range_is_injective_and_local(n, seed):
    indices = np.unique(np.linspace(0, n - 1, 500).astype(np.int64))
    image = permute(indices, n, seed)
    assert np.unique(image).size == indices.size
    assert image.min() >= 0
    assert image.max() < n
    np.testing.assert_array_equal(permute(indices[::-7], n, seed), image[::-7])  # whatever else is asked


def test_the_permutation_looks_random():
    n, trials = 12, 6000
    images = np.stack([permute(np.arange(n), n, seed) for seed in range(trials)])  # (trials, n)
    table = np.stack([np.bincount(images[:, i], minlength=n) for i in range(n)])  # position x value
    chi2 = ((table - trials / n) ** 2 / (trials / n)).sum() / (n - 1) ** 2
    assert 0.6 < chi2 < 1.4  # its mean is 1 and its standard deviation 0.13 for uniform permutations
    follows = np.diff(permute(np.arange(100_000), 100_000, 0))
    assert abs((follows == 1).sum() - 1) < 8  # neighbours do not stay neighbours
    a, b = (permute(np.arange(100_000), 100_000, 0, epoch) for epoch in (0, 1))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(np.corrcoef(a, np.arange(100_000))[0, 1]) < 0.02


schedules = st.builds(
    lambda length, batch, more, tail, seed: BatchSchedule(
        (batch + more + 1) * length + tail % length, length, batch, seed
    ),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 60),
    st.integers(0, 39),
    seeds,
)


@given(schedules)
@settings(max_examples=100, deadline=None)
def test_every_window_comes_once_an_epoch(schedule):
    n, length = schedule.windows_per_epoch, schedule.context_length
    steps = -(-3 * n // schedule.batch_size)
    stream = np.concatenate([schedule.window_starts(step) for step in range(steps)])
    for epoch in range(3):
        starts = np.sort(stream[epoch * n : (epoch + 1) * n])
        np.testing.assert_array_equal(starts, schedule.offset(epoch) + length * np.arange(n))
        assert 0 <= schedule.offset(epoch) < length
        assert starts[-1] + length + 1 <= schedule.num_tokens
    assert schedule.epochs(steps) >= 3
    assert schedule.epoch_of(0) == 0


@given(schedules, st.integers(0, 10**6), st.data())
@settings(max_examples=100, deadline=None)
def test_a_batch_depends_on_seed_and_step_only(schedule, step, data):
    again = BatchSchedule(schedule.num_tokens, schedule.context_length, schedule.batch_size, schedule.seed)
    for earlier in data.draw(st.lists(st.integers(0, 10**6), max_size=3)):
        again.window_starts(earlier)
    starts = schedule.window_starts(step)
    np.testing.assert_array_equal(starts, again.window_starts(step))
    rows = data.draw(st.slices(schedule.batch_size))
    np.testing.assert_array_equal(starts[rows], schedule.window_starts(step, rows))
    single = BatchSchedule(schedule.num_tokens, schedule.context_length, 1, schedule.seed)
    row = data.draw(st.integers(0, schedule.batch_size - 1))
    assert single.window_starts(step * schedule.batch_size + row)[0] == starts[row]
    assert single.epoch_of(step * schedule.batch_size) == schedule.epoch_of(step)


def test_seeds_and_epochs_differ():
    orders = [BatchSchedule(100_000, 64, 32, seed).window_starts(0).tolist() for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    schedule = BatchSchedule(100_000, 64, 32, 0)
    assert len({schedule.offset(epoch) for epoch in range(64)}) > 30


def test_get_batch_reads_the_windows(tokens_folder):
    split = TokenDataset.open(tokens_folder).split("train")
    schedule = BatchSchedule(split.num_tokens, context_length=33, batch_size=6, seed=3)
    inputs, targets, starts = get_batch(split, schedule, step=11)
    assert inputs.shape == targets.shape == starts.shape == (6, 33)
    assert (inputs.dtype, targets.dtype, starts.dtype) == (np.int64, np.int64, bool)
    flat = split.gather(np.array([0]), split.num_tokens)[0]
    begins = split.document_starts(np.array([0]), split.num_tokens)[0]
    for row, first in enumerate(schedule.window_starts(11)):
        np.testing.assert_array_equal(inputs[row], flat[first : first + 33])
        np.testing.assert_array_equal(targets[row], flat[first + 1 : first + 34])
        np.testing.assert_array_equal(starts[row], begins[first : first + 33])
    for part, whole in zip(get_batch(split, schedule, 11, rows=slice(2, 5)), (inputs, targets, starts)):
        np.testing.assert_array_equal(part, whole[2:5])
    with pytest.raises(ValueError, match="the schedule is for 99999 tokens"):
        get_batch(split, BatchSchedule(99_999, 33, 6, 3), 0)


def test_a_corpus_too_small_for_the_plan():
    with pytest.raises(
        CorpusError, match=r"too small for the plan: 1,000 training tokens hold 9 windows .* batch of 16"
    ):
        BatchSchedule(1000, 100, 16, 0)
    with pytest.raises(CorpusError, match=r"hold 0 windows"):
        BatchSchedule(10, 100, 1, 0)
    with pytest.raises(CorpusError, match=r"validation split has 64 tokens.*corpus\.validation_fraction"):
        ValidationWindows(64, 64)
    with pytest.raises(ValueError, match="must be positive"):
        BatchSchedule(1000, 0, 1, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        BatchSchedule(1000, 10, 1, 0).window_starts(-1)


@given(st.integers(2, 5000), st.integers(1, 64), st.none() | st.integers(1, 6000), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_validation_windows_are_in_order_and_disjoint(num_tokens, length, max_tokens, batch_size):
    if num_tokens <= length:
        return
    windows = ValidationWindows(num_tokens, length, max_tokens)
    assert len(windows) >= 1
    assert (np.diff(windows.starts) >= length).all()
    assert windows.starts[0] == 0
    assert windows.starts[-1] + length + 1 <= num_tokens
    if max_tokens is None:
        assert len(windows) == (num_tokens - 1) // length
    else:
        assert windows.num_target_tokens <= max(max_tokens, length)
    np.testing.assert_array_equal(np.concatenate(list(windows.batches(batch_size))), windows.starts)


def test_validation_windows_cover_the_split(tokens_folder):
    split = TokenDataset.open(tokens_folder).split("validation")
    windows = ValidationWindows(split.num_tokens, 16)
    _, targets, _ = get_windows(split, windows.starts, 16)
    flat = split.gather(np.array([0]), split.num_tokens)[0]
    np.testing.assert_array_equal(targets.ravel(), flat[1 : 1 + windows.num_target_tokens])
