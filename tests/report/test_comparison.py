"""Studies side by side: planted laws must be told apart, or not, by their intervals."""

import json
import math

import pandas as pd
import pytest

from xlstm_scaling.cli import run_command
from xlstm_scaling.figures.comparison import comparison
from xlstm_scaling.figures.tables import FigureError
from xlstm_scaling.report.comparison import FLOP_RATIO, compare_studies, comparison_text, write_comparison

PARAMS = "exponent of N* in H"


def law(arch, variable, exponent, half, context=256.0, points=3, predictor="flops", tag=math.nan, status="ok"):
    return {
        "arch": arch, "context_length": context, "variable": variable, "predictor": predictor, "isoflop_tag": tag,
        "exponent": exponent, "exponent_lo": exponent - half, "exponent_hi": exponent + half, "num_points": points,
        "status": status,
    }  # fmt: skip


def surface(arch, exponent, half, status="converged", subset="all", form="gamma_fixed", runs=20):
    return {
        "arch": arch, "context_length": 256, "subset": subset, "form": form, "exponent_params": exponent,
        "exponent_params_lo": exponent - half, "exponent_params_hi": exponent + half, "num_runs": runs,
        "status": status,
    }  # fmt: skip


def ratio(*values, half=0.1):
    rows = [
        {
            "arch": "xlstm",
            "other": "transformer",
            "context_length": 256,
            "val_loss": 3 + i / 10,
            "flop_ratio": v,
            "flop_ratio_lo": v - half,
        }
        | {"flop_ratio_hi": v + half}
        for i, v in enumerate(values)
    ]
    return pd.DataFrame(rows)


def study(folder, laws, surfaces=(), ratios=None):
    (folder / "fits").mkdir(parents=True)
    pd.DataFrame(laws).to_parquet(folder / "fits" / "power_laws.parquet")
    if surfaces:
        pd.DataFrame(surfaces).to_parquet(folder / "fits" / "surface.parquet")
    if ratios is not None:
        ratios.to_parquet(folder / "fits" / "pareto_ratio.parquet")
    return folder


def base_laws(shift=0.0, half=0.03):
    return [
        law("xlstm", "num_params", 0.5 + shift, half),
        law("transformer", "num_params", 0.6 + shift, half),
        law("xlstm - transformer", "num_params", -0.1, half),
    ]


@pytest.fixture
def pair(tmp_path):
    a = study(tmp_path / "a", base_laws(), [surface("xlstm", 0.5, 0.1)], ratio(1.2, 1.4, 1.6))
    b = study(tmp_path / "b", base_laws(shift=0.2), [surface("xlstm", 0.45, 0.1, "bound_hit")], ratio(1.3, 1.5, 1.7))
    return a, b


def one(table, study, quantity=PARAMS, arch="xlstm"):
    rows = table[(table.study == study) & (table.quantity == quantity) & (table.arch == arch)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_differences_have_the_interval_of_independent_estimates(pair):
    table = compare_studies(pair)
    moved = one(table, "b")
    assert moved.difference == pytest.approx(0.2)
    half = math.hypot(0.03, 0.03)
    assert (moved.difference_lo, moved.difference_hi) == pytest.approx((0.2 - half, 0.2 + half))
    assert moved.verdict == "differ"
    assert one(table, "a").verdict == "reference"
    same = one(table, "b", arch="xlstm - transformer")
    assert same.verdict == "agree"
    assert same.difference == pytest.approx(0)


def test_unequal_sides_of_an_interval_count_on_their_own_side(tmp_path):
    a = study(tmp_path / "a", [law("xlstm", "num_params", 0.5, 0.0) | {"exponent_lo": 0.1, "exponent_hi": 0.51}])
    above = study(tmp_path / "b", [law("xlstm", "num_params", 0.7, 0.05)])
    below = study(tmp_path / "c", [law("xlstm", "num_params", 0.3, 0.05)])
    table = compare_studies([a, above, below])
    assert one(table, "b").verdict == "differ"  # the reference reaches 0.51 above, its long side is below
    assert one(table, "c").verdict == "agree"


def test_what_one_study_has_alone_is_not_compared(pair):
    table = compare_studies(pair)
    lonely = table[table.quantity.str.contains("loss surface")]
    assert list(lonely.study) == ["a"]  # b's surface did not converge
    assert list(lonely.verdict) == ["absent"]


def test_the_ranking_says_which_architecture_is_ahead(pair):
    table = compare_studies(pair)
    assert one(table, "a", FLOP_RATIO, "transformer / xlstm").ranking == "xlstm ahead"
    assert one(table, "a", FLOP_RATIO, "transformer / xlstm").value == pytest.approx(1.4)  # the middle loss
    assert one(table, "a", arch="xlstm - transformer").ranking == "xlstm smaller"
    assert one(table, "a").ranking == ""


@pytest.mark.parametrize(("value", "half", "ranking"), [(0.8, 0.1, "xlstm behind"), (1.05, 0.1, "not told")])
def test_an_interval_around_equality_ranks_nobody(tmp_path, value, half, ranking):
    a = study(tmp_path / "a", base_laws(), ratios=ratio(value, half=half))
    b = study(tmp_path / "b", base_laws(), ratios=ratio(1.5))
    assert one(compare_studies([a, b]), "a", FLOP_RATIO, "transformer / xlstm").ranking == ranking


def test_the_context_with_the_most_minima_stands_for_a_study(tmp_path):
    laws = [law("xlstm", "num_params", e, 0.1, c, n) for e, c, n in ((0.4, 256, 3), (0.5, 512, 5), (0.6, 1024, 2))]
    a, b = study(tmp_path / "a", laws), study(tmp_path / "b", base_laws())
    row = one(compare_studies([a, b]), "a")
    assert (row.context_length, row.value) == (512, 0.5)


def test_without_intervals_nothing_is_told(tmp_path):
    bare = law("xlstm", "num_params", 0.9, math.nan)
    table = compare_studies([study(tmp_path / "a", base_laws()), study(tmp_path / "b", [bare])])
    row = one(table, "b")
    assert row.verdict == "not told"
    assert row.difference == pytest.approx(0.4)
    assert math.isnan(row.difference_lo)


def test_files_and_figure(pair, tmp_path):
    table = compare_studies(pair)
    write_comparison(table, tmp_path / "out", ("svg",))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"comparison.{k}" for k in ("csv", "parquet", "md", "svg")
    }
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "comparison.parquet"), table)
    marks = [c.get_gid() for ax in comparison(table).axes for c in ax.collections if c.get_gid()]
    assert len(marks) == len(table)
    assert sum("differ" in gid for gid in marks) == (table.verdict == "differ").sum() > 0
    text = comparison_text(table)
    assert "b against a" in text
    assert "0.700 (0.670 to 0.730)" in text


def test_command(pair, capsys, tmp_path):
    assert run_command(["compare", *map(str, pair), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["study"] for row in rows} == {"a", "b"}
    assert run_command(["compare", str(pair[0]), str(tmp_path / "nothing")]) != 0
    assert "nothing" in capsys.readouterr().err


def test_one_study_cannot_be_compared(pair, tmp_path):
    for studies in (pair[:1], (pair[0], pair[0])):
        with pytest.raises(ValueError, match="at least two studies"):
            compare_studies(studies)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FigureError, match="run stage 'fit' first"):
        compare_studies([pair[0], tmp_path / "empty"])
