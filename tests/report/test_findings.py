"""The findings say what the tables say, and claim nothing where an interval does not."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.report.findings import findings, write_findings
from xlstm_scaling.report.optimal import optimal_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))
from figure_tables import make_runs

LAW = {
    "context_length": 512.0, "variable": "num_params", "predictor": "flops", "num_points": 3, "status": "ok",
}  # fmt: skip


def tables(ratio=(1.5, 1.2, 1.9), difference=(0.05, -0.1, 0.2), num_runs=6):
    laws = pd.DataFrame(
        [
            {**LAW, "arch": "xlstm", "exponent": 0.5, "exponent_lo": 0.4, "exponent_hi": 0.6},
            {**LAW, "arch": "xlstm - transformer"} | dict(zip(("exponent", "exponent_lo", "exponent_hi"), difference)),
        ]
    )
    ratios = pd.DataFrame(
        [
            {"arch": "xlstm", "other": "transformer", "context_length": 512, "val_loss": 3.5}
            | dict(zip(("flop_ratio", "flop_ratio_lo", "flop_ratio_hi"), ratio))
        ]
    )
    surface = pd.DataFrame({"arch": ["xlstm"] * 2, "status": ["converged", "bound_hit"], "exponent_params": [0.4, 9.0]})
    slopes = pd.DataFrame(
        {"arch": ["xlstm"] * 2, "status": "ok", "num_runs": num_runs, "slope": [-0.05, -0.07],
         "slope_lo": [-0.06, -0.08], "slope_hi": [-0.055, -0.065]}
    )  # fmt: skip
    measurements = pd.DataFrame(
        {"arch": "xlstm", "status": "ok", "batch_size": 1, "num_params": 1000, "prefill_length": [128, 4096],
         "step_time_s": [0.001, 0.0012]}
    )  # fmt: skip
    models = pd.DataFrame([{"arch": "xlstm", "quantity": "ttft", "mape_held_out": 0.12}])
    isoflop = pd.DataFrame({"status": ["ok", "ok", "no_minimum"]})
    forecasts = pd.DataFrame(
        {"arch": "xlstm", "context_length": 512, "law": ["power_law", "power_law", "surface_gamma_free"],
         "quantity": ["num_params", "num_params", "val_loss"], "flops_mean": [1e12, 3e12, 3e12],
         "num_held_out": [1, 1, 9], "error": [0.01, -0.2, 0.02], "coverage": [1.0, 0.0, 0.6]}
    )  # fmt: skip
    return {
        "fits/forecasts": forecasts,
        "runs": make_runs().assign(epochs=0.5), "fits/power_laws": laws, "fits/pareto_ratio": ratios,
        "fits/surface": surface, "fits/overtraining": slopes, "fits/isoflop": isoflop,
        "inference/measurements": measurements, "inference/runtime_model": models,
    }  # fmt: skip


def statements(**changes):
    return "\n".join(findings(tables(**changes)).statement)


def test_each_finding_carries_its_number_and_its_table():
    table = findings(tables())
    text = "\n".join(table.statement)
    assert "needs 1.50 (1.20 to 1.90) times the FLOPs of xLSTM: xLSTM buys the same loss for fewer FLOPs" in text
    assert "N* goes as H to the power 0.50 (0.40 to 0.60) at context 512, from 3 minima" in text
    assert "2 of 3 IsoFLOP parabolas" in text
    assert "smaller ones gives in 1 of 2 cases; at 3.0e+12 FLOPs (xLSTM, context 512) it is missed by -20.0%" in text
    assert "by 2.0% in the mean; 60% of 9 runs lie in its intervals" in text
    assert "1.20 times that after 128 (1.00 ms)" in text
    assert "by 12%" in text
    assert "goes from 0.40 to 0.40" in text  # the fit at its bound does not count
    assert "the lines are not parallel" in text
    assert "orders of magnitude less than the smallest budget of the paper" in text
    assert table.source.str.len().gt(0).all()


def test_lost_runs_are_counted_and_named():
    runs = tables()["runs"]
    lost = runs.run_id[runs.status == "diverged"]
    assert f"{len(lost)} runs diverged or failed and are left out of every fit: {', '.join(lost)}." in statements()
    fine = findings(tables() | {"runs": runs.assign(status="ok")})
    assert "No run diverged or failed." in list(fine.statement)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [((1.5, 0.9, 1.9), "no difference is shown"), ((0.5, 0.4, 0.8), "Transformer buys the same loss")],
)
def test_the_other_outcomes_are_said_as_plainly(ratio, verdict):
    assert verdict in statements(ratio=ratio)


def test_few_runs_a_ratio_give_no_verdict_on_slopes():
    assert "3 runs a ratio are too few to say" in statements(num_runs=3)


def test_a_difference_is_claimed_only_outside_its_interval():
    assert "this study does not tell them apart" in statements()
    assert "the architectures differ" in statements(difference=(0.3, 0.1, 0.5))
    assert "this study does not tell them apart" in statements(difference=(0.3, float("nan"), float("nan")))


def test_without_inference_the_rest_is_said():
    given = {name: table for name, table in tables().items() if not name.startswith("inference/")}
    text = "\n".join(findings(given, inference=False).statement)
    assert "no inference measurements" in text
    assert "the FLOPs of xLSTM" in text


def test_the_loss_beyond_the_context_is_said_with_its_verdict():
    from figure_tables import make_length

    length = make_length()
    text = "\n".join(findings(tables() | {"evaluation/length": length}).statement)
    assert "trained at context 256: after 4 to 8 times as many tokens its loss, minus that of the same" in text
    assert "is +1.200 (+1.195 to +1.205) nat/token; it loses by reading on" in text
    assert "is -0.030 (-0.035 to -0.025) nat/token; it gains by reading on" in text
    assert "Within the context it draws on about 128 tokens" in text
    small = length.assign(excess=length.excess / 1000, excess_lo=-0.1)
    assert "neither loses nor gains" in "\n".join(findings(tables() | {"evaluation/length": small}).statement)
    assert "is not evaluated" in "\n".join(findings(tables() | {"evaluation/length": length.iloc[:0]}).statement)


def test_published_runs_name_their_files_and_what_is_missing():
    provenance = {
        "sources": [{"name": "a.pkl", "kind": "log"}, {"name": "runs.csv", "kind": "table"}],
        **{"num_runs": 12, "num_selected": 10, "num_written": 10, "missing": ["b.pkl"], "conflicts": []},
    }
    text = "\n".join(findings(tables(), provenance=provenance).statement)
    assert "read from 1 run logs and runs.csv: 12 runs, of which 10 pass" in text
    assert "Not at hand, so their runs are absent: b.pkl." in text


def test_optima_invert_the_power_laws():
    """N* = H^0.5, D* = H^0.5 / 6 and no noise: a size N is best for H = N^2."""
    cells = [
        {"arch": "xlstm", "context_length": 512, "isoflop_tag": flops, "flops_mean": flops, "variable": variable,
         "status": "ok", "loss_opt": 3.0, "x_opt": flops**0.5 / (1 if variable == "num_params" else 6)}
        for flops in (1e16, 1e18, 1e20) for variable in ("num_params", "num_tokens")
    ]  # fmt: skip
    isoflop = pd.DataFrame(cells)
    resamples = pd.concat([isoflop.assign(resample=place) for place in range(20)])
    settings = {"seed": 0, "confidence": 0.95, "power_law": {"flops_range": [None, None], "min_points": 2}}
    table = optimal_table(isoflop, resamples, settings).set_index("num_params")
    assert table.num_flops[1e9] == pytest.approx(1e18)
    assert table.num_tokens_lo[1e9] == table.num_tokens_hi[1e9] == pytest.approx(1e9 / 6)
    assert table.beyond_budgets[1.75e11] == pytest.approx(1.75e11**2 / 1e20)
    assert optimal_table(
        isoflop.head(4), resamples, settings | {"power_law": settings["power_law"] | {"min_points": 3}}
    ).empty


def test_pages(tmp_path):
    write_findings(findings(tables()), tmp_path / "findings", "A & B", 0.9)
    page = (tmp_path / "findings.html").read_text()
    assert "A &amp; B" in page
    assert "90% bootstrap" in page
    assert "http" not in page  # needs no network
    assert (tmp_path / "findings.md").read_text().startswith("# A & B")
    assert len(pd.read_csv(tmp_path / "findings.csv")) == len(pd.read_parquet(tmp_path / "findings.parquet"))


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("jump", "smooth", "supports the second version"),
        ("smooth", "jump", "supports the first version"),
        ("smooth", "smooth", "does not tell the versions apart"),
    ],
)
def test_the_version_of_times_that_grows_as_attention_does_is_the_one_that_physics_supports(first, second, verdict):
    """Times a T + b T² grow by more and more when T doubles; a jump at one length makes them grow by less after it."""
    length = np.array([1024, 2048, 4096, 8192, 16384])
    times = {"smooth": 1e-3 * length + 1e-7 * length**2.0, "jump": 1e-3 * length * np.where(length > 1024, 2, 1)}
    measured = pd.DataFrame(
        {"arch": "transformer", "model": "m", "status": "ok", "batch_size": 1, "num_params": 1000, "step_time_s": 1e-3,
         "prefill_length": length, "ttft_s": times[first], "ttft_raw_s": times[second]}
    )  # fmt: skip
    models = pd.DataFrame({"arch": "transformer", "quantity": ["ttft", "ttft_raw"], "mape_held_out": [0.12, 0.05]})
    text = "\n".join(
        findings(tables() | {"inference/measurements": measured, "inference/runtime_model": models}).statement
    )
    assert verdict in text and "in the second version of its times, of a size it has not seen by 5%" in text
