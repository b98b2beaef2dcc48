"""Every figure: draws, shows the tables' numbers, has units, marks failures."""

import functools
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from xlstm_scaling.figures import FIGURES, FigureError, Tables
from xlstm_scaling.figures.style import COLOURS, arch_styles, flops, nice_ticks, seconds, si

CONFIG = {"confidence": 0.95}


def draw(name, tables):
    return FIGURES[name].draw(tables, CONFIG)


@pytest.fixture(scope="module")
def tables(three):
    """The tables of the study that is drawn here: three architectures."""
    return three


@pytest.fixture(scope="module")
def drawn(tables):
    """Each figure of the study, drawn once: tests only look at it."""
    return functools.cache(lambda name: draw(name, tables))


def by_gid(figure, gid):
    return figure.findobj(lambda a: a.get_gid() == gid)


def words(figure):
    return " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(lambda a: hasattr(a, "get_text")))


def offsets(figure, gid):
    return np.vstack([np.asarray(artist.get_offsets()) for artist in by_gid(figure, gid)])


@pytest.mark.parametrize("name", FIGURES)
def test_axes_are_labelled_with_units(name, drawn):
    figure = drawn(name)
    labels = [text for ax in figure.axes for text in (ax.get_xlabel(), ax.get_ylabel()) if text]
    assert len(labels) >= 2 or name == "sensitivity"
    assert all(re.search(r"\[[^\]]+\]", label) for label in labels), labels


@pytest.mark.parametrize("name", FIGURES)
def test_third_architecture_is_drawn_in_its_own_colour(name, drawn, tables):
    assert "mamba" in words(drawn(name))
    styles = arch_styles(tables.archs)
    assert len({style.colour for style in styles.values()}) == len({style.marker for style in styles.values()}) == 3


@pytest.mark.parametrize("name", FIGURES)
def test_empty_tables_are_said_not_raised(name, frames):
    empty = {key: frame if key in ("runs", "curves") else frame.iloc[:0] for key, frame in frames.items()}
    figure = draw(name, Tables(frames=empty))
    if name not in ("study_overview", "loss_map", "training_curves"):
        assert re.search(r"no (fit|measurement)", words(figure)), words(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_a_study_without_any_row_is_said_not_raised(name, frames):
    figure = draw(name, Tables(frames={key: frame.iloc[:0] for key, frame in frames.items()}))
    assert re.search(r"\bno (fit|measurement|runs|curves)\b", words(figure)), words(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_missing_table_names_the_stage(name, tmp_path):
    with pytest.raises(
        FigureError, match=r"table '.*' is missing .* run stage '(runs|fit|inference|evaluate|context_scaling_tables)'"
    ):
        draw(name, Tables(tmp_path))


def test_missing_column_is_named(frames):
    tables = Tables(frames=frames | {"fits/isoflop": frames["fits/isoflop"].drop(columns="x_opt")})
    with pytest.raises(FigureError, match=r"lacks the columns x_opt; run stage 'fit'"):
        draw("isoflop_curves", tables)


def test_isoflop_points_and_minima_are_those_of_the_tables(drawn, tables):
    figure, runs, cells = drawn("isoflop_curves"), tables["runs"], tables["fits/isoflop"]
    runs = runs[(runs["arch"] == "xlstm") & (runs["context_length"] == 512) & runs["isoflop_tag"].notna()]
    seen = offsets(figure, "runs-xLSTM-num_params")
    assert sorted(map(tuple, seen)) == sorted(zip(runs["num_params"], runs["val_loss"]))
    cells = cells[(cells["arch"] == "xlstm") & (cells["context_length"] == 512) & (cells["variable"] == "num_params")]
    minima = [line.get_xydata()[0] for line in by_gid(figure, "minimum-xLSTM-num_params")]
    np.testing.assert_allclose(sorted(map(tuple, minima)), sorted(zip(cells["x_opt"], cells["loss_opt"])))


def test_pareto_frontier_and_ratio_are_those_of_the_tables(drawn, tables):
    figure, front, ratio = drawn("loss_vs_flops"), tables["fits/pareto"], tables["fits/pareto_ratio"]
    for arch in ("xlstm", "transformer"):
        rows = front[(front["arch"] == arch) & (front["context_length"] == 512)].sort_values("num_flops")
        (line,) = by_gid(figure, f"frontier-{arch}")
        np.testing.assert_array_equal(line.get_xydata(), rows[["num_flops", "val_loss"]].to_numpy())
        assert to_rgba(line.get_color()) == to_rgba(COLOURS[arch])
    (line,) = by_gid(figure, "flop-ratio-xlstm-transformer")
    rows = ratio[ratio["context_length"] == 512].sort_values("val_loss")
    np.testing.assert_array_equal(line.get_xydata(), rows[["flop_ratio", "val_loss"]].to_numpy())


def test_ratio_without_interval_is_not_in_the_headline(frames):
    ratio = frames["fits/pareto_ratio"].copy()
    ratio.loc[:, ["status", "flop_ratio_lo", "flop_ratio_hi"]] = ["no_interval", np.nan, np.nan]
    text = words(draw("loss_vs_flops", Tables(frames=frames | {"fits/pareto_ratio": ratio})))
    assert "no fit: no interval" in text and "needs 1" not in text


def test_headline_claims_no_difference_where_the_interval_holds_one(frames):
    ratio = frames["fits/pareto_ratio"].assign(flop_ratio=1.1, flop_ratio_lo=0.9, flop_ratio_hi=1.3)
    text = words(draw("loss_vs_flops", Tables(frames=frames | {"fits/pareto_ratio": ratio})))
    assert "the interval holds 1, no difference is shown" in text


def test_exponents_stand_in_the_legend_with_their_interval(drawn, tables):
    laws = tables["fits/power_laws"]
    law = laws[(laws["arch"] == "xlstm") & (laws["variable"] == "num_params") & (laws["predictor"] == "flops")]
    row = law[law["context_length"] == 512].iloc[0]
    expected = f"^{{{row['exponent']:.2f}}}$ [{row['exponent_lo']:.2f}, {row['exponent_hi']:.2f}]"
    figure = drawn("compute_optimal")
    assert expected in " ".join(text.get_text() for text in figure.axes[0].get_legend().get_texts())


def test_timings_are_those_of_the_table(drawn, tables):
    rows = tables["inference/measurements"]
    rows = rows[(rows["arch"] == "xlstm") & (rows["batch_size"] == 1) & (rows["prefill_length"] > 0)]
    for name in ("ttft", "step_time"):
        seen = offsets(drawn(name), "measured-xlstm")
        assert sorted(map(tuple, seen)) == sorted(zip(rows["prefill_length"], rows[f"{name}_s"]))


def test_the_loss_by_position_is_that_of_the_table(drawn, tables):
    figure, table = drawn("length"), tables["evaluation/length"]
    rows = table[(table["arch"] == "transformer") & (table["context_length"] == 256) & (table["status"] == "ok")]
    assert len(rows) < len(table) / 9  # bins with few tokens are left out
    for value in ("loss", "excess"):
        (line,) = by_gid(figure, f"{value}-transformer-256-transformer-256")
        expected = np.column_stack([rows["position"] / 256, rows[value]])
        np.testing.assert_allclose(line.get_xydata(), expected)
    assert all(line.get_xdata()[0] == 1 for line in by_gid(figure, "training-context-256"))
    assert "bins are left out" in words(figure)


def test_the_roofline_shows_intensities_ridge_and_what_was_reached(drawn, tables):
    figure, table = drawn("roofline"), tables["inference/roofline"]
    for against, column, other in (
        ("context", "prefill_length", "batch_size"),
        ("batch", "batch_size", "prefill_length"),
    ):
        rows = table[(table["arch"] == "xlstm") & (table["phase"] == "generation") & (table["against"] == against)]
        for value, line in rows.groupby(other):
            (seen,) = by_gid(figure, f"generation-{against}-xlstm-{value:g}")
            np.testing.assert_array_equal(seen.get_xydata(), line[[column, "intensity"]].to_numpy())
        (ridge,) = by_gid(figure, f"ridge-{against}")
        assert set(ridge.get_ydata()) == {20.0}
    rows = table[(table["arch"] == "xlstm") & (table["phase"] == "prefill") & (table["against"] == "measured")]
    seen = offsets(figure, "reached-prefill-xlstm")
    assert sorted(map(tuple, seen)) == sorted(zip(rows["intensity"], rows["flops_per_s"]))
    (roof,) = by_gid(figure, "roof-prefill")
    x, y = roof.get_xydata().T
    np.testing.assert_allclose(y, np.minimum(1e10, 5e8 * x))
    assert "Ridge 20 FLOP/byte" in words(figure)
    without = draw(
        "roofline",
        Tables(
            frames={
                **tables,
                "inference/device": tables["inference/device"].iloc[:0],
                "inference/roofline": table.assign(ridge=np.nan),
            }
        ),
    )
    assert "No ridge" in words(without) and not by_gid(without, "ridge-context")


def test_the_latency_profile_is_of_one_size(drawn, tables):
    figure, table = drawn("latency_profile"), tables["inference/measurements"]
    sizes = table.loc[table["arch"] == "xlstm", "num_params"]
    rows = table[(table["num_params"] == sizes.max()) & (table["batch_size"] == 1) & (table["prefill_length"] > 0)]
    (line,) = by_gid(figure, "profile-step_time_s-xlstm")
    np.testing.assert_array_equal(line.get_xydata(), rows[["prefill_length", "step_time_s"]].to_numpy())
    assert "out of memory" in words(figure)  # the Transformer's longest prefill


def test_the_losses_by_context_are_those_of_the_table(drawn, tables):
    figure, table = drawn("context_scaling"), tables["context_scaling"]
    lines = [line.get_xydata() for line in by_gid(figure, "context-transformer")]
    rows = table[table["arch"] == "transformer"]
    expected = [part[["context_length", "val_loss"]].to_numpy() for _, part in rows.groupby("num_params")]
    for seen, wanted in zip(lines, expected, strict=True):
        np.testing.assert_array_equal(seen, wanted)
    rows = rows[rows["context_length"] == 1024]
    seen = offsets(figure, "difference-transformer-1024")
    assert sorted(map(tuple, seen)) == sorted(zip(rows["num_params"], rows["loss_difference"]))


def test_every_run_is_in_the_overview_and_the_diverged_are_crossed(drawn, tables):
    figure, runs = drawn("study_overview"), tables["runs"]
    shown = figure.findobj(lambda a: str(a.get_gid()).startswith("runs-"))
    assert sum(len(points.get_offsets()) for points in shown) == len(runs)
    assert len(offsets(figure, "diverged-512")) == (runs["status"] != "ok").sum() == 3


def test_every_curve_is_drawn(drawn, tables):
    figure, curves = drawn("training_curves"), tables["curves"]
    for arch, rows in curves.groupby("arch"):
        (lines,) = by_gid(figure, f"curves-{arch}")
        assert len(lines.get_segments()) == rows["run_id"].nunique()


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        (("num_params",), ("power_laws", "isoflop_contexts", "compute_optimal")),
        (("num_params", "num_tokens"), ("compute_optimal",)),
    ],
)
def test_minima_that_are_all_missing_are_said(frames, variables, names):
    gone = frames["fits/isoflop"]["variable"].isin(variables)
    cells = frames["fits/isoflop"].assign(status=frames["fits/isoflop"]["status"].mask(gone, "no_minimum"))
    cells.loc[gone, ["x_opt", "x_opt_lo", "x_opt_hi"]] = np.nan
    lost = {
        name: frames[name][~frames[name]["variable"].isin(variables)]
        for name in ("fits/power_laws", "fits/power_law_bands")
    }
    for name in names:
        said = words(draw(name, Tables(frames=frames | lost | {"fits/isoflop": cells})))
        assert re.search(r"no fit: |no usable minimum \(", said), said


def test_failed_cells_are_hollow_and_said(broken):
    figure = draw("isoflop_curves", broken)
    faces = [points.get_facecolors() for points in by_gid(figure, "runs-xLSTM-num_params")]
    assert sorted(len(face) for face in faces) == [0, 1, 1]
    assert "xLSTM 1e12 in N (outside range)" in words(figure)
    figure = draw("compute_optimal", broken)
    (points,) = by_gid(figure, "minima-xlstm-num_params-failed")
    assert len(points.get_offsets()) == 1 and len(points.get_facecolors()) == 0
    assert "2 minima left out" in words(figure)
    figure = draw("overtraining", broken)
    assert "2 runs, 3 needed" in words(figure)
    failed = broken["fits/overtraining"].iloc[0]
    (points,) = by_gid(figure, f"runs-{failed['arch']}-{failed['ratio_tag']:g}")
    assert len(points.get_facecolors()) == 0
    failed_estimates = by_gid(draw("sensitivity", broken), "estimate-transformer-failed")
    assert failed_estimates and all(len(points.get_facecolors()) == 0 for points in failed_estimates)


def test_labels_read_well():
    assert [si(x) for x in (512, 1e5, 1.5e6, 7e9, 2.1e12)] == ["512", "100k", "1.5M", "7B", "2.1T"]
    assert [flops(x) for x in (3e11, 1.5e20, 6e18)] == ["3e11", "1.5e20", "6e18"]
    assert [seconds(x) for x in (2e-5, 0.003, 4)] == ["20 µs", "3 ms", "4 s"]
    assert nice_ticks(2e18, 2e23) == pytest.approx([1e19, 1e20, 1e21, 1e22, 1e23])
    for low, high in ((2.9, 3.6), (2, 9), (1e4, 3e6), (1e11, 5e14)):
        ticks = nice_ticks(low, high)
        assert 3 <= len(ticks) <= 9 and low <= min(ticks) and max(ticks) <= high
