"""Other countings of FLOPs and runs: what they must change, and what they must not."""

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.accounting import CONVENTIONS, ModelShape, count_params, training_flops
from xlstm_scaling.fitting.isoflop import fit_isoflop
from xlstm_scaling.fitting.power_law import fit_power_laws
from xlstm_scaling.fitting.sensitivity import MULTIPLICITY, fit_sensitivity
from xlstm_scaling.fitting.tables import usable_runs

SHAPE = {"embedding_dim": 64, "num_blocks": 2, "num_heads": 2, "head_dim_qk": 32, "head_dim_v": 32, "ffn_dim": 192}


def laws_and_variants(runs, config):
    runs = usable_runs(runs)
    isoflop, resamples = fit_isoflop(runs, config)
    laws, _ = fit_power_laws(isoflop, resamples, config, runs)
    laws = laws[(laws["predictor"] == "flops") & laws["variable"].isin(["num_params", "num_tokens"])]
    key = ["arch", "context_length", "variable"]
    return laws.set_index(key), fit_sensitivity(runs, isoflop, resamples, config).set_index(key)


@pytest.fixture
def runs(make_runs):
    return make_runs(noise=1e-3, archs=("transformer",), contexts=(512,))


def test_a_run_counted_as_often_as_all_others_changes_nothing(runs, config):
    laws, variants = laws_and_variants(runs.assign(**{MULTIPLICITY: 2}), config)
    assert set(variants["variant"]) == {"duplicates"}
    assert np.allclose(variants["exponent"], laws.loc[variants.index, "exponent"], rtol=1e-9)


def test_runs_counted_twice_move_the_exponent_as_if_they_stood_there_twice(runs, config):
    twice = runs["isoflop_tag"].eq("1e+12") & (np.arange(len(runs)) % 2 == 0)
    _, variants = laws_and_variants(runs.assign(**{MULTIPLICITY: 1 + twice}), config)
    copies = runs[twice].assign(run_id=runs["run_id"][twice] + "-again")
    laws, _ = laws_and_variants(pd.concat([runs, copies], ignore_index=True), config)
    assert np.allclose(variants["exponent"], laws.loc[variants.index, "exponent"], rtol=1e-6)


def test_without_duplicates_and_shapes_there_is_nothing_to_vary(runs, config):
    _, variants = laws_and_variants(runs.assign(**{MULTIPLICITY: 1}), config)
    assert variants.empty


def test_conventions_move_budgets_as_the_accounting_says(runs, config):
    shape = ModelShape(arch="transformer", vocab_size=1000, **SHAPE)
    steps = (runs["num_flops"] / training_flops(shape, 512, 1, 1)).round().astype(int)
    runs = runs.assign(vocab_size=1000, global_batch_size_sequences=1, num_train_steps=steps, **SHAPE)
    runs["num_flops"] = [training_flops(shape, 512, 1, count) for count in steps]
    laws, variants = laws_and_variants(runs, config)
    assert set(variants["variant"]) == {f"flops_{name}" for name in CONVENTIONS} - {"flops_paper"}
    # one shape: each convention is the paper's times a constant, and a constant moves no exponent
    for variant, rows in variants.groupby("variant"):
        assert np.allclose(rows["exponent"], laws.loc[rows.index, "exponent"], rtol=1e-9), variant
    assert 6 * count_params(shape) * 512 == training_flops(shape, 512, 1, 1, "6nd")
