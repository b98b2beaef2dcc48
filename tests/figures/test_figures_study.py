"""`draw_all`: what it writes, that it writes the same again, and the captions."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from matplotlib.image import imread

from xlstm_scaling.figures import FIGURES, FigureError, captions, draw_all, figure_outputs
from xlstm_scaling.figures.study import figure_config

ROOT = Path(__file__).resolve().parents[2]
#: some figures of every kind; the workflow draws all of them
NAMES = ["loss_vs_flops", "training_curves", "compute_optimal", "overtraining", "ttft", "length"]
CONFIG = {"figures": {"dpi": 60}, "fitting": {"confidence": 0.9}}


@pytest.fixture(scope="module")
def drawn(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    return out, draw_all(results, out, CONFIG, only=NAMES, progress=False)


def test_writes_what_it_says_and_leaves_nothing_else(drawn):
    out, written = drawn
    assert sorted(written) == sorted(figure_outputs(out, {}, NAMES)) == sorted(out.iterdir())
    assert {path.stem for path in written} == set(NAMES)
    assert {path.suffix for path in written} == {".svg", ".png", ".csv"}
    for path in written:
        assert imread(path).shape[1] > 300 if path.suffix == ".png" else path.stat().st_size > 100
        if path.suffix == ".csv":
            assert len(pd.read_csv(path)) > 0


def test_the_table_behind_every_figure_has_rows(tables):
    options = figure_config(CONFIG)
    behind = {name: spec.data(tables, options) for name, spec in FIGURES.items() if spec.data is not None}
    assert len(behind) > 10
    assert all(len(rows) > 0 for rows in behind.values())
    assert set(figure_outputs(Path("out"), {})) >= {Path("out") / f"{name}.csv" for name in behind}


def test_confidence_of_the_fits_is_in_the_figures(results):
    from xlstm_scaling.figures import Tables

    options = figure_config({"figures": {"confidence": None}, "fitting": {"confidence": 0.9}})
    figure = FIGURES["compute_optimal"].draw(Tables(results), options)
    assert any("90 % bootstrap" in text.get_text() for text in figure.texts)


def test_second_draw_in_another_process_gives_the_same_bytes(drawn, results, tmp_path):
    out, _ = drawn
    code = (
        "import sys; from xlstm_scaling.figures import draw_all;"
        "draw_all(sys.argv[1], sys.argv[2], {'figures': {'dpi': 60}, 'fitting': {'confidence': 0.9}},"
        " sys.argv[3:], progress=False)"
    )
    names = ["loss_vs_flops", "compute_optimal", "ttft"]
    subprocess.run([sys.executable, "-c", code, str(results), str(tmp_path), *names], check=True)
    again = sorted(tmp_path.iterdir())
    assert {path.stem for path in again} >= set(names)
    for path in again:
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_some_figures_and_formats(results, tmp_path):
    written = draw_all(results, tmp_path, {"formats": ["svg"]}, only=["compute_optimal"], progress=False)
    assert written == [tmp_path / "compute_optimal.svg"]
    assert "<dc:date>" not in written[0].read_text()
    assert figure_outputs(tmp_path, {"figures": {"only": ["ttft"], "formats": ["png"]}})[0].name == "ttft.png"


def test_unknown_figure_and_missing_tables_fail_before_drawing(results, tmp_path):
    with pytest.raises(FigureError, match="no figure 'losses'; there are: loss_vs_flops"):
        draw_all(results, tmp_path, {}, only=["losses"], progress=False)
    with pytest.raises(FigureError, match="ttft: table 'inference/measurements' is missing"):
        draw_all(tmp_path / "nowhere", tmp_path / "out", {}, progress=False)
    assert not (tmp_path / "out").exists()


def test_every_figure_has_a_caption():
    folder = ROOT / "workflow" / "report"
    for name, path in captions(folder).items():
        text = path.read_text()
        assert len(text) > 200, name
        assert text.count("{{") == text.count("}}")
    assert (folder / "workflow.rst").is_file()
    with pytest.raises(FigureError, match="captions are missing"):
        captions(folder / "none")


def test_published_runs_have_no_figure_of_their_models():
    from xlstm_scaling.figures.study import drawable_names

    assert "length" in drawable_names({"runs": {"source": "trained"}})
    left_out = ("length", "latency_profile", "context_scaling")  # the last two: by targets of their own
    assert drawable_names({"runs": {"source": "published"}}) == [name for name in FIGURES if name not in left_out]
    assert drawable_names({})[-1] == "choice"


def test_every_option_is_in_the_config_and_every_entry_of_the_config_is_used():
    config = yaml.safe_load((ROOT / "conf" / "figures" / "default.yaml").read_text())
    sources = "".join(path.read_text() for path in (ROOT / "src" / "figures").glob("*.py"))
    asked = re.findall(r'(?:\bconfig|\boptions|figure_config\(config\))\.get\("(\w+)"', sources)
    assert set(asked) - {"figures", "fitting", "runs"} == set(config)  # but for groups of the whole configuration


def test_figures_do_not_import_torch_or_snakemake():
    code = "import sys, xlstm_scaling.figures; print([m for m in ('torch', 'snakemake') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
