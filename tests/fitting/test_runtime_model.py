"""The runtime model: planted constants come back, what cannot be known is said, held-out sizes are held out."""

import argparse
import itertools
import json

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.accounting import Work, count_params, make_shape
from xlstm_scaling.accounting.caches import memory_share
from xlstm_scaling.accounting.hardware import DEVICES
from xlstm_scaling.fitting import FitError
from xlstm_scaling.fitting.runtime_command import run_runtime
from xlstm_scaling.fitting.runtime_model import fit_runtime_models, predict_step_time_s, predict_ttft_s
from xlstm_scaling.fitting.runtime_prediction import _times
from xlstm_scaling.fitting.runtime_solver import TERMS, Design, elasticities, solve
from xlstm_scaling.fitting.runtime_tables import (
    COUNTS,
    MODEL_COLUMNS,
    PARAMETERS,
    PREDICTION_COLUMNS,
    PROBE_MARGIN,
    PROBED_CACHE_MARGIN,
    RATES,
    constants,
    costs_of,
    device_limits,
    noise,
    peak_rates,
    term_counts,
)
from xlstm_scaling.inference.counts import add_counts

STEPS = 9
SHAPES = ((256, 2, 2), (512, 9, 4), (1024, 4, 16), (1536, 16, 6), (2048, 24, 8), (3072, 6, 24))
#: where no constant need be precise; a fit a size is held out of costs as much as the whole
FEW = SHAPES[::2]
PLANTED = {
    ("xlstm", "ttft"): {
        "linear_flops_per_s": 3e13, "weight_bytes_per_s": 5e10, "state_bytes_per_s": 2e10, "parallel_streams": 40.0,
        "activation_bytes_per_s": 3e11, "overhead_s": 1e-3, "overhead_per_block_s": 3e-4,
    },
    ("transformer", "ttft"): {
        "linear_flops_per_s": 3e13, "weight_bytes_per_s": 5e10, "mixing_flops_per_s": 1e13, "scores_per_s": 5e10,
        "activation_bytes_per_s": 3e11, "overhead_per_block_s": 2e-4, "overhead_per_sequence_s": 4e-4,
    },
    ("xlstm", "step_time"): {
        "weight_bytes_per_s": 2e11, "state_bytes_per_s": 1e11, "overhead_s": 5e-4, "overhead_per_block_s": 1e-4,
        "overhead_per_batched_block_s": 5e-5, "overhead_per_sequence_s": 1e-5,
    },
    ("transformer", "step_time"): {
        "weight_bytes_per_s": 2e11, "scores_per_s": 3e9, "parallel_streams": 60.0, "activation_bytes_per_s": 2e10,
        "overhead_per_block_s": 1e-4,
    },
}  # fmt: skip
ARCHS = ("xlstm", "transformer")
CONSTANTS = list(PARAMETERS.values())


@pytest.fixture
def settings():
    return {"norm_p": 4.0, "huber_delta": 0.1, "min_measurements": 8, "num_resamples": 4, "confidence": 0.9, "seed": 0}


def row_of(arch, quantity, change=None, **other):
    """A row of ``runtime_model`` with planted constants."""
    given = PLANTED[arch, quantity] | (change or {})
    values = {PARAMETERS[term]: np.nan if term in RATES else 0.0 for term in TERMS}
    about = {"arch": arch, "quantity": quantity, "status": "ok", "norm_p": 4.0, "dtype": "float32"}
    return about | {"prefill_logits": "last"} | values | given | other


def planted(noise=0.0, seed=0, shapes=SHAPES, change=None, archs=("transformer",), device="cpu"):
    """Measurements that follow the model exactly, but for log-normal noise."""
    generator, rows = np.random.default_rng(seed), []
    for arch, (d, blocks, heads), batch, length in itertools.product(
        archs, shapes, (1, 2, 8, 64), (16, 128, 1024, 8192)
    ):
        shape = make_shape(arch, d, blocks, heads, 1024)
        row = shape.as_dict() | {"model": f"d{d}", "num_params": count_params(shape), "status": "ok", "device": device}
        row |= {"batch_size": batch, "prefill_length": length, "dtype": "float32", "num_threads": 2}
        first = predict_ttft_s(row_of(arch, "ttft", change), shape, batch, length)
        step = predict_step_time_s(row_of(arch, "step_time", change), shape, batch, length + (STEPS - 1) / 2)
        row["ttft_s"], row["step_time_s"] = (
            float(t) * np.exp(noise * generator.standard_normal()) for t in (first, step)
        )
        rows.append(row)
    return add_counts(pd.DataFrame(rows), STEPS)


def test_planted_constants_come_back(settings):
    models, predictions = fit_runtime_models(planted(archs=ARCHS), settings)
    assert list(models.columns) == list(MODEL_COLUMNS) and list(predictions.columns) == list(PREDICTION_COLUMNS)
    assert len(models) == len(PLANTED) and set(predictions["quantity"]) == {"ttft", "step_time"}
    for row in models.to_dict("records"):
        truth = PLANTED[row["arch"], row["quantity"]]
        assert row["status"] == "ok" and row["mape_fit"] < 1e-4 and row["mape_held_out"] < 1e-2, row
        for name in CONSTANTS:
            if name in truth:
                assert row[name] == pytest.approx(truth[name], rel=0.01), (row["arch"], row["quantity"], name)
            else:
                assert np.isnan(row[name]) or row[name] == 0, (row["arch"], row["quantity"], name)


def test_intervals_hold_the_planted_constants(settings):
    models, _ = fit_runtime_models(planted(noise=0.03), settings | {"num_resamples": 60, "confidence": 0.98})
    inside = []
    for row in models.to_dict("records"):
        for name, value in PLANTED[row["arch"], row["quantity"]].items():
            if np.isfinite(row[f"{name}_lo"]):
                assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"] or np.isnan(row[f"{name}_hi"])
                inside.append(row[f"{name}_lo"] <= value <= np.nan_to_num(row[f"{name}_hi"], nan=np.inf))
    assert len(inside) > 7 and np.mean(inside) >= 0.75


def test_an_outlier_hardly_moves_the_fit(settings):
    table = planted(noise=0.01)
    table.loc[7, "ttft_s"] *= 20
    models, _ = fit_runtime_models(table, settings)
    row = models[models["quantity"] == "ttft"].iloc[0]
    assert row["linear_flops_per_s"] == pytest.approx(3e13, rel=0.05)


def test_a_rate_that_never_binds_is_nan_and_said(settings):
    models, predictions = fit_runtime_models(planted(noise=0.01, change={"weight_bytes_per_s": 1e16}), settings)
    row = models[models["quantity"] == "ttft"].iloc[0]
    assert np.isnan(row["weight_bytes_per_s"]) and np.isnan(row["weight_bytes_per_s_hi"])
    assert "weight_bytes_per_s never binds" in row["detail"] and row["status"] == "ok"
    assert (predictions["predicted_s"] > 0).all()


def test_overheads_of_equally_deep_models_are_not_told_apart(settings):
    table = planted(shapes=((256, 4, 2), (512, 4, 4), (1024, 4, 16), (2048, 4, 8)))
    models, _ = fit_runtime_models(table, settings)
    for row in models.to_dict("records"):
        assert "overhead_s is not told apart from overhead_per_block_s" in row["detail"]
        assert row["overhead_s"] == 0
        truth = PLANTED["transformer", row["quantity"]]["overhead_per_block_s"]
        assert row["overhead_per_block_s"] == pytest.approx(truth, rel=0.1)


def test_no_rate_exceeds_the_data_sheet(settings):
    """The planted machine is an H100 with faster memory than any: rates stop at the peak, or are said to be hidden."""
    table = planted(noise=0.02, change={"weight_bytes_per_s": 6e12, "linear_flops_per_s": 3e15})
    models, _ = fit_runtime_models(table, settings | {"datasheet": "H100"})
    sheet = DEVICES["H100"]
    for name in CONSTANTS:
        peak = {"flops_per_s": sheet.flops_per_s("float32"), "bytes_per_s": sheet.bytes_per_s}
        limit = next((value for end, value in peak.items() if name.endswith(end)), np.inf)
        assert (models[name].dropna() <= limit * (1 + 1e-9)).all(), name
    assert models["detail"].str.contains("device.s peak").any()
    assert np.isfinite(peak_rates(device_limits("NVIDIA H100 80GB HBM3", "bfloat16"))).any()
    assert np.isinf(peak_rates(device_limits("AMD EPYC", "float32"))).all()


CACHE_BYTES = 3e7
CACHED_SHAPES = ((128, 2, 2), (256, 2, 2), (320, 4, 4), (512, 4, 4), (768, 6, 6), (1024, 8, 8))
#: with overheads that leave the cache to be seen
CACHED = {"cache_bytes": CACHE_BYTES, "linear_flops_per_s": 5e12, "overhead_s": 1e-5, "overhead_per_block_s": 1e-5,
          "overhead_per_batched_block_s": 0.0, "overhead_per_sequence_s": 0.0}  # fmt: skip


def probed(cache_bytes, **others):
    """The table ``device`` of a machine of its own, as far as the fit looks at it."""
    quantities = {"flops_per_s": 4e13, "bytes_per_s": 4e11, "cached_bytes_per_s": 2e12, "cache_bytes": cache_bytes}
    rows = [{"quantity": name, "value": value, "value_hi": value} for name, value in (quantities | others).items()]
    return pd.DataFrame(rows).assign(device="cpu", dtype="float32")


@pytest.mark.parametrize("arch", [pytest.param("xlstm", marks=pytest.mark.exhaustive), "transformer"])
def test_a_planted_cache_comes_back_and_extrapolates_to_models_that_lie_in_it(settings, arch):
    table = planted(noise=0.02, archs=(arch,), change=CACHED, shapes=CACHED_SHAPES)
    steps = []
    for device in (None, probed(1.5 * CACHE_BYTES)):
        models, predictions = fit_runtime_models(table, settings, device)
        steps.append(models[models["quantity"] == "step_time"].iloc[0])
        unseen = predictions[(predictions["quantity"] == "step_time") & predictions["held_out"]]
        smallest = unseen[unseen["num_params"] == table["num_params"].min()]
        steps[-1]["smallest"] = (smallest["predicted_s"] / smallest["measured_s"] - 1).abs().mean()
    without, found = steps
    assert without["cache_bytes"] == 0 and found["cache_bytes"] == pytest.approx(CACHE_BYTES, rel=0.2)
    assert found["mape_fit"] < 0.03 < 0.08 < without["mape_fit"]
    assert found["mape_held_out"] < 0.03 and found["smallest"] < 0.05 < 0.2 < without["smallest"]


def test_the_cache_is_bound_by_what_the_probe_saw(settings):
    table = planted(noise=0.02, change=CACHED, shapes=CACHED_SHAPES)
    models, _ = fit_runtime_models(table, settings, probed(CACHE_BYTES / 6))
    assert (models["cache_bytes"] > 0).any()
    assert (models["cache_bytes"] <= CACHE_BYTES / 6 * PROBED_CACHE_MARGIN * (1 + 1e-9)).all()
    no_cache = probed(CACHE_BYTES)[lambda rows: rows["quantity"] != "cache_bytes"]
    models, _ = fit_runtime_models(table, settings, no_cache)
    assert (models["cache_bytes"] == 0).all()


def test_limits_are_those_of_the_data_sheet_else_of_the_probe():
    sheet, table = DEVICES["H100"], probed(1e7, bytes_per_s=1.0)
    limits = device_limits("NVIDIA H100 80GB HBM3", "bfloat16", table)
    assert limits["flops_per_s"][1] == sheet.bf16_flops_per_s and limits["cache_bytes"][1] == sheet.cache_bytes
    assert device_limits("cpu", "float32") == {} and device_limits("cpu", "bfloat16", table) == {}
    limits = device_limits("cpu", "float32", pd.concat([table, table.assign(device="another", value_hi=1e30)]))
    assert set(limits) == {"flops_per_s", "bytes_per_s", "cache_bytes"}
    assert limits["flops_per_s"] == (0.0, PROBE_MARGIN * 4e13) and limits["bytes_per_s"] == (0.0, PROBE_MARGIN)
    assert limits["cache_bytes"] == (1e7 / PROBED_CACHE_MARGIN, 1e7 * PROBED_CACHE_MARGIN)
    peaks = dict(zip(TERMS, peak_rates(limits)))
    assert peaks["linear_flops"] == PROBE_MARGIN * 4e13 and peaks["weight_bytes"] == PROBE_MARGIN
    assert np.isinf(peaks["block"]) and np.isinf(peaks["cache"])


def test_a_table_of_constants_from_before_the_cache_predicts_as_without_one():
    shape, row = make_shape("transformer", 512, 4, 4, 1024), row_of("transformer", "step_time")
    assert row["cache_bytes"] == 0
    old = {name: value for name, value in row.items() if name != "cache_bytes"}
    assert float(predict_step_time_s(old, shape, 2, 100)) == float(predict_step_time_s(row, shape, 2, 100))


def test_the_share_of_memory_falls_from_all_to_none_around_the_cache():
    held = np.geomspace(1e-3, 1e6, 100)
    share = memory_share(held)
    assert (np.diff(share) <= 0).all() and share[0] == pytest.approx(1) and 0 < share[-1] < 1e-6
    assert memory_share(1.0) == 0.5 and memory_share(0.0) == 1.0


def test_constants_are_never_negative(settings):
    generator = np.random.default_rng(4)
    table = planted(shapes=FEW)
    for quantity in ("ttft", "step_time"):
        table[f"{quantity}_s"] = generator.lognormal(-6, 1.5, len(table))  # nothing to find
    models, _ = fit_runtime_models(table, settings)
    values = models[[f"{name}{end}" for name in CONSTANTS for end in ("", "_lo", "_hi")]].to_numpy()
    assert (values[np.isfinite(values)] >= 0).all()
    rates = models[[PARAMETERS[term] for term in RATES]].to_numpy()
    assert (rates[np.isfinite(rates)] > 0).all()


def test_held_out_predictions_do_not_see_their_size(settings):
    table = planted(noise=0.02, shapes=FEW)
    largest = table["num_params"] == table["num_params"].max()
    _, before = fit_runtime_models(table, settings)
    table.loc[largest, ["ttft_s", "step_time_s"]] *= 3
    models, after = fit_runtime_models(table, settings)

    def unseen(predictions):
        return predictions[predictions["held_out"] & (predictions["num_params"] == table["num_params"].max())]

    assert len(unseen(after)) == 2 * largest.sum()
    assert np.allclose(unseen(before)["predicted_s"], unseen(after)["predicted_s"], rtol=1e-6)
    for row in models.itertuples():
        for held_out, mape in ((False, row.mape_fit), (True, row.mape_held_out)):
            part = after[(after["quantity"] == row.quantity) & (after["held_out"] == held_out)]
            assert np.mean(np.abs(part["predicted_s"] / part["measured_s"] - 1)) == pytest.approx(mape)


@pytest.mark.parametrize("arch", ARCHS)
def test_predictions_follow_from_the_table_of_constants(settings, arch):
    table = planted(noise=0.03, archs=(arch,), shapes=FEW)
    models, predictions = fit_runtime_models(table, settings)
    for row in models.to_dict("records"):
        part = predictions[(predictions["quantity"] == row["quantity"]) & ~predictions["held_out"]]
        for cell in part.itertuples():
            d, blocks, heads = next(shape for shape in SHAPES if f"d{shape[0]}" == cell.model)
            shape = make_shape(arch, d, blocks, heads, 1024)
            if row["quantity"] == "ttft":
                again = predict_ttft_s(row, shape, cell.batch_size, cell.prefill_length)
            else:
                again = predict_step_time_s(row, shape, cell.batch_size, cell.prefill_length + (STEPS - 1) / 2)
            assert float(again) == pytest.approx(cell.predicted_s, rel=1e-9)


@pytest.mark.parametrize(("arch", "quantity"), list(PLANTED))
def test_times_grow_with_batch_and_length(arch, quantity):
    """Every pair of neighbours on a grid, with all terms in play."""
    everything = {"linear_flops_per_s": 3e13, "mixing_flops_per_s": 1e13, "state_bytes_per_s": 1e11}
    everything |= {"scores_per_s": 1e10, "parallel_streams": 300.0, "overhead_s": 1e-4, "overhead_per_sequence_s": 1e-6}
    everything["cache_bytes"] = 1e8
    row, shape = row_of(arch, quantity, everything), make_shape(arch, 512, 4, 4, 1024)
    batch, length = np.meshgrid([1, 2, 3, 7, 50, 400, 3000], [1, 2, 63, 64, 65, 1000, 20000, 500000], indexing="ij")
    predict = predict_ttft_s if quantity == "ttft" else predict_step_time_s
    times = predict(row, shape, batch, length)
    assert times.shape == batch.shape and (times > 0).all()
    assert (np.diff(times, axis=0) > 0).all()
    growth = np.diff(times, axis=1)
    assert (growth >= 0).all()
    if quantity == "step_time":
        assert np.allclose(growth, 0) == (arch == "xlstm")  # its state does not grow


def test_one_prediction_by_hand():
    counts = {"linear_flops": 8.0, "weight_bytes": 6.0, "mixing_flops": 10.0, "scores": 4.0, "state_bytes": 2.0,
              "activation_bytes": 3.0, "streams": 5.0}  # fmt: skip
    work, shape = Work(**counts), make_shape("transformer", 64, 3, 2, 100)
    row = row_of("transformer", "ttft", {
        "linear_flops_per_s": 2.0, "weight_bytes_per_s": 3.0, "mixing_flops_per_s": 5.0, "scores_per_s": 8.0,
        "state_bytes_per_s": 4.0, "parallel_streams": 10.0, "activation_bytes_per_s": 6.0, "overhead_s": 100.0,
        "overhead_per_block_s": 10.0, "overhead_per_batched_block_s": 1.0, "overhead_per_sequence_s": 1000.0,
        "cache_bytes": 4.0,
    }, norm_p=2.0)  # fmt: skip
    missed = 64 / 65  # 1 / (1 + (4 / 8)^6)
    expected = np.hypot(4, 2 * missed) + (2 + 0.5 + 0.5 * missed) * np.hypot(1, 2) + 0.5 + 100 + 3 * (10 + 1) + 1000 * 7
    assert float(_times(row, work, shape, np.float64(7))) == pytest.approx(expected, rel=1e-12)
    assert float(_times(row, work, shape, np.float64(1))) == pytest.approx(expected - 3 - 6000, rel=1e-12)


def test_logits_of_every_token_cost_time():
    shape = make_shape("xlstm", 512, 4, 4, 50304)
    row = row_of("xlstm", "ttft", {"weight_bytes_per_s": np.nan})  # so that products are not in a smooth maximum
    last, every = (float(predict_ttft_s(row, shape, 2, 4096, logits=which)) for which in ("last", "all"))
    flops, moved = 2 * 4095 * 2 * 512 * 50304, 2 * 4095 * (4 * (512 + 50304) + 50304 * 16)
    assert every - last == pytest.approx(flops / 3e13 + moved / 3e11, rel=1e-9)
    assert every == float(predict_ttft_s(row | {"prefill_logits": "all"}, shape, 2, 4096))


@pytest.mark.parametrize(
    ("change", "batch"),
    [({"arch": "xlstm"}, 1), ({"quantity": "step_time"}, 1), ({"status": "too_few_measurements"}, 1), ({}, 0)],
)
def test_a_prediction_from_the_wrong_row_is_refused(change, batch):
    with pytest.raises(ValueError, match=r"row of runtime_model|at least 1"):
        predict_ttft_s(row_of("transformer", "ttft") | change, make_shape("transformer", 64, 3, 2, 100), batch, 10)


def test_constants_and_costs_are_inverse():
    costs = np.random.default_rng(0).lognormal(0, 3, len(TERMS))
    costs[[2, 5]] = 0.0
    assert np.allclose(costs_of(constants(costs)), costs, rtol=1e-14)


def test_rows_and_units_of_order_do_not_matter(settings):
    table = planted(noise=0.05, shapes=FEW)
    models, predictions = fit_runtime_models(table, settings)
    shuffled = fit_runtime_models(table.sample(frac=1, random_state=1), settings)
    pd.testing.assert_frame_equal(models, shuffled[0])
    pd.testing.assert_frame_equal(predictions, shuffled[1])
    slow = table.assign(
        **{f"{q}_s": 1000 * table[f"{q}_s"] for q in ("ttft", "step_time")}
    )  # a machine 1000 times slower
    scaled = fit_runtime_models(slow, settings)[0]
    assert np.allclose(scaled["weight_bytes_per_s"] * 1000, models["weight_bytes_per_s"], rtol=1e-3)
    assert np.allclose(scaled["mape_fit"], models["mape_fit"], rtol=1e-4)


def test_gradient_is_that_of_finite_differences():
    table = planted(noise=0.1)
    terms = term_counts({name: table[f"ttft_{name}"] for name in COUNTS}, table["num_blocks"], table["batch_size"])
    design = Design.of(terms, table["ttft_s"].to_numpy(), norm_p=3.0)
    theta = np.random.default_rng(0).normal(-1, 1, len(TERMS))
    for k in range(len(TERMS)):
        ends = []
        for shift in (1e-5, -1e-5):
            moved = theta + shift * np.eye(len(TERMS))[k]
            ends.append(np.log(design.predict_costs(design.costs(moved))))
        assert np.allclose((ends[0] - ends[1]) / 2e-5, elasticities(design, theta)[:, k], atol=1e-8)
    found = solve(design, np.ones(len(TERMS), bool), 0.1)
    shares = np.delete(elasticities(design, found.theta), [TERMS.index(name) for name in ("wait", "cache")], axis=1)
    assert np.allclose(shares.sum(1), 1)  # these two only stretch and shorten others


def test_the_second_version_of_times_is_fitted_apart(settings):
    table = planted(noise=0.02, shapes=FEW)
    slower = np.where(table["prefill_length"] > 1000, 3.0, 1.0)
    models, _ = fit_runtime_models(table.assign(ttft_raw_s=table["ttft_s"] * slower), settings)
    assert models["quantity"].tolist() == ["ttft", "ttft_raw", "step_time"]
    plain = fit_runtime_models(table, settings)[0]
    pd.testing.assert_frame_equal(
        models[models["quantity"] != "ttft_raw"].reset_index(drop=True), plain.reset_index(drop=True)
    )
    assert len(fit_runtime_models(table.assign(ttft_raw_s=table["ttft_s"]), settings)[0]) == 2  # the same times


def test_noise_of_medians_is_that_of_their_spread():
    """Medians of n normal repeats miss the truth by what their quartiles say."""
    generator = np.random.default_rng(1)
    samples = 1 + 0.05 * generator.standard_normal((4000, 25))
    lo, median, hi = np.quantile(samples, [0.25, 0.5, 0.75], axis=1)
    rows = pd.DataFrame({"ttft_s": median, "ttft_s_lo": lo, "ttft_s_hi": hi, "repeats": 25})
    assert noise(rows, "ttft") == pytest.approx(np.abs(median - 1).mean(), rel=0.1)
    assert np.isnan(noise(rows, "step_time")) and np.isnan(noise(rows.drop(columns="repeats"), "ttft"))


def test_unusable_rows_are_left_out_and_too_few_refuse(settings):
    table = planted(shapes=FEW)
    table.loc[::2, ["status", "ttft_s", "step_time_s"]] = ["skipped", np.nan, np.nan]
    models, _ = fit_runtime_models(table, settings)
    assert (models["num_measurements"] == len(table) // 2).all()
    models, predictions = fit_runtime_models(table.iloc[:10], settings)
    assert (models["status"] == "too_few_measurements").all() and models[CONSTANTS].isna().all(axis=None)
    assert predictions.empty and list(predictions.columns) == list(PREDICTION_COLUMNS)


def test_nothing_to_fit_is_an_error_that_says_why(settings):
    table = planted()
    skipped = table.assign(status="skipped", ttft_s=np.nan, step_time_s=np.nan)
    cases = [
        (skipped, settings, "96 skipped"),
        (table.assign(ttft_s=np.nan, step_time_s=np.nan), settings, "no finite positive time"),
        (table.iloc[:0], settings, "empty"),
        (table.drop(columns="ttft_scores"), settings, "ttft_scores"),
        (pd.concat([table, table.assign(dtype="bfloat16")]), settings, "mix settings"),
        (table, settings | {"norm_p": 0.5}, "norm_p"),
    ]
    for measurements, config, message in cases:
        with pytest.raises(FitError, match=message):
            fit_runtime_models(measurements, config)


def test_the_command_prints_constants_and_errors_by_size(settings, tmp_path, capsys):
    models, predictions = fit_runtime_models(planted(noise=0.02, shapes=FEW), settings)
    with pytest.raises(FileNotFoundError, match="run the stage"):
        run_runtime(argparse.Namespace(study=tmp_path, json=False))
    (tmp_path / "inference").mkdir()
    models.to_parquet(tmp_path / "inference" / "runtime_model.parquet")
    predictions.to_parquet(tmp_path / "inference" / "runtime_predictions.parquet")
    assert run_runtime(argparse.Namespace(study=tmp_path, json=False)) == 0
    text = capsys.readouterr().out
    row = models[models["quantity"] == "step_time"].iloc[0]
    assert f"{row['scores_per_s']:.3g}" in text and f"on sizes held out {row['mape_held_out']:.1%}" in text
    assert run_runtime(argparse.Namespace(study=tmp_path / "inference", json=True)) == 0
    errors = pd.DataFrame(json.loads(capsys.readouterr().out)["errors"])
    assert len(errors) == 2 * len(FEW) and errors["num_measurements"].sum() == models["num_measurements"].sum()
    for quantity, part in errors.groupby("quantity"):
        whole = models[models["quantity"] == quantity].iloc[0]
        mean = np.average(part["mape_held_out"], weights=part["num_measurements"])
        assert mean == pytest.approx(whole["mape_held_out"], rel=1e-9)
