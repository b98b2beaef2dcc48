"""Tables of maps agree with single answers, and advantages with their definition."""

import numpy as np
import pandas as pd
import pytest
from planted_laws import BASE

from xlstm_scaling.accounting.hardware import DEVICES
from xlstm_scaling.planning.maps import advantages, best_losses, ladders, round_contexts
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.recommend import recommend
from xlstm_scaling.planning.runtime import Roofline


def test_maps_agree_with_single_answers(laws):
    """A map searches fewer shapes, so it may lose a little, and never wins."""
    table = best_losses(laws, ladders(laws), [BASE, 16384], [1e20, 1e21])
    for row in table.itertuples():
        part = recommend(Question(row.context_length, flops=row.flops), laws)["architectures"][row.arch]
        exact = part["choice"]["loss"]["value"]
        assert exact - 1e-12 <= row.loss <= exact + 0.01
        assert row.loss_lo < row.loss < row.loss_hi
    chances = table.groupby(["context_length", "flops"])["probability_best"].sum()
    np.testing.assert_allclose(chances, 1.0)


def test_limits_only_raise_the_loss_until_no_model_is_left(laws):
    limits = [1e-7, 1e-3, 1e-2, 0.1, 10.0]
    table = best_losses(laws, ladders(laws), [8192], [1e21], limits, Roofline(DEVICES["H100"]))
    for _, mine in table.groupby("arch"):
        losses = mine.sort_values("max_ttft_s")["loss"].to_numpy()
        assert np.isnan(losses[0]) and (np.diff(losses[1:]) <= 0).all()
        kept = mine.dropna(subset="loss")
        assert (kept["ttft_s"] <= kept["max_ttft_s"]).all()


def test_advantage_is_signed_and_infinite_where_one_is_alone():
    keys = {"context_length": [1, 1, 2, 2, 3, 3], "flops": 1.0, "max_ttft_s": np.nan}
    table = pd.DataFrame({**keys, "arch": ["a", "b"] * 3, "loss": [2.0, 2.5, 3.0, np.nan, np.nan, np.nan]})
    table["probability_best"] = [0.9, 0.1, 1.0, 0.0, 0.0, 0.0]
    found = advantages(table, "a", "b").set_index("context_length")["advantage"]
    assert found[1] == pytest.approx(0.5) and found[2] == np.inf and np.isnan(found[3])
    assert advantages(table, "b", "a").set_index("context_length")["advantage"][1] == pytest.approx(-0.5)


def test_contexts_are_powers_of_two_that_cover_a_range():
    assert round_contexts(2048, 16384) == [2048, 4096, 8192, 16384] and round_contexts(300, 1000) == [256, 512, 1024]
