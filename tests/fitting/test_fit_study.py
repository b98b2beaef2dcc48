import copy

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.fitting import COLUMNS, FitError, fit_all


@pytest.fixture(scope="module")
def quick(default_config):
    config = copy.deepcopy(default_config) | {"num_resamples": 20}
    config["surface"]["sensitivity_deltas"] = [1.0e-2]
    grid = config["surface"]["init_grid"]
    grid |= {"a": [5, 15], "b": [5, 15], "e": [0], "alpha": [0.5], "beta": [0.5], "gamma": [1]}
    config["surface"]["scaled_grid"] |= {"alpha": [0.3], "beta": [0.3], "gamma": [0.5, 1]}
    return config


@pytest.fixture(scope="module")
def fitted(quick, make_runs):
    """Noisy runs, their tables, and the lines of progress."""
    runs, lines = make_runs(noise=0.003), []
    return runs, fit_all(runs.copy(), quick, progress=lines.append), lines


def test_every_table_has_its_columns_and_types(fitted):
    _, tables, lines = fitted
    assert set(tables) == set(COLUMNS)
    for name, table in tables.items():
        assert list(table.columns) == COLUMNS[name]
    empty = tables["envelope"]
    assert empty.empty
    assert empty["exponent"].dtype == np.float64
    assert empty["num_points"].dtype == np.int64
    assert tables["power_laws"]["context_length"].dtype == np.float64
    assert tables["isoflop"]["context_length"].dtype == np.int64
    assert tables["isoflop"]["isoflop_tag"].map(type).eq(str).all()
    assert tables["power_laws"].query("predictor == 'flops'")["isoflop_tag"].isna().all()
    assert len(lines) > 10
    assert set(tables["surface"]["huber_delta"]) == {1e-3, 1e-2}
    assert set(tables["surface"]["context_length"]) == {512}


def test_neither_order_nor_bad_runs_matter(quick, fitted):
    """Rows in another order, and runs among them that diverged, failed or have no loss: the same tables, to the bit."""
    runs, first, _ = fitted
    bad = runs.iloc[[0, 1, 2]].copy()
    bad["run_id"] = ["bad0", "bad1", "bad2"]
    bad["status"] = ["diverged", "failed", "ok"]
    bad["val_loss"] = [9.0, 9.0, np.nan]
    second = fit_all(pd.concat([bad, runs], ignore_index=True).sample(frac=1.0, random_state=3), quick)
    for name in COLUMNS:
        pd.testing.assert_frame_equal(first[name], second[name], check_exact=True, obj=name)


def test_no_valid_fit_says_what_was_missing(quick, make_runs):
    runs = make_runs()
    few = runs[runs["isoflop_tag"] == "1e+11"].groupby(["arch", "context_length"]).head(3)
    with pytest.raises(FitError, match=r"12 usable runs.*too_few_runs"):
        fit_all(few, quick)
    with pytest.raises(FitError, match="none of the"):
        fit_all(runs.assign(status="failed"), quick)
    with pytest.raises(FitError, match="val_loss"):
        fit_all(runs.drop(columns="val_loss"), quick)
    with pytest.raises(ValueError, match="not one fit"):
        fit_all(few, quick)


def test_one_architecture_and_one_set_are_enough(quick, make_runs):
    """Of tags that are numbers, which they stay."""
    runs = make_runs(noise=0.003, archs=("xlstm",)).astype({"isoflop_tag": float})
    tables = fit_all(runs[runs["experiment_set"] == "isoflop"], quick)
    assert (tables["isoflop"]["status"] == "ok").any()
    assert tables["isoflop"]["isoflop_tag"].dtype == np.float64
    assert tables["overtraining"].empty
    assert tables["pareto_ratio"].empty
    skipped = tables["surface"].query("subset == 'tokenparam'")
    assert set(skipped["status"]) == {"too_few_runs"}
    assert skipped[["A", "objective"]].isna().all(axis=None)


def test_surface_intervals_bracket_the_planted_exponent(config, make_runs):
    config["surface"] |= {"forms": ["gamma_fixed"], "subsets": ["all"], "sensitivity_deltas": []}
    config["num_resamples"] = 200
    table = fit_all(make_runs(noise=0.002, sizes=9), config)["surface"].set_index("arch")
    assert set(table["status"]) == {"converged"}
    for arch, planted in (("xlstm", 0.33 / 0.68), ("transformer", 0.32 / 0.66)):
        row = table.loc[arch]
        width = row["exponent_params_hi"] - row["exponent_params_lo"]
        assert 0 < width < 0.3
        assert row["exponent_params_lo"] - 0.25 * width <= planted <= row["exponent_params_hi"] + 0.25 * width
