"""Parts of the training loop: the guard, batches made ahead, metrics and their trackers."""

import json
import math
import threading
import time

import pytest

from xlstm_scaling.study.config import ConfigError, compose
from xlstm_scaling.training.guard import Diverged, GuardRule, LossGuard
from xlstm_scaling.training.metrics import MetricsLog, TrackerError, log_interval, read_history
from xlstm_scaling.training.prefetch import prefetched


def feed(guard, losses, start=0):
    return [guard.accept(start + step, loss, 1.0) for step, loss in enumerate(losses)]


def test_an_isolated_spike_is_skipped_and_a_lasting_one_is_taken():
    guard = LossGuard(GuardRule(spike_factor=1.5, max_consecutive=3, max_skipped=20, loss_factor=10))
    assert all(feed(guard, [4.0] * 10))
    assert feed(guard, [7.0, 4.0]) == [False, True]
    assert feed(guard, [7.0] * 5) == [False, False, False, True, True]
    assert guard.skipped_steps == 4
    assert guard.smooth_loss > 4.0


def test_a_falling_loss_is_never_a_spike():
    guard = LossGuard(GuardRule())
    assert all(feed(guard, [8.0 * 0.99**step * (1 + 0.3 * math.sin(step)) for step in range(300)]))


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_too_many_end_the_run(norm):
    guard = LossGuard(GuardRule(max_consecutive=2, max_skipped=4))
    assert not guard.accept(0, 3.0, norm)
    assert guard.accept(1, 3.0, 1.0)
    assert not guard.accept(2, 3.0, norm)
    assert not guard.accept(3, 3.0, norm)
    with pytest.raises(Diverged, match=r"3 steps in a row.*step 4"):
        guard.accept(4, 3.0, norm)
    long = LossGuard(GuardRule(max_consecutive=2, max_skipped=4, max_skipped_share=0.1))
    assert feed(long, ([math.nan] + [3.0] * 19) * 10).count(False) == 10
    scattered = LossGuard(GuardRule(max_consecutive=2, max_skipped=4))
    with pytest.raises(Diverged, match="5 steps were skipped"):
        feed(scattered, [math.nan, 3.0] * 10)


def test_a_run_away_loss_ends_the_run_and_state_survives_a_checkpoint():
    guard = LossGuard(GuardRule(spike_factor=9.0, loss_factor=1.2))
    feed(guard, [2.0, 2.1])
    twin = LossGuard(guard.rule)
    twin.restore(json.loads(json.dumps(guard.state())))
    assert twin == guard
    losses = [2.0 + 0.2 * step for step in range(30)]
    messages = []
    for one in (guard, twin):
        with pytest.raises(Diverged, match="times its start") as caught:
            feed(one, losses, 2)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_and_errors_where_they_belong(depth):
    assert list(prefetched(lambda index: index * index, 2, 9, depth)) == [index * index for index in range(2, 9)]

    def failing(index):
        if index == 4:
            raise OSError("shard lost")
        return index

    stream = prefetched(failing, 0, 9, depth)
    assert [next(stream) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="shard lost"):
        next(stream)


def test_batches_are_made_ahead_and_no_thread_stays():
    made = []
    stream = prefetched(lambda index: made.append(index) or index, 0, 100, 2)
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [0, 1, 2, 3]  # two wait, one is at the door
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_the_curve_of_a_resumed_run_has_no_repeats(tmp_path):
    with MetricsLog(tmp_path, "run", {}, 0) as metrics:
        for step in (2, 4, 6):
            metrics.log({"step": step, "train_loss": 1.0})
    with MetricsLog(tmp_path, "run", {}, 4) as metrics:
        metrics.log({"step": 6, "train_loss": 2.0})
    assert [(line["step"], line["train_loss"]) for line in read_history(tmp_path / "history.jsonl")] == [
        (2, 1.0),
        (4, 1.0),
        (6, 2.0),
    ]
    assert log_interval(50) == 1
    assert log_interval(1000) == 10
    assert log_interval(10**6) == 100


def test_unknown_trackers_are_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"hardware\.trackers must be tensorboard or wandb, got 'mlflow'"):
        compose(["hardware.trackers=[mlflow]"])
    with pytest.raises(TrackerError, match="mlflow"):
        MetricsLog(tmp_path, "run", {}, 0, ["mlflow"])


def test_a_tracker_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackerError, match="pip install wandb"):
        MetricsLog(tmp_path, "run", {}, 0, ["wandb"])


def test_tensorboard_gets_the_curve(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, "run", {}, 0, ["tensorboard"]) as metrics:
        for step in (1, 2):
            metrics.log({"step": step, "train_loss": 5.0 - step, "val_loss": None})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train_loss")
    assert [(event.step, event.value) for event in events] == [(1, 4.0), (2, 3.0)]
