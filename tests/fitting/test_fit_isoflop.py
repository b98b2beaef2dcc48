import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_scaling.fitting.isoflop import fit_isoflop, weighted_parabolas
from xlstm_scaling.fitting.power_law import difference, fit_power_laws
from xlstm_scaling.fitting.resampling import bootstrap_counts, percentile_interval
from xlstm_scaling.fitting.tables import usable_runs


def cell(x, loss):
    """One budget of runs with log10 N = x."""
    x = np.asarray(x, dtype=float)
    frame = pd.DataFrame({"num_params": 10**x, "num_tokens": 1e12 / 10**x, "num_flops": 6e12, "val_loss": loss})
    constants = {"status": "ok", "experiment_set": "isoflop", "isoflop_tag": "6e+12", "ratio_tag": np.nan}
    frame = frame.assign(arch="xlstm", context_length=512, **constants)
    return usable_runs(frame.assign(run_id=[f"run{i}" for i in range(len(x))]))


def statuses(runs, config):
    return fit_isoflop(runs, config)[0].set_index("variable")["status"].to_dict()


def test_planted_parabola(config):
    x = np.linspace(4.5, 5.7, 7)
    table, resamples = fit_isoflop(cell(x, 0.8 * (x - 5.2) ** 2 + 3.0), config)
    row = table.set_index("variable").loc["num_params"]
    assert row[["a", "b", "c"]].to_numpy(float) == pytest.approx([0.8, -8.32, 0.8 * 5.2**2 + 3.0], rel=1e-9)
    assert row["x_opt"] == pytest.approx(10**5.2)
    assert row["loss_opt"] == pytest.approx(3.0)
    assert row["x_opt_lo"] == pytest.approx(row["x_opt_hi"]), "noise-free data leave nothing to vary"
    assert row["r2"] == pytest.approx(1.0)
    assert len(resamples) == 2 * config["num_resamples"]
    tokens = table.set_index("variable").loc["num_tokens"]
    assert tokens["x_opt"] == pytest.approx(10 ** (12 - 5.2))


@pytest.mark.parametrize(
    ("x", "curvature", "vertex", "status"),
    [
        ([4.5, 5.0, 5.5], 1.0, 5.0, "too_few_runs"),
        ([5.0, 5.0, 5.0, 5.0, 5.0], 1.0, 5.0, "too_few_runs"),
        ([5.0, 5.0, 5.0, 5.5, 5.5], 1.0, 5.0, "too_few_runs"),
        (np.linspace(4.5, 5.5, 6), -1.0, 5.0, "no_minimum"),
        (np.linspace(4.5, 5.5, 6), 0.0, 5.0, "no_minimum"),
        (np.linspace(4.5, 5.5, 6), 1.0, 6.0, "outside_range"),
        (np.linspace(4.5, 5.5, 6), 1.0, 5.4, "ok"),
    ],
)
def test_degenerate_cells_get_a_status(config, x, curvature, vertex, status):
    x = np.asarray(x)
    runs = cell(x, 3.0 + curvature * (x - vertex) ** 2)
    table, resamples = fit_isoflop(runs, config)
    assert set(table["status"]) == {status}
    assert table["detail"].str.len().gt(10).all()
    if status != "ok":
        assert table[["x_opt", "x_opt_lo", "x_opt_hi", "loss_opt"]].isna().all(axis=None)
        assert resamples.empty


def test_no_interval_where_most_resamples_have_no_minimum(config):
    x = np.linspace(4.5, 5.5, 5)
    loss = 3.0 + np.array([0.01, -0.03, 0.04, -0.03, 0.01])  # a W, whose parabola is barely convex
    config["num_resamples"] = 400
    row = fit_isoflop(cell(x, loss), config)[0].iloc[0]
    assert row["status"] == "ok"
    assert 0 < row["resamples_ok"] < 200
    assert np.isfinite(row["x_opt"])
    assert np.isnan([row[name] for name in ("x_opt_lo", "x_opt_hi", "loss_opt_lo", "loss_opt_hi")]).all()
    assert "no interval" in row["detail"]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_weighted_parabola_is_polyfit_of_repeated_runs(seed):
    generator = np.random.default_rng(seed)
    x, y = np.sort(generator.uniform(-1, 1, 8)), generator.normal(3, 0.1, 8)
    counts = generator.integers(0, 4, (1, 8)).astype(float)
    found = weighted_parabolas(x, y, counts)[0]
    times = counts[0].astype(int)
    if (times > 0).sum() < 3:
        assert np.isnan(found).all()
    elif (times > 0).sum() > 3:
        expected = np.polyfit(np.repeat(x, times), np.repeat(y, times), 2)
        fitted = [np.polyval(c, np.repeat(x, times)) for c in (found, expected)]
        np.testing.assert_allclose(*fitted, atol=1e-6)


def test_interval_covers_the_planted_minimum():
    """Nominal 95 %; a bootstrap of pairs with 12 runs reaches about 92 % in this design."""
    z, hits, trials = np.linspace(-1, 1, 12), 0, 200
    for seed in range(trials):
        generator = np.random.default_rng(seed)
        y = 3.0 + 0.15 * (z - 0.1) ** 2 + 0.005 * generator.standard_normal(12)
        a, b, _ = weighted_parabolas(z, y, bootstrap_counts(12, 300, generator)).T
        lo, hi = percentile_interval(-b / (2 * a), 0.95)
        hits += lo <= 0.1 <= hi
    assert 0.86 <= hits / trials <= 0.99


def test_power_laws_recover_the_planted_exponents(config, planted, make_runs):
    runs = usable_runs(make_runs(noise=0.0, sizes=9))
    laws, bands = fit_power_laws(*fit_isoflop(runs, config), config, runs)
    laws = laws[laws["predictor"] == "flops"].set_index(["arch", "variable", "context_length"])
    for arch, surface in planted.items():
        found = laws.loc[(arch, "num_params", 512.0)]
        assert found["exponent"] == pytest.approx(surface.exponent_params, abs=0.01), (
            "the loss is only nearly a parabola"
        )
        assert laws.loc[(arch, "num_tokens", 512.0), "exponent"] == pytest.approx(1 - found["exponent"], abs=1e-6)
        assert laws.loc[(arch, "loss", 512.0), "exponent"] < 0
    gap = laws.loc[(difference("xlstm", "transformer"), "num_params", 512.0)]
    exponents = [laws.loc[(arch, "num_params", 512.0), "exponent"] for arch in ("xlstm", "transformer")]
    assert gap["exponent"] == pytest.approx(exponents[0] - exponents[1])
    assert gap["exponent_lo"] <= gap["exponent"] <= gap["exponent_hi"]
    assert np.isnan(gap["log10_coefficient"])
    assert (bands["value_lo"] <= bands["value_hi"]).all()
    flat = fit_power_laws(*fit_isoflop(runs, config), config, runs)[0]
    flat = flat[(flat["predictor"] == "context_length") & (flat["arch"] == "xlstm")]
    assert flat["exponent"].to_numpy() == pytest.approx(0.0, abs=1e-9), "the planted law knows no context"


def test_power_law_leaves_failed_cells_out_and_says_so(config, make_runs):
    runs = make_runs(noise=0.002)
    lost = (runs["isoflop_tag"] == "1e+12") & (runs["arch"] == "xlstm") & (runs["context_length"] == 256)
    runs.loc[lost, "val_loss"] = np.nan
    few = (runs["isoflop_tag"] == "3e+11") & (runs["arch"] == "xlstm") & (runs["context_length"] == 256)
    runs = usable_runs(runs.drop(index=runs[few].index[3:]))
    laws, _ = fit_power_laws(*fit_isoflop(runs, config), config, runs)
    row = laws[(laws["arch"] == "xlstm") & (laws["context_length"] == 256) & (laws["variable"] == "num_params")]
    row = row[row["predictor"] == "flops"].iloc[0]
    assert row["status"] == "too_few_points"
    assert row["num_points"] == 1
    assert np.isnan(row["exponent"])


def test_intervals_do_not_depend_on_which_other_cells_exist(config, make_runs):
    runs = usable_runs(make_runs(noise=0.003))
    everything = fit_isoflop(runs, config)[0]
    alone = fit_isoflop(runs[runs["arch"] == "xlstm"].reset_index(drop=True), config)[0]
    pd.testing.assert_frame_equal(everything[everything["arch"] == "xlstm"].reset_index(drop=True), alone)
