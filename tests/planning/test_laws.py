"""Laws read from tables: planted ones come back, contexts are joined as documented, resamples are carried."""

import numpy as np
import pandas as pd
import pytest
from planted_laws import BASE, BUDGETS, CONFIG, FACTORS, RESAMPLES, SURFACES, make_tables

from xlstm_scaling.fitting.loss_surface import LossSurface
from xlstm_scaling.fitting.resampling import percentile_interval
from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.laws import laws_of_tables, load_laws


@pytest.mark.parametrize("arch", SURFACES)
def test_planted_law_comes_back_at_every_context(laws, arch):
    law = laws.archs[arch]
    sizes, tokens = np.array([1e8, 3e9]), np.array([1e10, 4e10])
    for context, factor in FACTORS.items():
        expected = factor * SURFACES[arch].predict(sizes, tokens)
        np.testing.assert_allclose(law.surface.predict(sizes, tokens, context)[0], expected, rtol=1e-12)


def test_between_contexts_the_factor_is_linear_in_log(laws):
    surface = laws.archs["xlstm"].surface
    middle = surface.log_factor(np.sqrt(8192 * 16384))[0]
    assert middle == pytest.approx(0.5 * np.log(FACTORS[16384]), rel=1e-9)
    assert surface.log_factor(1e6)[0] == surface.log_factor(16384)[0]  # beyond them: the nearest
    assert surface.log_factor(100)[0] == pytest.approx(np.log(FACTORS[2048]))


def test_a_bias_of_the_surface_drops_out_of_the_factors():
    """A surface that is 3 % off everywhere has the same factors."""
    tables = make_tables()
    tables["isoflop"]["loss_opt"] *= 1.03
    tables["isoflop_resamples"]["loss_opt"] *= 1.03
    law = laws_of_tables(tables, CONFIG).archs["xlstm"].surface
    np.testing.assert_allclose(np.exp(law.log_factors[0]), [FACTORS[int(c)] for c in law.contexts], rtol=1e-12)


def test_tokens_for_loss_inverts_predict(laws):
    surface, sizes = laws.archs["transformer"].surface, np.geomspace(1e8, 1e11, 7)
    tokens = surface.tokens_for_loss(sizes, 2.6, 16384, slice(None))
    reached = np.isfinite(tokens)
    assert reached.any() and tokens.shape == (RESAMPLES + 1, 7)
    back = surface.predict(sizes, np.where(reached, tokens, 1e10), 16384, slice(None))
    np.testing.assert_allclose(back[reached], 2.6, rtol=1e-10)
    floor = surface.floor(sizes, 16384)
    np.testing.assert_array_equal(np.isfinite(tokens[0]), floor < 2.6)


def test_power_laws_are_those_of_the_minima(laws):
    for arch, planted in SURFACES.items():
        lines, how = laws.archs[arch].optimum("num_params", BASE)
        assert how == f"context {BASE:,}"
        assert lines[0, 1] == pytest.approx(planted.exponent_params, rel=1e-9)
        size = 10 ** (lines[0, 0] + lines[0, 1] * 22)
        assert size == pytest.approx(float(planted.compute_optimal(1e22)[0]), rel=1e-6)
    assert "between" in laws.archs["xlstm"].optimum("num_params", 12000)[1]
    assert "nearest" in laws.archs["xlstm"].optimum("num_params", 65536)[1]


def test_ranges_are_those_of_the_runs(laws):
    ranges = laws.archs["xlstm"].ranges
    assert ranges["num_params"] == pytest.approx((8e7, 7e9)) and ranges["tokens_per_param"] == (5, 80)
    assert ranges["num_flops"] == (BUDGETS[0], BUDGETS[-1]) and ranges["context_length"] == (2048, 16384)


def test_only_converged_surfaces_are_taken():
    tables = make_tables()
    fixed = tables["surface"].assign(form="gamma_fixed", gamma=1.0)
    tables["surface"] = pd.concat([tables["surface"].assign(status="bound_hit"), fixed], ignore_index=True)
    laws = laws_of_tables(tables, CONFIG)
    assert {law.form for law in laws.archs.values()} == {"gamma_fixed"}
    assert all(law.surface.rows == 1 for law in laws.archs.values())  # no resamples of that form: no interval
    tables["surface"] = tables["surface"].assign(status="unidentified")
    with pytest.raises(PlanningError, match="converged"):
        laws_of_tables(tables, CONFIG)


def test_one_architecture_without_a_surface_is_left_out_and_said():
    tables = make_tables()
    bad = tables["surface"]["arch"] == "transformer"
    tables["surface"].loc[bad, "status"] = "bound_hit"
    laws = laws_of_tables(tables, CONFIG)
    assert list(laws.archs) == ["xlstm"] and any("transformer" in note for note in laws.notes)


def test_missing_tables_are_named(tmp_path):
    with pytest.raises(PlanningError, match=r"surface_resamples\.parquet"):
        load_laws(tmp_path)


def test_the_stage_fit_keeps_the_resamples_behind_its_intervals():
    """`surface_resamples` holds what `surface`'s intervals are the percentiles of."""
    from xlstm_scaling.fitting.surface_tables import fit_surfaces
    from xlstm_scaling.study.config import compose, to_dict

    settings = to_dict(compose([]).fitting)
    settings["num_resamples"] = 30
    small = {"subsets": ["all"], "forms": ["gamma_fixed"], "sensitivity_deltas": []}
    small["init_grid"] = {"a": [5], "b": [5], "e": [0], "alpha": [0.3], "beta": [0.3], "gamma": [1]}
    settings["surface"] |= small
    law, rng = LossSurface(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28), np.random.default_rng(0)
    sizes = np.repeat(np.geomspace(1e7, 1e9, 6), 6)
    tokens = np.tile(np.geomspace(1e8, 1e11, 6), 6)
    losses = law.predict(sizes, tokens) * np.exp(0.003 * rng.normal(size=36))
    runs = pd.DataFrame({"num_params": sizes, "num_tokens": tokens, "val_loss": losses, "arch": "xlstm"})
    runs = runs.assign(context_length=256, experiment_set="tokenparam", isoflop_tag=np.nan, ratio_tag=1.0)
    runs["run_id"] = [f"r{i}" for i in range(36)]
    surface, resamples, _ = fit_surfaces(runs, settings)
    assert len(resamples) == 30 and list(resamples["resample"]) == list(range(30))
    row = surface.iloc[0]
    for name in ("A", "B", "E", "alpha", "beta"):
        assert percentile_interval(resamples[name], 0.95) == pytest.approx((row[f"{name}_lo"], row[f"{name}_hi"]))
