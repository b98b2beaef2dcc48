"""The planner: runs cost their budgets, the paper's grid is the paper's, identities say what matters and no more."""

import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_scaling.accounting import training_flops
from xlstm_scaling.study.config import compose
from xlstm_scaling.study.plan import PlanError, Planner, nearest_ratio, plan_runs, plan_table, plan_warnings
from xlstm_scaling.study.run_spec import RunSpec


@pytest.fixture(scope="module")
def laptop():
    return compose(["study=laptop"])


@pytest.fixture(scope="module")
def laptop_runs(laptop):
    return plan_runs(laptop)


def test_laptop_is_the_study_it_should_be(laptop, laptop_runs):
    iso = [r for r in laptop_runs if r.experiment_set == "isoflop"]
    ratio = [r for r in laptop_runs if r.experiment_set == "tokenparam"]
    for arch in ("xlstm", "transformer"):
        cells = {}
        for run in iso:
            if run.arch == arch:
                cells.setdefault((run.context_length, run.isoflop_tag), set()).add(run.num_params)
        base = [sizes for (context, _), sizes in cells.items() if context == laptop.study.base_context]
        assert len(base) >= 3
        assert all(len(sizes) >= 5 for sizes in cells.values())
        assert len({context for context, _ in cells}) >= 3
        mine = [r for r in ratio if r.arch == arch]
        assert len({r.size for r in mine}) >= 3
        assert len({r.ratio_tag for r in mine}) >= 3


def test_runs_cost_their_budget(laptop_runs):
    for run in laptop_runs:
        assert run.num_flops == training_flops(
            run.model_shape, run.context_length, run.batch_sequences, run.num_train_steps
        )
        if run.isoflop_tag:
            half_a_step = run.flops_per_step / 2 / run.isoflop_tag
            assert abs(run.num_flops / run.isoflop_tag - 1) <= half_a_step + 1e-12
        else:
            half_a_step = 0.5 / run.num_train_steps
            assert run.num_tokens / run.num_params == pytest.approx(run.ratio_tag, rel=1.01 * half_a_step)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e9, 1e15), st.floats(1e6, 1e11))
def test_steps_round_trip(laptop, budget, per_step):
    planner = Planner(laptop)
    if budget / per_step < planner.training.min_steps:
        with pytest.raises(PlanError, match=r"fewer than training\.min_steps"):
            planner.steps_for("x", per_step, budget)
    else:
        steps = planner.steps_for("x", per_step, budget)
        assert abs(steps * per_step - budget) <= per_step / 2 * (1 + 1e-9)


def test_the_papers_grid(paper):
    config = compose(["study=paper"])
    plan = plan_table(plan_runs(config), config, None)
    assert len(plan) == 640
    assert plan.run_id.is_unique
    runs = pd.read_csv(paper / "runs.csv")
    runs = runs[runs.in_paper_640].assign(arch=lambda t: t.arch.replace("llama", "transformer"))
    keys = ["experiment_set", "arch", "context_length", "isoflop_tag", "num_params", "num_tokens"]
    runs["isoflop_tag"] = runs.isoflop_tag.astype(float)
    ours, theirs = (t.sort_values(keys).reset_index(drop=True) for t in (plan, runs))
    for key in keys[:-1]:
        assert np.array_equal(ours[key].fillna(0), theirs[key].fillna(0)), key
    assert (ours.num_tokens / theirs.num_tokens - 1).abs().max() < 0.08
    assert (ours.global_batch_size_sequences == theirs.global_batch_size_sequences).all()
    assert ours.num_flops.sum() == pytest.approx(3.13e23, rel=5e-3)
    ratios = ours[ours.experiment_set == "tokenparam"]
    assert (ratios.num_tokens == theirs.loc[ratios.index, "num_tokens"]).all()


def test_paper_sizes_without_the_published_table():
    """What the paper's abstract says of its grid."""
    config = compose(["study=paper"])
    plan = plan_table(plan_runs(config), config, None)
    assert len(plan) == 640
    assert (plan.arch == "transformer").sum() == 292
    assert 80e6 < plan.num_params.min() < 85e6
    assert 6.8e9 < plan.num_params.max() < 7e9
    assert plan.num_tokens.max() == pytest.approx(2.1e12, rel=0.01)


def test_identity_is_what_determines_the_loss(laptop_runs):
    run = laptop_runs[0]
    same = replace(run, experiment_set="other", isoflop_tag=None, size="renamed", tokens_id="elsewhere")
    assert same.run_id == run.run_id
    for change in (
        {"seed": 1}, {"learning_rate": 0.5}, {"compute_dtype": "float64"}, {"warmup_steps": 1}, {"tokens": {}},
        {"model_options": {}}, {"num_train_steps": 7}, {"optimizer": {}},
    ):  # fmt: skip
        assert replace(run, **change).run_id != run.run_id, change
    assert RunSpec(**asdict(run)) == run


def ids(*overrides):
    return {r.run_id: r for r in plan_runs(compose(["study=laptop", "training.compute_dtype=float32", *overrides]))}


def test_a_learning_rate_of_one_size_changes_those_runs_alone():
    before, after = ids(), ids("study.sizes.d40.learning_rate=0.004")
    changed = set(before) - set(after)
    assert changed == {name for name, run in before.items() if run.size == "d40"}
    assert len(after) == len(before)


def test_where_runs_run_changes_no_identity():
    assert ids() == ids("hardware.threads_per_run=2", "hardware.checkpoint_interval_s=1", "study.name=other")


def test_identity_is_stable_between_processes():
    import subprocess
    import sys

    code = (
        "from xlstm_scaling.study.config import compose; from xlstm_scaling.study.plan import plan_runs;"
        "print(' '.join(r.run_id for r in plan_runs(compose(['training.compute_dtype=float32']))))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == list(ids())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["study.isoflop.c256_h150g.budget_flops=1e6"], "pays 0.* steps .* raise the budget"),
        (["study.isoflop.c256_h150g.sizes=[d16,d20,d24]"], "has 3 sizes; a parabola needs at least"),
        (["study.isoflop.c256_h150g.sizes=[d16,d20,d24,d1]"], "'d1' is not in study.sizes; known: d16"),
        (["study.architectures=[mamba]"], "unknown architecture .mamba.; known: xlstm, transformer, hybrid"),
        (["study.architectures=[]"], "study.architectures is empty"),
        (["study.sizes.d16.num_heads=3"], "not divisible"),
        (["training.compute_dtype=int8"], "not one of auto, bfloat16, float32"),
    ],
)
def test_plans_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_runs(compose(["study=laptop", *overrides]))


def test_repeated_data_is_warned_of_and_then_refused(laptop, laptop_runs):
    most = max(run.num_tokens for run in laptop_runs)
    few = plan_table(laptop_runs, laptop, most / 2)
    assert few.epochs.max() == pytest.approx(2.0)
    assert plan_warnings(few, laptop) == []
    assert (
        "repeat the corpus more than 4 times (most: 5.0)"
        in plan_warnings(plan_table(laptop_runs, laptop, most / 5), laptop)[0]
    )
    with pytest.raises(PlanError, match="corpus too small for the plan"):
        plan_warnings(plan_table(laptop_runs, laptop, most / 20), laptop)


def test_no_run_of_the_laptop_study_repeats_its_corpus_often(laptop, laptop_runs):
    sotu_tokens = 4.0e6
    assert max(run.num_tokens for run in laptop_runs) / sotu_tokens <= 4


@given(st.floats(20, 2500))
def test_ratio_labels(ratio):
    label = nearest_ratio(ratio)
    if label is None:
        assert all(abs(ratio / r - 1) > 0.1 for r in (22, 44, 110, 220, 550, 1100, 2200))
    else:
        assert math.isclose(label, ratio, rel_tol=0.23)
