import json

import numpy as np
import pytest

from xlstm_scaling.cli import run_command


@pytest.fixture
def table(tmp_path, make_runs):
    runs = make_runs(noise=0.002, sizes=9, archs=("xlstm",))
    path = tmp_path / "runs.csv"
    runs.to_csv(path, index=False)
    runs.to_parquet(tmp_path / "runs.parquet")
    return path


def fit(capsys, *arguments):
    code = run_command(["fit-surface", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_of_csv_and_parquet_recovers_the_planted_surface(table, capsys, planted):
    options = ("--arch", "xlstm", "--set", "all", "--tokens-per-param", "0,5000", "--bootstrap", 60, "--json")
    code, out, _ = fit(capsys, table, *options)
    result = json.loads(out)
    assert code == 0
    assert result["status"] == "converged"
    assert result["context_length"] == 512
    low, high = result["intervals"]["exponent_params"]
    width = high - low
    assert low - 0.5 * width <= planted["xlstm"].exponent_params <= high + 0.5 * width
    assert result["parameters"]["gamma"] == 1.0
    assert "gamma" not in result["intervals"]
    other = json.loads(fit(capsys, table.with_suffix(".parquet"), *options)[1])
    assert other["objective"] == pytest.approx(result["objective"], rel=1e-9)


def test_text_names_parameters_and_status(table, capsys):
    code, out, _ = fit(capsys, table, "--arch", "xlstm", "--huber", "1e-2", "--set", "isoflop")
    assert code == 0
    for word in ("alpha", "exponent_params", "objective", "r2_log", "status            converged", "delta = 0.01"):
        assert word in out


def test_ranges_and_conditions_choose_the_runs(table, capsys):
    count = {}
    for name, options in {
        "all": (),
        "some": ("--tokens-per-param", "0,50"),
        "where": ("--where", "experiment_set=isoflop"),
        "context": ("--context-length", 256),
    }.items():
        count[name] = json.loads(fit(capsys, table, "--arch", "xlstm", "--json", *options)[1])["num_runs"]
    assert count["all"] == 36
    assert count["where"] == count["context"] == 27
    assert count["some"] < 36


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "gpt"), "no run has arch 'gpt'; there are: xlstm"),
        (("--arch", "xlstm", "--set", "none"), "experiment_set 'none'"),
        (("--arch", "xlstm", "--context-length", "7"), "context_length 7"),
        (("--arch", "xlstm", "--tokens-per-param", "1e7,1e8"), "tokens per parameter"),
        (("--arch", "xlstm", "--tokens-per-param", "9"), "two numbers"),
        (("--arch", "xlstm", "--tokens-per-param", "9,3"), "less than"),
        (("--arch", "xlstm", "--huber", "0"), "--huber must be positive"),
        (("--arch", "xlstm", "--weights", "absent"), "no column 'absent'"),
        (("--arch", "xlstm", "--where", "absent=1"), "no column 'absent'"),
        (("--arch", "xlstm", "--tokens-per-param", "20,20.5"), "too_few_runs"),
    ],
)
def test_errors_say_what_is_wrong(table, capsys, options, message):
    code, out, err = fit(capsys, table, *options)
    assert code == 1
    assert out == ""
    assert message in err


def test_files_that_are_no_tables(tmp_path, table, capsys):
    broken = tmp_path / "broken.parquet"
    broken.write_text("no parquet")
    short = tmp_path / "short.csv"
    short.write_text("arch,val_loss\nxlstm,3\n")
    for path, message in (
        (tmp_path / "absent.csv", "no such file"),
        (tmp_path / "runs.txt", ".parquet or .csv"),
        (broken, "cannot be read"),
        (short, "lacks the columns experiment_set"),
    ):
        code, _, err = fit(capsys, path, "--arch", "xlstm")
        assert code == 1
        assert message in err


def test_a_fit_that_is_no_estimate_exits_with_one(tmp_path, make_runs, capsys):
    runs = make_runs(archs=("xlstm",))
    path = tmp_path / "flat.csv"
    runs.assign(val_loss=3.0).to_csv(path, index=False)
    code, out, _ = fit(capsys, path, "--arch", "xlstm", "--json")
    assert code == 1
    assert json.loads(out)["status"] in ("bound_hit", "unidentified")
    assert np.isfinite(json.loads(out)["objective"])
