"""Arithmetic intensity and its crossing of the ridge, against closed forms."""

import math

import numpy as np
import pytest

from xlstm_scaling.accounting import count_params, make_shape, step_bytes, step_flops, weight_bytes
from xlstm_scaling.accounting.hardware import DEVICES
from xlstm_scaling.inference.counts import add_counts
from xlstm_scaling.inference.probe import held_by_cache, peaks, probe_device, published_device
from xlstm_scaling.inference.records import finish_table
from xlstm_scaling.inference.roofline import MOST_SEQUENCES, crossing, roofline_tables

SHAPES = {
    "xlstm": make_shape("xlstm", 4096, 32, 8, 50304, 64),
    "transformer": make_shape("transformer", 4096, 32, 32, 50304),
}
SETTINGS = {"device": "theirs", "dtype": "bfloat16", "datasheet": "H100"}
RIDGE = DEVICES["H100"].bf16_flops_per_s / DEVICES["H100"].bytes_per_s


@pytest.mark.parametrize(
    ("a", "b", "c", "d"), [(0.0, 2.0, 500.0, 1e-3), (3.0, 7.0, 4096.0, 0.01), (0.0, 1.0, 37.0, 0.0)]
)
def test_a_linear_fractional_intensity_crosses_where_algebra_says(a, b, c, d):
    """(a + b x) / (c + d x) = r at x = (r c - a) / (b - r d), and never where r reaches b / d."""
    for ridge in (0.5, 2.0, 20.0):
        exact = (ridge * c - a) / (b - ridge * d)
        place, status = crossing(lambda x: (a + b * x) / (c + d * x), ridge, 1, 2**30)
        if exact <= 1:
            assert (place, status) == (None, "above")
        else:
            assert status == "rises" and place == math.ceil(exact)
    if d:
        assert crossing(lambda x: (a + b * x) / (c + d * x), 1.01 * b / d, 1, 2**30) == (None, "below")


def test_an_intensity_that_falls_is_found_too():
    place, status = crossing(lambda x: 1000.0 / x, 30.0, 1, 2**20)
    assert (place, status) == (34, "falls")  # 1000 / 33 is above 30


@pytest.fixture(scope="module")
def tables():
    rows = []
    for arch, shape in SHAPES.items():
        for batch in (1, 64):
            for length in (512, 16384):
                row = {"arch": arch, "model": f"{arch}-7b", "num_params": count_params(shape), "trained": False}
                row |= {name: value for name, value in shape.as_dict().items() if name != "arch"}
                row |= {"batch_size": batch, "prefill_length": length, "ttft_s": 0.5, "step_time_s": 0.01}
                row |= {"repeats": 1, "num_threads": 0, "dtype": "bfloat16", "device": "theirs", "status": "ok"}
                rows.append(row)
    counted = add_counts(finish_table(rows))
    return counted, *roofline_tables(counted, published_device(SETTINGS))


@pytest.mark.parametrize("arch", SHAPES)
def test_generation_crosses_with_the_batch_where_algebra_says(tables, arch):
    """FLOPs = f B and bytes = W + s B cross a ridge R at B = R W / (f - R s); 'never' where f / s does not reach it."""
    _, _, crossings = tables
    shape = SHAPES[arch]
    for length in (512, 16384):
        flops = step_flops(shape, length)
        own = step_bytes(shape, length) - weight_bytes(shape)
        (row,) = crossings[
            (crossings["arch"] == arch)
            & (crossings["phase"] == "generation")
            & (crossings["against"] == "batch")
            & (crossings["prefill_length"] == length)
        ].to_dict("records")
        assert row["ridge"] == pytest.approx(RIDGE)
        exact = RIDGE * weight_bytes(shape) / (flops - RIDGE * own) if flops > RIDGE * own else math.inf
        if exact > MOST_SEQUENCES:
            assert row["status"] == "below" and math.isnan(row["crossing"])
        else:
            assert row["status"] == "rises" and row["crossing"] == math.ceil(exact)
        assert row["intensity_max"] < flops / own  # what an endless batch would have


def test_intensities_of_the_table_are_flops_over_bytes_and_the_state_of_xlstm_does_not_grow(tables):
    _, roofline, _ = tables
    np.testing.assert_allclose(roofline["intensity"], roofline["flops"] / roofline["bytes"])
    steps = roofline[(roofline["phase"] == "generation") & (roofline["against"] == "context")]
    flat = steps[steps["arch"] == "xlstm"].groupby("batch_size")["intensity"]
    assert (flat.max() == flat.min()).all()
    large = steps[(steps["arch"] == "transformer") & (steps["batch_size"] == 64)].sort_values("prefill_length")
    assert (large["intensity"].diff().dropna() < 0).all()  # reading the cache is nearly one FLOP a byte
    # as the context goes on, all that is left is the cache: 2 (d_qk + d_v + 2.5) FLOPs and 2 (d_qk + d_v) bytes a head
    assert large["intensity"].iloc[-1] == pytest.approx((256 + 2.5) / 256, rel=0.1)


def test_what_was_measured_is_in_the_table_with_its_rate(tables):
    counted, roofline, _ = tables
    seen = roofline[roofline["against"] == "measured"]
    assert len(seen) == 2 * len(counted)
    prefill = seen[seen["phase"] == "prefill"]
    np.testing.assert_allclose(sorted(prefill["flops_per_s"]), sorted(counted["ttft_flops"] / 0.5))


def test_without_a_data_sheet_there_is_no_ridge_and_it_is_said(tables):
    counted, *_ = tables
    roofline, crossings = roofline_tables(counted, published_device(SETTINGS | {"datasheet": None}))
    assert roofline["ridge"].isna().all() and (crossings["status"] == "no_ridge").all()
    with pytest.raises(ValueError, match="known: A100"):
        published_device(SETTINGS | {"datasheet": "abacus"})
    with pytest.raises(KeyError, match="ttft_flops"):
        roofline_tables(counted.drop(columns="ttft_flops"), published_device(SETTINGS))


def test_a_probe_of_this_machine():
    table = probe_device("cpu", "mine", "float32", 1)
    found = set(table["quantity"])
    assert (
        found - {"cache_bytes"} == {"flops_per_s", "bytes_per_s", "cached_bytes_per_s"} and (table["value"] > 0).all()
    )
    curve = table["quantity"] == "cached_bytes_per_s"
    assert table.loc[curve, "working_set_bytes"].is_monotonic_increasing
    assert table.loc[~curve, "working_set_bytes"].isna().all()
    assert (table["value_lo"] <= table["value"]).all() and (table["value"] <= table["value_hi"]).all()
    assert (table["source"] == "measured").all() and (table["repeats"] >= 5).all()
    best = peaks(table, "mine")
    assert best["bytes_per_s"] == table.loc[table["quantity"] == "bytes_per_s", "value"].max()
    assert math.isnan(peaks(table, "another")["flops_per_s"])


@pytest.mark.parametrize("cache_bytes", [2e6, 1.2e7, 5e7])
def test_what_a_cache_holds_is_found_in_a_noisy_curve(cache_bytes):
    sets, generator = 2.0 ** np.arange(19, 28), np.random.default_rng(0)
    seconds = 1 / 5e10 + (1 / 1.7e10 - 1 / 5e10) / (1 + (cache_bytes / sets) ** 6)
    noisy = np.exp(0.03 * generator.standard_normal(len(sets))) / seconds
    assert held_by_cache(sets, noisy) == pytest.approx(cache_bytes, rel=0.15)
    assert math.isnan(held_by_cache(sets, np.full(len(sets), 3e10)))  # memory is as fast
    assert math.isnan(held_by_cache(sets, noisy[::-1]))  # faster, even
