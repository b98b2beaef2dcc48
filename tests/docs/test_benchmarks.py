"""docs/benchmarks.md says what the recorded files say, and recording keeps what a benchmark printed."""

import importlib.util
import json
import sys

import pytest
from pages import REPOSITORY


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", REPOSITORY / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page, record = script("page"), script("record")


def decoding_row(arch, ratio):
    return {
        "arch": arch,
        "size": "64x2x512",
        "batch": 1,
        "step_time_s": {"decoder": 0.00125},
        "dtype": "float32",
        "ratio_transformers": ratio,
        "roofline_share": 0.5,
    }


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A benchmark that prints what decoding.py prints, recorded."""
    result = {"rows": [decoding_row("xlstm", 2.375), decoding_row("transformer", 1.5)], "flat": []}
    program = tmp_path / "decoding.py"
    program.write_text(f"print('working')\nprint({json.dumps(json.dumps(result))})\n")
    monkeypatch.setattr(record, "busy_share", lambda seconds: 0.0)
    assert record.main(["--results", str(tmp_path / "results"), "--no-page", str(program), "--quick"]) == 0
    return tmp_path / "results", result


def test_page_is_up_to_date():
    text = page.page(page.load(page.RESULTS), f"figures/{page.FIGURE.name}")
    assert page.PAGE.read_text() == text, "stale: python benchmarks/page.py"


def test_records_hold_what_the_benchmark_found(recorded):
    folder, result = recorded
    (path,) = folder.glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["result"] == result
    assert kept["command"] == "python benchmarks/decoding.py --quick"
    assert kept["benchmark"] == "decoding" and kept["date"] in path.name
    assert kept["machine"]["cores"] >= 1 and kept["machine"]["torch"]


def test_the_page_shows_it(recorded):
    folder, _ = recorded
    text = page.page(page.load(folder), "figures/benchmarks.png")
    assert "| xLSTM | 64x2x512 | 1 | float32 | 1.25 | 2.38 | 50% |" in text
    assert "python benchmarks/decoding.py --quick" in text
    page.draw(page.load(folder), folder / "figure.png")
    assert (folder / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize("program", ["print('no JSON')", "print('[1]')", "print('{}')\nraise SystemExit(3)", ""])
def test_nothing_is_recorded_of_a_benchmark_that_failed(program, tmp_path, monkeypatch, capsys):
    path = tmp_path / "broken.py"
    path.write_text(program)
    monkeypatch.setattr(record, "busy_share", lambda seconds: 0.0)
    assert record.main(["--results", str(tmp_path / "results"), "--no-page", str(path)]) == 1
    assert not (tmp_path / "results").exists()
    assert "nothing is recorded" in capsys.readouterr().err


def test_a_busy_machine_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "never.py"
    path.write_text("raise SystemExit('it ran')")
    monkeypatch.setattr(record, "busy_share", lambda seconds: 0.8)
    assert record.main(["--results", str(tmp_path), "--no-page", str(path)]) == 1
    assert "80%" in capsys.readouterr().err
    assert sys.executable


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.name)
def test_stored_records_are_whole(path):
    kept = json.loads(path.read_text())
    assert {"benchmark", "command", "date", "commit", "machine", "seconds", "load_of_others", "result"} <= set(kept)
    assert (REPOSITORY / "benchmarks" / f"{kept['benchmark']}.py").is_file()
