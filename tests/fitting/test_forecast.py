"""Leave-future-out on planted laws: what holds is covered, what breaks at the last budget is not."""

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.fitting.forecast import fit_forecasts
from xlstm_scaling.fitting.isoflop import fit_isoflop
from xlstm_scaling.fitting.tables import usable_runs

BUDGETS = (1e11, 3e11, 1e12, 3e12)


def forecast(runs, config):
    runs = usable_runs(runs)
    isoflop, resamples = fit_isoflop(runs, config)
    return fit_forecasts(isoflop, resamples, runs, config)


@pytest.fixture
def config(config):
    config["surface"]["forms"] = ["gamma_fixed"]
    config["surface"]["scaled_grid"] |= {"params_share": [0.5], "alpha": [0.3], "beta": [0.3]}
    return config


def test_planted_laws_are_forecast(make_runs, config):
    rows = forecast(make_runs(noise=1e-3, budgets=BUDGETS, sizes=9), config)
    laws = rows[rows["law"] == "power_law"]
    # two architectures, two contexts, three quantities, and two budgets beyond the first two
    assert len(laws) == 2 * 2 * 3 * 2
    assert set(laws["num_points"]) == {2, 3}
    optimum = laws[laws["quantity"] != "loss"]
    assert optimum["coverage"].mean() > 0.75
    assert optimum["error"].abs().median() < 0.15
    inside = (optimum["predicted_lo"] <= optimum["predicted"]) & (optimum["predicted"] <= optimum["predicted_hi"])
    assert inside.mean() > 0.9
    surfaces = rows[rows["law"] == "surface_gamma_fixed"]
    assert set(surfaces["arch"]) == {"xlstm", "transformer"}
    assert (surfaces["num_held_out"] == 9).all()
    assert (surfaces["error"] < 0.01).all()
    assert (surfaces["coverage"] > 0.6).all()


def test_a_law_that_breaks_is_not_covered(make_runs, config):
    runs = make_runs(noise=1e-3, budgets=BUDGETS, sizes=9)
    last = runs["isoflop_tag"] == "3e+12"
    runs.loc[last, "num_params"] *= 3  # the minimum lies elsewhere than the smaller budgets say
    runs.loc[last, "val_loss"] *= 1.1
    rows = forecast(runs, config)
    ahead = rows[(rows["isoflop_tag"] == "3e+12") & (rows["quantity"] != "num_tokens")]
    assert len(ahead) == 2 * 2 * 2 + 2
    assert (ahead["coverage"] < 0.2).all()
    shifted = ahead[ahead["quantity"] == "num_params"]
    assert np.allclose(shifted["error"], 1 / 3 - 1, atol=0.12)


def test_the_power_law_of_the_loss_misses_what_has_an_irreducible_part(make_runs, config):
    rows = forecast(make_runs(budgets=(1e11, 1e12, 1e13, 1e14), sizes=9), config)
    losses = rows[(rows["quantity"] == "loss") & (rows["num_points"] == 3)]
    assert (losses["predicted"] < losses["observed"]).all()


def test_two_budgets_give_nothing_and_the_types_stay(make_runs, config):
    rows = forecast(make_runs(budgets=BUDGETS[:2]), config)
    assert rows.empty
    assert rows["num_points"].dtype == "int64"


def test_the_order_of_rows_does_not_matter(make_runs, config):
    runs = make_runs(noise=1e-3, budgets=BUDGETS)
    shuffled = runs.sample(frac=1, random_state=1).reset_index(drop=True)
    pd.testing.assert_frame_equal(forecast(runs, config), forecast(shuffled, config))
