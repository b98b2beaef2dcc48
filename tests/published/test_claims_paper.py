"""The claims ledger on the paper's runs and measurements (skipped where they are not at hand)."""

import numpy as np
import pandas as pd
import pytest
import yaml

from xlstm_scaling.published.claims.answers import FUNCTIONS
from xlstm_scaling.published.claims.evidence import Evidence
from xlstm_scaling.published.claims.inference import read_measurements
from xlstm_scaling.published.claims.ledger import build_ledger, load_claims
from xlstm_scaling.published.ingest import ingest
from xlstm_scaling.study.config import conf_dir

CLAIMS, TITLES = load_claims(conf_dir() / "claims", FUNCTIONS)
#: fits of a minute together; one test below takes the quick ones among them
SLOW = {"surface_parameter", "surface_optimality", "surface_exponent_extreme", "surface_form_shift"}
TOPICS = {
    *("dataset", "isoflop", "exponents", "context", "envelope", "optimal", "pareto", "overtraining", "surface"),
    "inference",
}


@pytest.fixture(scope="module")
def evidence(paper):
    runs = ingest([paper / "runs.csv"]).runs
    config = yaml.safe_load((conf_dir() / "fitting" / "default.yaml").read_text()) | {"num_resamples": 40}
    return Evidence(runs[runs["selected"]], config, inference=read_measurements(paper / "inference.csv"))


@pytest.fixture(scope="module")
def ledger(evidence):
    return build_ledger([c for c in CLAIMS if c.function not in SLOW], evidence, FUNCTIONS).set_index("id")


def test_there_are_enough_claims_over_every_topic():
    assert len(CLAIMS) >= 60 and {claim.topic for claim in CLAIMS} == set(TITLES) == TOPICS


def test_no_claim_raises_and_only_curves_are_missing(ledger):
    assert not ledger["why"].str.contains("the answer failed").any()
    unanswered = ledger[ledger["verdict"] == "not answerable"]
    assert set(unanswered["topic"]) == {"envelope"}
    assert unanswered["why"].str.contains("training curves").all()


def test_printed_minima_come_out_with_the_duplicates_put_back(ledger):
    """All 54; only those that are `independent` say something, the others' losses were made to agree."""
    minima = ledger[ledger["topic"] == "isoflop"]
    assert len(minima) == 54
    error = np.abs(minima["value"] / minima["published"] - 1)
    assert (error <= 1e-5).all()
    assert (minima["verdict"] == "reproduced").all()
    assert ((minima["low"] <= minima["value"]) & (minima["value"] <= minima["high"])).mean() > 0.9
    assert minima["independent"].sum() == 40
    assert minima.loc[~minima["independent"], "why"].str.contains("no independent check").all()
    moved = minima[minima["value_without_duplicates"].notna()]
    assert sorted({name.split("-", 1)[1] for name in moved.index}) == [
        "xlstm-8192-1e20",
        "xlstm-8192-3e19",
        "xlstm-8192-6e20",
    ]
    assert (np.abs(moved["value_without_duplicates"] / moved["value"] - 1) > 1e-4).all()


def test_exponents_tables_slopes_and_frontier(ledger):
    for topic, number in {"exponents": 32, "optimal": 46}.items():
        rows = ledger[ledger["topic"] == topic]
        assert len(rows) == number and (rows["verdict"] == "reproduced").all(), rows[rows["verdict"] != "reproduced"]
    exact = ledger[ledger.index.str.startswith("exp-") & ~ledger.index.str.contains("xlstm-8192|xlstm-2048")]
    assert (np.abs(exact["value"] - exact["published"]) <= 1e-5).all()
    assert (ledger.loc[ledger.index.str.startswith(("pareto-", "slope-")), "verdict"] == "reproduced").all()


def test_each_fault_is_demonstrated(ledger):
    """Every fault row repeats the authors' number, and has the right one beside it where there is one."""
    faults = ledger[ledger.index.str.startswith("fault-")]
    assert (faults["verdict"] == "authors' error").all(), faults[faults["verdict"] != "authors' error"]
    assert faults["right_value"].notna().all()
    right = faults["right_value"]
    assert right["fault-runs-672"] == 640
    assert (right[right.index.str.startswith("fault-mse")] < 1e-3).all()
    assert (right[right.index.str.startswith("fault-r2")] > 0.99).all()
    assert (right[right.index.str.startswith("fault-bandwidth")] > 0).all()
    errors = faults[faults.index.str.startswith("fault-stderr")]
    assert len(errors) == 11 and np.allclose(errors["right_value"] ** 2, errors["value"])
    planned = faults[faults.index.str.startswith("fault-planner")]
    assert (np.abs(planned["right_value"] / planned["published"] - 1) > 2e-3).any()


def test_general_claims(ledger):
    names = [
        "flop-ratio-8192-27",
        "flop-ratio-growth-16384-2048",
        "ctx-transformer-shrinks-6e18",
        "ctx-difference-6e18",
    ]
    names += ["ctx-larger-8192-3e19", "step-flat-7b", "step-grows-7b", "ttft-below-raw-7b"]
    assert (ledger.loc[names, "verdict"] == "reproduced").all()


def test_published_surface_is_an_optimum_and_its_form_matters(evidence):
    """gamma = 1 only: the free fits take ten times as long."""
    quick = [
        c for c in CLAIMS if c.id in ("optimum-transformer-gamma-fixed", "surface-exponent-transformer-gamma-fixed")
    ]
    rows = build_ledger(quick, evidence, FUNCTIONS)
    assert len(rows) == 2 and (rows["verdict"] == "reproduced").all(), rows["why"].tolist()


def test_part_of_the_logs_leaves_the_rest_unanswered(evidence, paper):
    runs = evidence.runs[(evidence.runs["arch"] == "transformer") & (evidence.runs["context_length"] == 2048)]
    few = Evidence(runs, evidence.config)
    chosen = [c for c in CLAIMS if c.function not in SLOW and c.topic in ("dataset", "isoflop", "pareto", "inference")]
    rows = build_ledger(chosen, few, FUNCTIONS).set_index("id")
    assert rows.loc["n-transformer-2048-3e19", "verdict"] == "reproduced"
    assert rows.loc["runs-transformer-isoflop-2048", "verdict"] == "reproduced"
    for name in ("runs-all", "n-xlstm-8192-3e19", "flop-ratio-8192-27", "prefill-rate-xlstm-7b"):
        assert rows.loc[name, "verdict"] == "not answerable" and rows.loc[name, "why"].startswith("missing: ")
    assert not rows["why"].str.contains("the answer failed").any()


def test_ledger_is_the_same_again(ledger, evidence):
    again = Evidence(evidence.runs.sample(frac=1, random_state=0), evidence.config, inference=evidence.inference)
    names = ["n-xlstm-8192-1e20", "exp-d-xlstm-8192-4pt", "slope-xlstm-22", "prefill-rate-xlstm-7b"]
    rows = build_ledger([c for c in CLAIMS if c.id in names], again, FUNCTIONS).set_index("id")
    pd.testing.assert_frame_equal(rows[["value", "low", "high"]], ledger.loc[rows.index, ["value", "low", "high"]])
