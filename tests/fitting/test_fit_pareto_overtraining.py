import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_scaling.fitting import FitError
from xlstm_scaling.fitting.envelope import fit_envelope
from xlstm_scaling.fitting.overtraining import fit_overtraining
from xlstm_scaling.fitting.pareto import convex_frontier, fit_pareto, flops_at_loss, frontier_mask
from xlstm_scaling.fitting.tables import usable_runs

pairs = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=12)


@given(pairs)
def test_frontier_is_what_nothing_beats(runs):
    flops, loss = np.array(runs, dtype=float).T
    mask = frontier_mask(flops, loss)
    for i in range(len(flops)):
        better = (flops <= flops[i]) & (loss <= loss[i]) & ((flops < flops[i]) | (loss < loss[i]))
        if mask[i]:
            assert not better.any()
        else:
            assert better.any() or ((flops == flops[i]) & (loss == loss[i]) & mask).any()


def test_runs_of_one_budget_compete_as_equals():
    """A step more or less does not put two runs of a budget on the frontier."""
    flops, loss = np.array([1.0e12, 1.002e12, 1.5e12]), np.array([3.9, 3.6, 3.5])
    assert frontier_mask(flops, loss).tolist() == [True, True, True]
    assert frontier_mask(flops, loss, tolerance=0.02).tolist() == [False, True, True]


@given(pairs)
def test_convex_frontier_lies_below_all_runs(runs):
    flops, loss = np.array(runs, dtype=float).T
    x, y = convex_frontier(flops, loss)
    inside = (np.log(flops) >= x[0]) & (np.log(flops) <= x[-1])
    assert (np.interp(np.log(flops[inside]), x, y) <= np.log(loss[inside]) + 1e-9).all()
    assert (np.diff(np.diff(y) / np.diff(x)) > 0).all()


def test_flops_at_loss_stays_inside_the_range():
    flops, loss = np.array([1e10, 1e11, 1e12]), np.array([4.0, 3.5, 3.2])
    found = flops_at_loss(flops, loss, np.array([4.1, 4.0, 3.5, 3.2, 3.1]))
    assert np.isnan(found[[0, 4]]).all()
    assert found[1:4] == pytest.approx(flops)


def test_ratio_of_planted_power_laws(config, make_runs):
    """Two exact power laws, the Transformer's shifted by a factor of three in FLOPs."""
    runs = usable_runs(make_runs(contexts=(512,)))
    shift = np.where(runs["arch"] == "transformer", 3.0, 1.0)
    runs["num_flops"] = np.tile(np.geomspace(1e10, 1e13, 30), 2) * shift
    runs["val_loss"] = 20.0 * (runs["num_flops"] / shift) ** -0.06
    frontier, ratio = fit_pareto(runs, config)
    assert len(frontier) == 60
    assert ratio["flop_ratio"].to_numpy() == pytest.approx(3.0, rel=1e-6)
    known = ratio[ratio["status"] == "ok"]
    assert len(known) > 10
    assert known[["flop_ratio_lo", "flop_ratio_hi"]].to_numpy() == pytest.approx(3.0, rel=1e-6)


def test_no_ratio_without_overlap(config, make_runs):
    runs = usable_runs(make_runs(contexts=(512,)))
    runs.loc[runs["arch"] == "transformer", "val_loss"] += 100.0
    assert fit_pareto(runs, config)[1].empty


def test_overtraining_recovers_a_planted_slope(config, make_runs):
    runs = make_runs()
    runs["val_loss"] = np.exp(-0.05 * np.log(runs["num_flops"]) + 3.0)
    table = fit_overtraining(usable_runs(runs), config)
    assert len(table) == 6
    assert table["slope"].to_numpy() == pytest.approx(-0.05)
    assert table["intercept"].to_numpy() == pytest.approx(3.0)
    assert table[["slope_lo", "slope_hi"]].to_numpy() == pytest.approx(-0.05)


def test_overtraining_refuses_too_few_runs_and_equal_flops(config, make_runs):
    runs = make_runs(archs=("xlstm",))
    runs = runs[runs["experiment_set"] == "tokenparam"].copy()
    runs.loc[runs["ratio_tag"] == 20.0, "num_flops"] = 1e11
    runs = runs.drop(index=runs[runs["ratio_tag"] == 60.0].index[:1])
    table = fit_overtraining(usable_runs(runs), config).set_index("ratio_tag")
    assert table["status"].to_dict() == {20.0: "too_few_runs", 60.0: "too_few_runs", 200.0: "ok"}
    assert table["slope"].isna().to_dict() == {20.0: True, 60.0: True, 200.0: False}


def curves(num_sizes=12):
    """Constant-rate curves L = 2 + 60/N^0.4 + 60/D^0.4, whose envelope has N ∝ H^0.5 and D ∝ H^0.5."""
    rows = []
    for i, num_params in enumerate(np.geomspace(1e4, 3e6, num_sizes)):
        tokens = np.geomspace(0.01 * num_params, 400 * num_params, 80)
        loss = 2 + 60 / num_params**0.4 + 60 / tokens**0.4
        frame = pd.DataFrame({"tokens": tokens, "flops": 6 * num_params * tokens, "loss": loss})
        rows.append(frame.assign(arch="xlstm", context_length=512, run_id=f"r{i}", num_params=num_params))
    return pd.concat(rows, ignore_index=True)


def test_envelope_recovers_the_planted_exponents(config, make_runs):
    table = fit_envelope(curves(40), config, make_runs()).set_index("variable")
    assert table.loc["num_params", "exponent"] == pytest.approx(0.5, abs=0.05)
    assert table.loc["num_tokens", "exponent"] == pytest.approx(1 - table.loc["num_params", "exponent"], abs=1e-6)
    assert table.loc["loss", "exponent"] < 0
    assert (table["exponent_lo"] <= table["exponent_hi"]).all()


def test_envelope_without_enough_curves(config, make_runs):
    labels = make_runs()
    table = fit_envelope(curves(1), config, labels)
    assert set(table["status"]) == {"too_few_runs"}
    assert table["exponent"].isna().all()
    assert fit_envelope(None, config, labels).empty
    with pytest.raises(FitError, match="tokens"):
        fit_envelope(curves().drop(columns="tokens"), config, labels)
