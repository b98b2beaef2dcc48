"""The paper's own logs and its table of all runs (skipped where they are not at hand)."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from xlstm_scaling.fitting.envelope import fit_envelope
from xlstm_scaling.fitting.overtraining import fit_overtraining
from xlstm_scaling.fitting.tables import usable_runs
from xlstm_scaling.published.ingest import Ingested, ingest
from xlstm_scaling.published.reader import load_pickle
from xlstm_scaling.published.upstream import Upstream
from xlstm_scaling.study.config import conf_dir

#: arch, context, set -> the paper's runs
COUNTS = {
    ("transformer", 2048, "isoflop"): 84,
    ("transformer", 8192, "isoflop"): 107,
    ("transformer", 16384, "isoflop"): 70,
    ("transformer", 8192, "tokenparam"): 31,
    ("xlstm", 2048, "isoflop"): 87,
    ("xlstm", 8192, "isoflop"): 145,
    ("xlstm", 16384, "isoflop"): 81,
    ("xlstm", 8192, "tokenparam"): 35,
}
KEYS = ["arch", "context_length", "experiment_set"]
LOGS = Upstream.load().logs


@pytest.fixture(scope="module")
def table(paper) -> Ingested:
    return ingest([paper / "runs.csv"])


@pytest.fixture(scope="module")
def together(paper) -> Ingested:
    return ingest([paper])


@pytest.fixture(scope="module")
def published(paper) -> pd.DataFrame:
    """The table of all runs as it stands, by run id."""
    return pd.read_csv(paper / "runs.csv", low_memory=False).set_index("run_id")


@pytest.mark.parametrize("which", ["table", "together"])
def test_640_runs_are_selected(which, request):
    result = request.getfixturevalue(which)
    runs = result.runs
    assert len(runs) == 757
    assert runs[runs["selected"]].groupby(KEYS).size().to_dict() == COUNTS
    assert runs["selected"].sum() == sum(COUNTS.values()) == 640
    assert (runs["selected"] == runs["in_paper_640"]).all()
    assert (runs.loc[runs["selected"], "status"] == "ok").all()
    assert not result.mismatches and not result.conflicts and not result.missing


def test_the_table_is_taken_over_exactly(table, published):
    runs = table.runs[table.runs["run_id"].isin(published.index)].set_index("run_id")
    theirs = published.loc[runs.index]
    assert len(runs) == 675
    for column in ("num_params", "num_tokens", "num_flops", "val_loss", "val_loss_abs_err", "learning_rate"):
        np.testing.assert_array_equal(runs[column].astype("float64"), theirs[column])
    multiplicity = table.runs["notebook_multiplicity"]
    assert (multiplicity == 2).sum() == 32 and multiplicity[table.runs["selected"]].sum() == 672
    unnamed = table.runs[~table.runs["run_id"].isin(published.index)]
    assert len(unnamed) == 82 and unnamed["run_id"].str.startswith("xlstm-c2048-").all()


def test_budget_labels_are_those_of_the_table(table, paper):
    theirs = pd.read_csv(paper / "runs.csv", low_memory=False)
    tags = pd.to_numeric(theirs["isoflop_tag"], errors="coerce").where(theirs["experiment_set"] == "isoflop")
    np.testing.assert_array_equal(table.runs["isoflop_tag"], tags)


@pytest.mark.parametrize("name", LOGS)
def test_a_log_agrees_with_the_table(paper, published, name):
    """Every run of a log that the table has too: N, D and FLOPs exactly, the loss to 1e-9; the same runs selected."""
    if not (path := paper / "logs" / name).is_file():
        pytest.skip(f"{name} is not in {path.parent.name}/")
    result = ingest([path])
    runs = result.runs.set_index("run_id")
    runs = runs[runs.index.isin(published.index)]
    theirs = published.loc[runs.index]
    assert len(runs) >= 30
    for column in ("num_params", "num_tokens", "num_flops", "learning_rate", "num_train_steps"):
        np.testing.assert_array_equal(runs[column].astype("float64"), theirs[column])
    error = (runs["val_loss"] - theirs["val_loss"]).abs()
    assert (error.isna() == theirs["val_loss"].isna()).all()
    assert (error.fillna(0) <= np.maximum(theirs["val_loss_abs_err"], 1e-9)).all()
    assert (runs["selected"] == theirs["in_paper_640"]).all()
    assert not result.mismatches and set(result.missing) == set(LOGS) - {name}
    named = result.curves["run_id"].unique()
    assert set(named) == set(runs.index[runs["train_loss"].notna()])
    last = result.curves.dropna(subset="val_loss").groupby("run_id")["val_loss"].last()
    np.testing.assert_array_equal(last, runs.loc[last.index, "val_loss"])


def test_runs_that_went_wrong_are_marked(together):
    runs = together.runs
    assert runs["status"].value_counts().to_dict() == {"ok": 724, "failed": 30, "diverged": 3}
    stopped = runs[runs["detail"].fillna("").str.startswith("stopped: ")]
    assert stopped["detail"].tolist() == ["stopped: last validated at step 5000 of 9400"]
    assert together.num_duplicates == 385  # every run of the five logs is in the table too


def test_overtraining_slopes_of_the_labels(table, paper):
    """All twelve printed slopes, with the authors' labels: the logs' to 1e-9, xlstm's printed with fewer digits."""
    numbers = json.loads((paper / "paper_numbers.json").read_text())["overtraining_slopes"]["final_table"]["rows"]
    config = yaml.safe_load((conf_dir() / "fitting" / "default.yaml").read_text())
    config |= {"num_resamples": 5, "overtraining": {"min_runs": 2}}
    runs = table.runs[table.runs["selected"]]
    slopes = fit_overtraining(usable_runs(runs), config).set_index(["arch", "ratio_tag"])["slope"]
    for row in numbers:
        for arch, column in (("transformer", "Transformer"), ("xlstm", "xLSTM")):
            assert -slopes[arch, float(row["index"])] == pytest.approx(row[column], abs=6e-7)
    assert len(numbers) == 6


def test_training_curves_give_an_envelope(together):
    config = yaml.safe_load((conf_dir() / "fitting" / "default.yaml").read_text()) | {"num_resamples": 5}
    runs = together.runs[together.runs["selected"]]
    curves = together.curves[together.curves["run_id"].isin(runs["run_id"])]
    fits = fit_envelope(curves.rename(columns={"train_loss": "loss"}), config, runs)
    fits = fits[(fits["arch"] == "transformer") & (fits["variable"] == "num_params")].set_index("context_length")
    assert fits["status"].to_dict() == {2048: "ok", 8192: "ok"}
    assert fits["exponent"].between(0.3, 0.8).all()


def test_the_inference_measurements_can_be_read(paper):
    """Their classes are two more than the logs': nothing else in the file either."""
    tables = load_pickle(paper / "logs" / "inference_results_df_dict.pkl")
    assert {"xlstm", "llama2"} <= set(tables)
    for frame in tables.values():
        assert len(frame) == 780 and ("measured_data", "ttft") in frame.columns
