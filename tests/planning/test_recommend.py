"""The whole answer: limits honoured by the reported shape's own numbers, the ledger's optima, JSON, the command."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from planted_laws import BASE, RESAMPLES, SURFACES, make_tables, write_fits

from xlstm_scaling.accounting import ModelShape, count_flops, count_params, prefill_bytes, prefill_flops, step_bytes
from xlstm_scaling.accounting.hardware import DEVICES
from xlstm_scaling.accounting.memory import HEADROOM
from xlstm_scaling.accounting.serving import serving_memory
from xlstm_scaling.cli import run_command
from xlstm_scaling.planning.laws import laws_of_tables
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.recommend import EXIT_INFEASIBLE, recommend
from xlstm_scaling.planning.runtime import ROOFLINE_BANDWIDTH, ROOFLINE_COMPUTE, Roofline, load_runtime
from xlstm_scaling.planning.text import as_text
from xlstm_scaling.planning.training import TrainingSetup

H100 = Roofline(DEVICES["H100"])
CLAIMS = Path(__file__).resolve().parents[2] / "conf" / "claims" / "optimal.yaml"


def test_limits_are_kept_by_the_reported_shape(laws):
    """Recomputed from the shape alone."""
    question = Question(16384, flops=1e22, batch_size=4, max_ttft_s=0.3, max_step_time_s=0.003)
    answer = recommend(question, laws, H100)
    sheet = DEVICES["H100"]
    for arch, part in answer["architectures"].items():
        model, shape = part["choice"], ModelShape(**part["choice"]["shape"])
        assert shape.arch == arch and count_params(shape) == model["num_params"]
        compute = prefill_flops(shape, 16384, 4) / (ROOFLINE_COMPUTE * sheet.bf16_flops_per_s)
        transfer = prefill_bytes(shape, 16384, 4) / (ROOFLINE_BANDWIDTH * sheet.bytes_per_s)
        assert model["ttft_s"] == pytest.approx(max(compute, transfer)) and model["ttft_s"] <= 0.3
        step = step_bytes(shape, 16384, 4) / (ROOFLINE_BANDWIDTH * sheet.bytes_per_s)
        assert model["step_time_s"] == pytest.approx(step) and step <= 0.003
        memory = sum(serving_memory(shape, 16384, 1, 4).values())
        assert model["serving_memory_bytes"]["total"] == pytest.approx(memory) and memory <= HEADROOM * 80e9
        spent = count_flops(shape, 16384).forward_backward / 16384 * model["num_tokens"]["value"]
        assert spent == pytest.approx(1e22) and model["training_flops"]["value"] == pytest.approx(1e22)
        loss = 1.012 * SURFACES[arch].predict(model["num_params"], model["num_tokens"]["value"])
        assert model["loss"]["value"] == pytest.approx(float(loss), rel=1e-9)
        assert model["loss"]["lo"] < model["loss"]["value"] < model["loss"]["hi"]
        assert part["cost_of_limits"]["loss"] > 0 and part["cost_of_limits"]["flops_ratio"] > 1
        assert part["cost_of_limits"]["binding"]
    assert answer["limits"]["implied"] == ["serving_bytes"]


def test_the_cost_of_a_limit_is_what_a_smaller_budget_reaches_without_it(laws):
    limited = recommend(Question(BASE, flops=1e22, max_ttft_s=0.05), laws, H100)
    for arch, part in limited["architectures"].items():
        budget = part["cost_of_limits"]["flops_enough"]
        free = recommend(Question(BASE, flops=budget), laws)["architectures"][arch]
        assert free["choice"]["loss"]["value"] == pytest.approx(part["choice"]["loss"]["value"], rel=1e-9)
        assert part["cost_of_limits"]["flops_ratio"] == pytest.approx(1e22 / budget)


def test_a_built_model_is_as_good_as_the_laws_optimum(laws):
    """Widths and depths come in steps: that costs less than 0.01 nat, and no N* of the law is far."""
    for flops in (1e20, 1e21, 1e22):
        for part in recommend(Question(BASE, flops=flops), laws)["architectures"].values():
            assert part["choice"]["loss"]["value"] == pytest.approx(part["optimum"]["loss"]["value"], abs=0.01)
            optimum = part["optimum"]["num_params"]
            assert part["choice"]["num_params"] == pytest.approx(optimum["value"], rel=0.5)
            assert optimum["lo"] <= optimum["value"] <= optimum["hi"]


def test_flops_with_served_tokens_keep_the_loss_and_spend_less_in_all(laws):
    plain = recommend(Question(BASE, flops=1e21), laws)
    for served in (1e11, 1e13):
        answer = recommend(Question(BASE, flops=1e21, tokens_served=served), laws)
        best, before = (a["architectures"][a["best"]]["choice"] for a in (answer, plain))
        assert best["loss"]["value"] == pytest.approx(before["loss"]["value"], rel=1e-9)
        assert best["num_params"] < before["num_params"]
        assert best["training_flops"]["value"] > 1e21  # trained longer on purpose
        old = (
            answer["architectures"][plain["best"]]["choice"]["serving_flops"]
            / best["num_params"]
            * before["num_params"]
        )
        assert best["total_flops"]["value"] < 1e21 + old * 1.1
    none = recommend(Question(BASE, flops=1e21, tokens_served=0), laws)
    assert none["architectures"] == plain["architectures"]


def test_infeasible_limits_are_answered(laws):
    answer = recommend(Question(BASE, flops=1e21, max_ttft_s=1e-7), laws, H100)
    assert answer["status"] == "infeasible" and answer["best"] is None
    for arch, part in answer["architectures"].items():
        assert part["infeasible"]["binding"] == ["ttft_s"] and part["choice"] is None
        needed = part["infeasible"]["nearest"]["ttft_s"]["needed"]
        again = recommend(Question(BASE, flops=1e21, max_ttft_s=needed), laws, H100)
        assert again["architectures"][arch]["status"] == "ok"
    assert "would do" in as_text(answer)


@pytest.mark.parametrize(
    ("question", "binding"),
    [
        (Question(BASE, loss=1.0), "loss"),
        (Question(BASE, total_flops=1e18, tokens_served=1e15), "total_flops"),
        (Question(BASE, flops=1e15, num_tokens=1e12), "flops"),
    ],
)
def test_questions_without_an_answer_say_the_nearest(laws, question, binding):
    answer = recommend(question, laws)
    assert answer["status"] == "infeasible"
    for part in answer["architectures"].values():
        assert part["status"] == "impossible" and part["infeasible"]["binding"] == [binding]
        assert part["infeasible"]["nearest"][binding]["needed"] > getattr(question, binding)
        assert part["detail"] in as_text(answer)


def test_extrapolation_is_named_with_its_factor(laws):
    answer = recommend(Question(32768, flops=1e23), laws)
    for part in answer["architectures"].values():
        found = {entry["quantity"]: entry for entry in part["choice"]["extrapolation"]}
        assert found["num_flops"]["factor"] == pytest.approx(1e3) and found["context_length"]["factor"] == 2
        assert found["num_params"]["side"] == "above"
    inside = recommend(Question(BASE, flops=3e19), laws)["architectures"]["xlstm"]["choice"]
    assert inside["extrapolation"] == []


def test_an_architecture_that_cannot_be_counted_is_left_out_and_said(laws):
    mamba = replace(laws, archs={"mamba": replace(laws.archs["xlstm"], arch="mamba"), **laws.archs})
    answer = recommend(Question(BASE, flops=1e20), mamba)
    assert set(answer["architectures"]) == {"xlstm", "transformer"}
    assert any("mamba" in note for note in answer["notes"])
    with pytest.raises(ValueError, match="mamba"):
        recommend(Question(BASE, flops=1e20), replace(mamba, archs={"mamba": mamba.archs["mamba"]}))


def test_training_time_and_memory(laws):
    setup = TrainingSetup(DEVICES["H100"], 64, 0.5)
    part = recommend(Question(BASE, flops=1e21), laws, None, setup)["architectures"]["xlstm"]["choice"]["training"]
    assert part["time_s"] == pytest.approx(1e21 / (64 * 0.5 * 989.4e12))
    assert part["device_hours"] == pytest.approx(part["time_s"] * 64 / 3600)
    assert 0 < part["memory"]["device_bytes"] <= HEADROOM * 80e9
    assumed = recommend(Question(BASE, flops=1e21), laws, None, TrainingSetup(DEVICES["H100"], 64))
    assert "assumed" in assumed["architectures"]["xlstm"]["choice"]["training"]["speed"]


def test_the_answer_is_json_with_stable_keys(laws):
    answer = recommend(Question(BASE, flops=1e21, max_ttft_s=0.1), laws, H100, TrainingSetup(DEVICES["H100"], 8))
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert list(answer) == [
        *("question", "objective", "status", "best", "architectures", "comparison", "limits", "target", "sources"),
        "notes",
    ]
    part = answer["architectures"]["xlstm"]
    assert set(part) == {
        *("status", "detail", "law", "optimum", "isoflop_optimum", "choice", "without_limits", "infeasible"),
        "cost_of_limits",
    }
    assert set(part["choice"]) == {
        *("shape", "num_params", "num_tokens", "tokens_per_param", "loss", "loss_other_forms", "training_flops"),
        *("serving_flops", "total_flops", "ttft_s", "step_time_s", "serving_memory_bytes", "training", "extrapolation"),
    }
    assert set(answer["comparison"]) == {"of", "second", "probability_best", "paired_resamples", "advantage"}
    infeasible = recommend(Question(BASE, flops=1e21, max_ttft_s=1e-9), laws, H100)
    json.dumps(infeasible, allow_nan=False)
    assert set(infeasible) == set(answer)


def test_the_better_architecture_is_told_with_its_probability(laws):
    sure = recommend(Question(BASE, flops=1e19), laws)
    assert sure["best"] == "xlstm" and sure["comparison"]["probability_best"] == 1.0
    open_question = recommend(Question(BASE, flops=1e22), laws)  # the planted laws cross near there
    assert 0.2 < open_question["comparison"]["probability_best"] < 1.0
    assert open_question["comparison"]["advantage"]["lo"] < 0 < open_question["comparison"]["advantage"]["hi"]


def test_sizes_agree_with_the_papers_optimal_tables(paper):
    """FLOPs and tokens at which sizes are optimal, of the ledger's claims at context 8,192, from the paper's runs."""
    from xlstm_scaling.fitting.isoflop import fit_isoflop
    from xlstm_scaling.published.ingest import ingest
    from xlstm_scaling.study.config import compose, to_dict

    runs = ingest([paper / "runs.csv"]).runs
    runs = runs[runs["selected"] & (runs["status"] == "ok") & (runs["context_length"] == 8192)]
    settings = to_dict(compose([]).fitting)
    settings["num_resamples"], settings["isoflop"]["weight_column"] = RESAMPLES, "notebook_multiplicity"
    settings["power_law"]["flops_range"] = [5e18, 2e20]
    minima = dict(zip(("isoflop", "isoflop_resamples"), fit_isoflop(runs, settings)))
    laws = laws_of_tables(make_tables() | minima, settings, runs.assign(run_id="other"))
    checked, answers = 0, {}
    for group in yaml.safe_load(CLAIMS.read_text())["groups"]:
        for claim in group["claims"]:
            asked = claim["with"]
            if asked["context"] != 8192 or asked["max_flops"] != 2e20:
                continue
            size = asked["params"]
            answers[size] = answers.get(size) or recommend(Question(8192, num_params=size), laws)
            optimum = answers[size]["architectures"][asked["arch"]]["isoflop_optimum"]
            of = group["answer"]["compute_optimal"]["of"]
            value = {"flops": optimum["flops"], "tokens": optimum["num_tokens"]["value"]}
            value["tokens_per_param"] = value["tokens"] / asked["params"]
            allowed = claim.get("tolerance", {}).get("absolute", 0.0)
            assert value[of] == pytest.approx(claim["published"], rel=2e-3, abs=allowed), claim["id"]
            assert optimum["num_params"]["value"] == pytest.approx(asked["params"], rel=1e-9)
            checked += 1
    assert checked >= 20


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "fits"
    write_fits(folder)
    return folder


def ask(fits, *options: str) -> int:
    return run_command(["recommend", "--laws", str(fits), "--context-length", "8192", *options])


def test_command_prints_json_and_says_feasible(fits, capsys):
    options = ("--flops", "1e21", "--device", "h100", "--count", "64", "--utilisation", "0.4", "--max-ttft-s", "0.1")
    assert ask(fits, *options, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["best"] in SURFACES and answer["sources"]["runtime_assumed"] is True
    assert ask(fits, *options) == 0
    text = capsys.readouterr().out
    assert "xLSTM" in text and "assumed, not measured" in text and "paired resamples" in text


def test_command_exit_status_of_the_infeasible(fits, capsys):
    assert ask(fits, "--flops", "1e21", "--device", "h100", "--max-ttft-s", "1e-8") == EXIT_INFEASIBLE
    assert "would do" in capsys.readouterr().out
    assert ask(fits, "--loss", "1.2") == EXIT_INFEASIBLE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--flops", "1e21", "--device", "abacus"), "A100, H100, H200, B200, MI300X"),
        (("--flops", "1e21", "--max-ttft-s", "1"), "--device"),
        (("--flops", "1e21", "--loss", "2.5"), "one of"),
        (("--flops", "1e21", "--utilisation", "0.4"), "--device"),
        (("--flops", "1e21", "--device", "h100", "--utilisation", "40"), "share"),
        (("--flops", "1e21", "--subset", "isoflop"), "converged"),
        (("--flops", "1e21", "--runtime", "nowhere"), "runtime_model.parquet"),
    ],
)
def test_command_says_what_is_wrong(fits, capsys, options, message):
    assert ask(fits, *options) == 1
    assert message in capsys.readouterr().err


def test_command_without_laws_says_how_to_make_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(["recommend", "--flops", "1e21", "--context-length", "8192"]) == 1
    assert "make reproduce" in capsys.readouterr().err


def test_a_runtime_model_made_before_is_refused(tmp_path):
    pd.DataFrame({"arch": ["xlstm"], "status": ["ok"], "device": ["cpu"]}).to_parquet(
        tmp_path / "runtime_model.parquet"
    )
    with pytest.raises(ValueError, match="again"):
        load_runtime(tmp_path, None)
