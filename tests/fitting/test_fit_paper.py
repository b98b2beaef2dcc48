"""The paper's printed numbers from its published runs (skipped where the runs are not at hand)."""

import numpy as np
import pytest

from xlstm_scaling.fitting.isoflop import fit_isoflop
from xlstm_scaling.fitting.overtraining import fit_overtraining
from xlstm_scaling.fitting.power_law import fit_power_laws
from xlstm_scaling.fitting.tables import usable_runs

ARCH = {"mlstm_v1": "xlstm", "llama": "transformer"}
# 120 xlstm losses at 2,048 and 8,192 were read back from figures to about 1e-3 nat; the printed fits count some twice.
OPTIMUM_RTOL, LOSS_ATOL = 2e-3, 5e-4


@pytest.fixture
def as_printed(config, paper_runs):
    config["num_resamples"] = 50
    config["isoflop"]["weight_column"] = "notebook_multiplicity"
    runs = usable_runs(paper_runs)
    return runs, config, fit_isoflop(runs, config)


@pytest.mark.parametrize("which", ["isoflop_polynomials_num_params", "isoflop_polynomials_num_tokens_3e19"])
def test_isoflop_minima(as_printed, paper_numbers, which):
    variable = "num_params" if which.endswith("params") else "num_tokens"
    table = as_printed[2][0].query("variable == @variable")
    table = table.set_index(["arch", "context_length", "isoflop_tag"])
    rows = paper_numbers[which]["rows"]
    for row in rows:
        found = table.loc[(ARCH[row["model_type"]], row["context_length"], row["isoflop_tag"])]
        assert found["flops_mean"] == pytest.approx(row["flops_mean"], rel=1e-6)
        assert found["x_opt"] == pytest.approx(row["x_opt"], rel=OPTIMUM_RTOL)
        assert found["loss_opt"] == pytest.approx(row["y_opt"], abs=LOSS_ATOL)
        assert found["a"] == pytest.approx(row["a"], rel=1e-2)
    assert len(rows) == (21 if variable == "num_params" else 6)


@pytest.mark.parametrize(
    ("plot", "flops_range"),
    [("get_isoflop_powerlaw_ctx_plot", [5e18, 5e19]), ("get_isoflop_powerlaw_plot", [5e18, 2e20])],
)
def test_isoflop_power_laws(as_printed, paper_numbers, plot, flops_range):
    runs, config, isoflop = as_printed
    config["power_law"]["flops_range"] = flops_range
    laws = fit_power_laws(*isoflop, config, runs)[0].query("predictor == 'flops'")
    laws = laws.set_index(["arch", "context_length", "variable"])
    for row in paper_numbers["isoflop_power_laws"]["rows"]:
        if row["source_plot"] != plot:
            continue
        variable = {"num_params": "num_params", "num_tokens_training": "num_tokens"}[row["plot_type"]]
        found = laws.loc[(ARCH[row["model_type"]], float(row["context_length"]), variable)]
        assert found["num_points"] == row["num_points_fit"]
        assert found["exponent"] == pytest.approx(row["alpha"], abs=2e-3)
        assert found["exponent_lo"] <= row["alpha"] + 2e-3
        assert found["exponent_hi"] >= row["alpha"] - 2e-3


def test_context_power_laws(as_printed, paper_numbers):
    """The exponents are read off a legend, to three decimals."""
    runs, config, isoflop = as_printed
    laws = fit_power_laws(*isoflop, config, runs)[0].query("predictor == 'context_length'")
    laws = laws.set_index(["arch", "variable", "isoflop_tag"])
    for letter, variable in (("N", "num_params"), ("D", "num_tokens")):
        for arch, budgets in paper_numbers["context_power_laws"][letter].items():
            for tag, (exponent, _) in budgets.items():
                key = (arch.replace("llama", "transformer"), variable, f"{float(tag):.0e}")
                assert laws.loc[key, "exponent"] == pytest.approx(exponent, abs=2e-3)


def test_overtraining_slopes(config, paper_runs, paper_numbers):
    """The Transformer at 44 is off by 2.8e-4 (the print leaves a run out that the table has); all others by 5e-7."""
    table = fit_overtraining(usable_runs(paper_runs), config | {"overtraining": {"min_runs": 2}})
    table = table.set_index(["arch", "ratio_tag"])
    errors = []
    for row in paper_numbers["overtraining_slopes"]["final_table"]["rows"]:
        for arch, column in (("transformer", "Transformer"), ("xlstm", "xLSTM")):
            errors.append(-table.loc[(arch, float(row["index"])), "slope"] - row[column])
    errors = np.abs(errors)
    assert errors.max() < 5e-4
    assert (errors < 1e-6).sum() >= len(errors) - 1
