"""The learning rate schedule: its corners, and that it never jumps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_scaling.training.schedule import learning_rate


def test_corners():
    rates = [learning_rate(s, 100, 1.0, 10, 20, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0 == max(rates)
    assert rates[79] == pytest.approx(0.1)  # last step of the cosine
    assert rates[99] == pytest.approx(0.1 / 21)  # one step before zero
    assert rates[44] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-9)  # half way down the cosine


@given(
    st.integers(1, 300).flatmap(
        lambda n: st.tuples(
            st.just(n), st.integers(0, n).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, n - w)))
        )
    )
)
def test_rises_then_falls_and_stays_positive(case):
    n, (warmup, cooldown) = case
    rates = [learning_rate(s, n, 2.0, warmup, cooldown, 0.1) for s in range(n)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
