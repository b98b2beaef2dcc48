"""The runtime model of the authors' measurements on one H100: one model for each architecture across all sizes."""

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.accounting import shape_of_row
from xlstm_scaling.accounting.hardware import DEVICES
from xlstm_scaling.fitting.runtime_model import fit_runtime_models, predict_step_time_s, predict_ttft_s
from xlstm_scaling.fitting.runtime_tables import PARAMETERS, RATES
from xlstm_scaling.fitting.runtime_versions import doubling_growth, is_steady
from xlstm_scaling.inference.counts import add_counts
from xlstm_scaling.study.published import measurements_table

#: mean absolute relative errors that the fit has to reach, and those of sizes that it has not seen
LIMITS = {
    ("xlstm", "ttft"): (0.04, 0.05),
    ("xlstm", "step_time"): (0.06, 0.07),
    ("transformer", "ttft"): (0.08, 0.11),
    ("transformer", "ttft_raw"): (0.05, 0.06),
    ("transformer", "step_time"): (0.12, 0.10),
}
SETTINGS = {"norm_p": 4.0, "huber_delta": 0.1, "min_measurements": 8, "num_resamples": 4, "confidence": 0.95, "seed": 0}


@pytest.fixture(scope="module")
def measurements(paper):
    table = measurements_table(
        pd.read_csv(paper / "inference.csv"), {"device": "the authors' H100", "dtype": "bfloat16"}
    )
    return add_counts(table, generate_steps=100, logits={"xlstm": "all"})


@pytest.fixture(scope="module")
def fits(measurements):
    return fit_runtime_models(measurements, SETTINGS)


def test_errors_are_within_the_limits_on_every_usable_measurement(measurements, fits):
    models = fits[0].set_index(["arch", "quantity"])
    assert set(models.index) == set(LIMITS) and (models["status"] == "ok").all()
    for key, (fitted, held_out) in LIMITS.items():
        assert models.loc[key, "mape_fit"] <= fitted, key
        assert models.loc[key, "mape_held_out"] <= held_out, key
    for (arch, quantity), count in models["num_measurements"].items():
        times = measurements[measurements["arch"] == arch][f"{quantity}_s"]
        assert count == (times > 0).sum()  # every step time, and every time to first token of a prompt


def test_constants_are_positive_and_below_the_data_sheet(fits):
    sheet, models = DEVICES["H100"], fits[0]
    for term, name in PARAMETERS.items():
        values = models[name].dropna()
        assert (values > 0).all() if term in RATES else (values >= 0).all(), name
        for end, peak in (("_flops_per_s", sheet.bf16_flops_per_s), ("_bytes_per_s", sheet.bytes_per_s)):
            if name.endswith(end):
                assert (values <= peak * (1 + 1e-9)).all(), name
    prefill = models[models["quantity"] != "step_time"]
    assert (prefill["linear_flops_per_s"] > 0.3 * sheet.bf16_flops_per_s).all()
    step = models[models["quantity"] == "step_time"]
    assert (step["weight_bytes_per_s"] > 0.5 * sheet.bytes_per_s).all()


def test_parallel_streams_are_those_of_the_chip(fits):
    """Generation needs a head a multiprocessor, of which an H100 has 132, to read its cache at full speed."""
    models = fits[0].set_index(["arch", "quantity"])
    assert models.loc[("transformer", "step_time"), "parallel_streams"] == pytest.approx(132, rel=0.1)


def test_physics_supports_the_second_version_of_the_times(measurements, fits):
    mine = measurements[measurements["arch"] == "transformer"]
    assert is_steady(doubling_growth(mine, "ttft_flops"))
    assert is_steady(doubling_growth(mine, "ttft_raw_s"))
    assert not is_steady(doubling_growth(mine, "ttft_s"))
    models = fits[0].set_index(["arch", "quantity"])
    for error in ("mape_fit", "mape_held_out"):
        assert models.loc[("transformer", "ttft_raw"), error] < 0.6 * models.loc[("transformer", "ttft"), error]


def test_predictions_of_the_functions_are_those_of_the_table(measurements, fits):
    models, predictions = fits
    fitted = predictions[~predictions["held_out"]]
    for (arch, quantity), part in fitted.groupby(["arch", "quantity"]):
        row = models[(models["arch"] == arch) & (models["quantity"] == quantity)].iloc[0]
        largest = part[part["num_params"] == part["num_params"].max()].sort_values(["batch_size", "prefill_length"])
        shape = shape_of_row(measurements[measurements["model"] == largest["model"].iloc[0]].iloc[0])
        batch, length = (largest[name].to_numpy() for name in ("batch_size", "prefill_length"))
        if quantity == "step_time":
            times = predict_step_time_s(row, shape, batch, length + 49.5)
        else:
            times = predict_ttft_s(row, shape, batch, length)
        assert np.allclose(times, largest["predicted_s"], rtol=1e-9)
