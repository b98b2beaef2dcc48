"""The claims ledger on planted tables: verdicts, faults, missing data, and what its files may hold."""

import copy

import numpy as np
import pandas as pd
import pytest
import yaml

from xlstm_scaling.cli import run_command
from xlstm_scaling.published.claims.answers import FUNCTIONS
from xlstm_scaling.published.claims.evidence import Evidence
from xlstm_scaling.published.claims.ledger import (
    COLUMNS,
    Answer,
    Claim,
    ClaimError,
    NotAnswerable,
    Verdict,
    build_ledger,
    judge,
    load_claims,
    parse_claims,
    select_claims,
)
from xlstm_scaling.published.claims.page import html_page, markdown_page, summary_counts
from xlstm_scaling.study.config import conf_dir

NAN = float("nan")
BUDGETS = (6e18, 1e19, 3e19)


def optimum(arch, budget):
    """Planted N*(H) = c H^0.5."""
    return (0.06 if arch == "xlstm" else 0.05) * budget**0.5


@pytest.fixture(scope="module")
def config():
    settings = yaml.safe_load((conf_dir() / "fitting" / "default.yaml").read_text())
    return settings | {"num_resamples": 60}


@pytest.fixture(scope="module")
def runs():
    """Parabolas with known minima at context 8,192; one xLSTM run is counted twice and lies off its parabola."""
    rows = []
    for arch in ("xlstm", "transformer"):
        for budget in BUDGETS:
            for k, x in enumerate(np.linspace(-0.4, 0.4, 9)):
                size = optimum(arch, budget) * 10**x
                rows.append(
                    {"arch": arch, "isoflop_tag": budget, "ratio_tag": NAN, "experiment_set": "isoflop",
                     "num_params": size, "num_flops": budget, "num_tokens": budget / (6 * size),
                     "val_loss": 3.0 - 0.1 * np.log10(budget / 6e18) + 0.8 * x * x,
                     "notebook_multiplicity": 2 if (arch, budget, k) == ("xlstm", 3e19, 0) else 1}
                )  # fmt: skip
                if (arch, budget, k) == ("xlstm", 3e19, 0):
                    rows[-1]["val_loss"] += 0.05
        for ratio, slope in ((22.0, -0.05), (220.0, -0.05)):
            for flops in np.geomspace(1e19, 1e22, 6):
                size = (flops / (6 * ratio)) ** 0.5
                noise = 1 + 1e-3 * np.sin(flops / 1e19)
                rows.append(
                    {"arch": arch, "isoflop_tag": NAN, "ratio_tag": ratio, "experiment_set": "tokenparam",
                     "num_params": size, "num_flops": flops, "num_tokens": ratio * size,
                     "val_loss": 30 * flops**slope * noise, "notebook_multiplicity": 1}
                )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(
        run_id=[f"r{i}" for i in range(len(table))], status="ok", context_length=8192, selected=True,
        tokens_per_param=table.num_tokens / table.num_params,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evidence(runs, config):
    return Evidence(runs, config)


def a_claim(function, published, arguments=None, **changes):
    fields = {
        "id": "c", "topic": "t", "statement": "s", "published": published, "unit": "1", "source": "here",
        "relative": 1e-6, "absolute": 0.0, "reason": "exact", "function": function, "arguments": arguments or {},
    }  # fmt: skip
    return Claim(**(fields | changes))


def answered(evidence, *claims):
    return build_ledger(claims, evidence, FUNCTIONS).set_index("id")


def group(**changes):
    base = {
        "statement": "runs of {arch}", "unit": "runs", "source": "here", "answer": {"run_count": {}},
        "tolerance": {"absolute": 0, "reason": "a count"},
        "claims": [{"id": "one", "published": 3, "with": {"arch": "xlstm"}}],
    }  # fmt: skip
    return {"topic": "t", "title": "T", "groups": [base | changes]}


MINIMUM = {"arch": "transformer", "context": 8192, "budget": 1e19, "of": "num_params"}


def test_planted_minimum_is_reproduced_and_a_wrong_number_is_not(evidence):
    right = optimum("transformer", 1e19)
    table = answered(
        evidence,
        a_claim("isoflop_minimum", right, MINIMUM, id="right"),
        a_claim("isoflop_minimum", 1.2 * right, MINIMUM, id="wrong", explain="Because."),
        a_claim("isoflop_minimum", 3 - 0.1 * np.log10(1e19 / 6e18), MINIMUM | {"of": "loss"}, id="loss"),
    )
    assert table["verdict"].tolist() == ["reproduced", "not reproduced", "reproduced"]
    assert table.loc["right", "n_runs"] == 9 and table.loc["wrong", "why"].startswith("Because.")
    assert np.isnan(table.loc["right", "value_without_duplicates"])


def test_the_answer_without_duplicates_is_beside_it(evidence):
    keys = {"arch": "xlstm", "context": 8192, "budget": 3e19, "of": "num_params"}
    row = answered(evidence, a_claim("isoflop_minimum", 1.0, keys)).loc["c"]
    assert row["value"] != row["value_without_duplicates"]
    assert row["value"] > row["value_without_duplicates"] > optimum("xlstm", 3e19)  # the odd run pulls once, or twice


def test_exponents_and_optimal_tables(evidence):
    law = {
        "arch": "transformer",
        "context": 8192,
        "of": "num_params",
        "min_flops": 5e18,
        "max_flops": 5e19,
        "points": 3,
    }
    table = {"arch": "transformer", "context": 8192, "params": 5e8, "max_flops": 5e19, "points": 3}
    rows = answered(
        evidence,
        a_claim("power_law", 0.5, law | {"what": "exponent"}, id="exponent"),
        a_claim("power_law", 0.05, law | {"what": "coefficient"}, id="coefficient", relative=1e-5),
        a_claim("compute_optimal", (5e8 / 0.05) ** 2, table | {"of": "flops"}, id="flops", relative=1e-5),
        a_claim("compute_optimal", 5e8 / 0.05**2 / 6, table | {"of": "tokens"}, id="tokens", relative=1e-4),
        a_claim("power_law", 0.5, law | {"what": "exponent", "points": 4}, id="short"),
    )
    assert rows["verdict"].tolist() == ["reproduced"] * 4 + ["not answerable"]
    assert "1 of the 4 minima" in rows.loc["short", "why"]
    assert rows.loc["flops", "low"] <= rows.loc["flops", "value"] <= rows.loc["flops", "high"]


def test_inequalities_need_the_whole_interval():
    claim = a_claim("f", 1.0, relation="above")
    assert judge(claim, Answer(1.5, 1.2, 1.8)) is Verdict.REPRODUCED
    assert judge(claim, Answer(1.5, 0.9, 1.8)) is Verdict.WITHIN
    assert judge(claim, Answer(0.8, 0.7, 0.9)) is Verdict.NOT_REPRODUCED
    assert judge(claim, Answer(1.5)) is Verdict.REPRODUCED
    assert judge(a_claim("f", 1.0, relation="below"), Answer(0.8, 0.7, 0.9)) is Verdict.REPRODUCED
    assert judge(a_claim("f", 0.0, relation="below"), Answer(0.1)) is Verdict.NOT_REPRODUCED


def test_verdicts_of_equalities_and_faults():
    claim = a_claim("f", 2.0, absolute=0.1)
    assert judge(claim, Answer(2.05, 1.0, 3.0)) is Verdict.REPRODUCED
    assert judge(claim, Answer(2.5, 1.0, 3.0)) is Verdict.WITHIN
    assert judge(claim, Answer(2.5)) is Verdict.NOT_REPRODUCED
    fault = a_claim("f", 2.0, fault="why")
    assert judge(fault, Answer(2.0, right=3.0)) is Verdict.FAULT
    assert judge(fault, Answer(2.1, 1.0, 3.0)) is Verdict.NOT_REPRODUCED
    assert judge(fault, Answer(NAN, demonstrated=True)) is Verdict.FAULT
    assert judge(fault, Answer(2.0, demonstrated=False)) is Verdict.NOT_REPRODUCED


def test_general_claims(evidence):
    ratio = optimum("xlstm", 1e19) / optimum("transformer", 1e19)
    rows = answered(
        evidence,
        a_claim("model_size_ratio", ratio, {"context": 8192, "budget": 1e19}, id="size"),
        a_claim("flop_ratio", 1.0, {"context": 8192, "loss": 2.8}, id="flops", absolute=0.05),
        a_claim("overtraining_slope", 0.05, {"arch": "xlstm", "ratio": 22.0}, id="slope", absolute=1e-3),
        a_claim(
            "slope_difference", 0.0, {"arch": "xlstm", "ratio": 22.0, "other": 220.0}, id="parallel", absolute=1e-3
        ),
    )
    assert (rows["verdict"] == "reproduced").all()


def test_a_variance_called_standard_error(evidence, runs):
    cell = runs[(runs.arch == "xlstm") & (runs.ratio_tag == 22)]
    covariance = np.polyfit(np.log(cell.num_flops), np.log(cell.val_loss), 1, cov=True)[1]
    keys = {"arch": "xlstm", "ratio": 22.0}
    row = answered(evidence, a_claim("overtraining_slope_variance", covariance[0, 0], keys, fault="A variance.")).loc[
        "c"
    ]
    assert row["verdict"] == "authors' error" and row["why"].startswith("A variance.")
    assert row["right_value"] == pytest.approx(covariance[0, 0] ** 0.5)


def test_errors_by_broadcasting(evidence, runs):
    at = [3.0, 3.5, 0.0, 0.13, 0.17, 1.0]
    cell = runs[(runs.arch == "xlstm") & (runs.experiment_set == "tokenparam")]
    predicted = 1 + np.exp(3.0) / cell.num_params**0.13 + np.exp(3.5) / cell.num_tokens**0.17
    y, wrong = cell.val_loss.to_numpy(), cell.val_loss.to_numpy() - predicted.to_numpy()[:, None]
    keys = {"arch": "xlstm", "at": at, "broadcast": True}
    r2 = 1 - (wrong**2).sum() / ((y - y.mean()) ** 2).sum()
    rows = answered(
        evidence,
        a_claim("surface_quality", (wrong**2).mean(), keys | {"of": "mse"}, id="mse", fault="Broadcast."),
        a_claim("surface_quality", r2, keys | {"of": "r2"}, id="r2", fault="Broadcast."),
    )
    assert (rows["verdict"] == "authors' error").all()
    assert rows.loc["mse", "right_value"] == pytest.approx(((y - predicted) ** 2).mean())
    assert rows.loc["r2", "right_value"] > rows.loc["r2", "value"]


def test_loss_surfaces_of_the_same_runs_are_taken_over(runs, config):
    cell = runs[(runs.arch == "xlstm") & (runs.experiment_set == "tokenparam")]
    keys = {"arch": "xlstm", "context_length": 8192, "subset": "tokenparam", "form": "gamma_fixed"}
    row = keys | {"huber_delta": 1e-3, "status": "converged", "objective": 0.25, "exponent_params": 0.4}
    row |= {"A": 1.0, "B": 1.0, "E": 1.0, "alpha": 0.3, "beta": 0.2, "gamma": 1.0, "exponent_tokens": 0.6}
    fits = {"surface": pd.DataFrame([row]), "surface_predictions": cell[["run_id", "val_loss"]].assign(**keys)}
    claim = a_claim("surface_parameter", 0.25, {"arch": "xlstm", "form": "gamma_fixed", "of": "objective"})
    assert answered(Evidence(runs, config, fits=fits), claim).loc["c", "verdict"] == "reproduced"
    fits["surface_predictions"] = fits["surface_predictions"].iloc[1:]  # other runs: fitted again
    assert answered(Evidence(runs, config, fits=fits), claim).loc["c", "value"] != 0.25


@pytest.fixture(scope="module")
def measurements():
    """TTFT = FLOPs / 1e14 + 2 ms; an mLSTM's step time depends on the batch only."""
    from xlstm_scaling.accounting import ModelShape, prefill_flops

    rows = []
    for family, arch in (("xlstm", "xlstm"), ("llama2", "transformer")):
        qk, chunk = (64, 64) if arch == "xlstm" else (128, None)
        shape = ModelShape(arch, 512, 4, 4, qk, 128, 1408, 1000, chunk)
        for batch in (1, 4, 16):
            for length in (0, 128, 512, 2048):
                ttft = float(prefill_flops(shape, max(length, 1), batch)) / 1e14 + 2e-3
                step = 1e-3 + 1e-5 * batch + (0 if arch == "xlstm" else 1e-7 * length)
                rows.append(
                    {"model_type": family, "model_tag": f"{family}_1b", "batch_size": batch, "ttft_s": ttft,
                     "prefill_length_tokens": length, "step_time_s": step, "num_heads": 4, "embedding_dim": 512,
                     "num_blocks": 4, "ffn_dim": 1408, "vocab_size": 1000, "qk_dim_factor": 0.5, "chunk_size": 64,
                     "ttft_raw_pickle_s": ttft / (0.5 if (arch, length) == ("transformer", 2048) else 1.0)}
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_inference(runs, config, measurements):
    evidence = Evidence(runs, config, inference=measurements)
    rate = {"arch": "transformer", "size": "1b", "per_sequence": 0.0}
    flat = {"arch": "xlstm", "size": "1b", "of": "step_time_s", "prefill": 2048, "base": 0}
    rows = answered(
        evidence,
        a_claim("prefill_rate", 1e14, rate, id="rate"),
        a_claim("time_growth", 1.0, flat, id="flat"),
        a_claim("time_growth", 1.0, flat | {"arch": "transformer"}, id="grows", relation="above"),
        a_claim("ttft_disagreement", 3, {"of": "count"}, id="count", fault="Other times."),
        a_claim("ttft_disagreement", 0.5, {"of": "min"}, id="least"),
        a_claim("step_time_bandwidth", -1e13, {"size": "1b", "beta": -1e13}, id="bandwidth", fault="Negative."),
        a_claim("time_ratio", 1.0, {"size": "1b", "prefill": 2048, "of": "step_time_s"}, id="ratio", relation="below"),
        a_claim("ttft_disagreement", 0.5, {"of": "llama3"}, id="llama3"),
        a_claim("prefill_rate", 1e14, rate | {"size": "7b"}, id="absent"),
    )
    want = (
        ["reproduced"] * 3 + ["authors' error", "reproduced", "authors' error", "reproduced"] + ["not answerable"] * 2
    )
    assert rows["verdict"].tolist() == want, rows["why"].tolist()
    assert "rank 2" in rows.loc["bandwidth", "why"].lower() and "Llama-3" in rows.loc["llama3", "why"]


def test_missing_data_stop_nothing(runs, config):
    few = Evidence(runs[runs.arch == "xlstm"].drop(columns="notebook_multiplicity"), config)
    rows = answered(
        few,
        a_claim("run_count", 640, id="all"),
        a_claim("isoflop_minimum", 1.0, MINIMUM, id="multiplicity"),
        a_claim("isoflop_minimum", 1.0, MINIMUM | {"duplicates": False}, id="arch"),
        a_claim("prefill_rate", 1.0, {"arch": "xlstm", "size": "7b", "per_sequence": 0.0}, id="inference"),
        a_claim("envelope_law", 1.0, {"arch": "xlstm", "of": "num_params", "what": "exponent"}, id="curves"),
        a_claim("flop_ratio", 1.0, {"context": 8192, "loss": 2.8}, id="pair"),
        a_claim(
            "isoflop_minimum", optimum("xlstm", 1e19), MINIMUM | {"arch": "xlstm", "duplicates": False}, id="there"
        ),
    )
    assert rows["verdict"].tolist() == ["not answerable"] * 6 + ["reproduced"]
    for name, word in {"all": "transformer isoflop at context 2048", "multiplicity": "notebook_multiplicity"}.items():
        assert word in rows.loc[name, "why"]
    assert "--inference-table" in rows.loc["inference", "why"] and "--curves" in rows.loc["curves", "why"]


def test_envelopes_need_the_curves_of_their_architecture(runs, config):
    cell = runs[(runs.arch == "transformer") & (runs.experiment_set == "isoflop")]
    points = [
        {"run_id": row.run_id, "arch": row.arch, "context_length": 8192, "num_params": row.num_params,
         "flops": share * row.num_flops, "tokens": share * row.num_tokens, "val_loss": row.val_loss + 0.2 * (1 - share)}
        for row in cell.itertuples() for share in (0.25, 0.5, 1.0)
    ]  # fmt: skip
    with_curves = Evidence(runs, config, curves=pd.DataFrame(points))
    keys = {"arch": "transformer", "of": "num_params"}
    rows = answered(
        with_curves,
        a_claim("hull_law", 0.5, keys, id="hull", absolute=0.3),  # early points of the curves lie on it too
        a_claim("envelope_law", 0.5, keys | {"what": "exponent"}, id="envelope", absolute=0.2),
        a_claim("hull_law", 0.5, keys | {"arch": "xlstm"}, id="absent"),
        a_claim("envelope_law", 0.5, keys | {"what": "exponent", "arch": "xlstm"}, id="absent-too"),
    )
    assert rows["verdict"].tolist() == ["reproduced"] * 2 + ["not answerable"] * 2, rows["why"].tolist()
    assert rows["why"].iloc[2:].str.contains("training curves of xlstm").all()


def test_an_answer_that_fails_stops_nothing(evidence):
    def broken(evidence):
        raise ZeroDivisionError("division")

    def empty(evidence):
        raise NotAnswerable("everything")

    functions = {"broken": broken, "empty": empty, "nan": lambda evidence: Answer(NAN)}
    claims = [a_claim(name, 1.0, id=name) for name in functions]
    table = build_ledger(claims, evidence, functions, "run").set_index("id")
    assert (table["verdict"] == "not answerable").all() and "ZeroDivisionError" in table.loc["broken", "why"]
    assert table.loc["empty", "command"] == "run --only empty"
    assert ["id", *table.columns] == list(COLUMNS)


def test_files_are_read_with_shared_keys():
    topic, title, (claim,) = parse_claims(group(), "a.yaml", FUNCTIONS)
    assert (topic, title, claim.statement, claim.published) == ("t", "T", "runs of xLSTM", 3.0)
    own = [{"id": "two", "published": 4, "unit": "models", "statement": "s", "relation": "above"}]
    (claim,) = parse_claims(group(claims=own), "a.yaml", FUNCTIONS)[2]
    assert (claim.unit, claim.relation, claim.tolerance, dict(claim.arguments)) == ("models", "above", 0.0, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "unknown key colour"),
        ({"unit": 3}, "unit must be a text"),
        ({"tolerance": {"absolute": 0}}, "reason must be a text"),
        ({"tolerance": {"reason": "none"}}, "needs relative or absolute"),
        ({"tolerance": {"relative": -1, "reason": "none"}}, "not negative"),
        ({"tolerance": {"relative": "1e-5", "reason": "r"}}, "relative must be a finite number"),
        ({"answer": {"nothing": {}}}, "there is no answer 'nothing'"),
        ({"answer": {"run_count": {"planet": "Mars"}}}, "no argument 'planet'"),
        ({"answer": {"run_count": {"context": "2048"}}}, "context of run_count must be a int"),
        ({"answer": {"isoflop_minimum": {"of": "loss", "context": 2, "budget": "6e18"}}}, "write 6.0e\\+18"),
        ({"answer": {"isoflop_minimum": {"of": "loss"}}}, "needs the argument 'context'"),
        ({"answer": "run_count"}, "one function with its arguments"),
        ({"relation": "near"}, "relation must be one of"),
        ({"claims": [{"id": "one", "published": "6e18", "statement": "s"}]}, "write 6.0e\\+18"),
        ({"claims": [{"id": "one", "published": True, "statement": "s"}]}, "published must be a finite number"),
        ({"claims": [{"published": 1}]}, "id must be a text"),
        ({"claims": []}, "claims must be a list"),
        ({"claims": [{"id": "one", "published": 1}]}, "the statement names 'arch'"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(changes, message):
    with pytest.raises(ClaimError, match=message) as caught:
        parse_claims(group(**changes), "a.yaml", FUNCTIONS)
    assert "a.yaml, group 1" in str(caught.value)


def test_ids_are_unique_and_files_are_there(tmp_path):
    with pytest.raises(ClaimError, match="no claims"):
        load_claims(tmp_path, FUNCTIONS)
    content = group()
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(copy.deepcopy(content) | {"topic": "u"}))
    with pytest.raises(ClaimError, match="two claims have the id 'one'"):
        load_claims(tmp_path, FUNCTIONS)
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(ClaimError, match=r"b\.yaml is not valid YAML"):
        load_claims(tmp_path, FUNCTIONS)


def test_names_choose_claims_or_topics():
    claims = [a_claim("f", 1.0, id="a"), a_claim("f", 1.0, id="b", topic="u")]
    assert [claim.id for claim in select_claims(claims, ["u"])] == ["b"]
    assert select_claims(claims, None) == claims
    with pytest.raises(ClaimError, match="no claim and no topic x"):
        select_claims(claims, ["x"])


def test_pages_hold_every_claim_and_escape(evidence):
    claims = [
        a_claim("run_count", 3, {"arch": "xlstm", "context": 8192}, id="one", statement="a < b | c", fault="x & y"),
        a_claim("isoflop_minimum", optimum("transformer", 1e19), MINIMUM, id="two"),
    ]
    table = build_ledger(claims, evidence, FUNCTIONS)
    page, text = html_page(table, {"t": "Title"}), markdown_page(table, {"t": "Title"})
    assert "a &lt; b | c" in page and '<h2 id="t">Title</h2>' in page and "http" not in page
    assert "a < b \\| c" in text and "`two`" in text and "## Title" in text
    assert summary_counts(table).loc["all", "claims"] == 2


def test_the_command_writes_all_files(runs, tmp_path, capsys):
    runs.to_parquet(tmp_path / "runs.parquet")
    files = tmp_path / "claims"
    files.mkdir()
    content = group(claims=[{"id": "one", "published": 39, "with": {"arch": "xlstm", "context": 8192}}])
    (files / "a.yaml").write_text(yaml.safe_dump(content))
    command = ["claims", "--runs", str(tmp_path / "runs.parquet"), "--out", str(tmp_path / "out"), "--quiet"]
    assert run_command([*command, "--claims", str(files), "--resamples", "20"]) == 0
    table = pd.read_parquet(tmp_path / "out" / "claims.parquet")
    assert list(table.columns) == list(COLUMNS) and table.loc[0, "verdict"] == "reproduced"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"claims.{e}" for e in ("parquet", "csv", "md", "html")
    }
    assert "reproduced" in capsys.readouterr().out
    assert run_command([*command, "--claims", str(files), "--only", "nothing"]) == 1
    assert "no claim and no topic" in capsys.readouterr().err
