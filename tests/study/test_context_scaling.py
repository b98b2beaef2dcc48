"""Two contexts, the same token budget: the pairs that are compared, and what stands in for them."""

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.study.config import compose
from xlstm_scaling.study.context_scaling import (
    COLUMNS,
    at_context,
    compared_contexts,
    context_scaling_runs,
    context_table,
    extra_runs,
    published_context_table,
)
from xlstm_scaling.study.plan import PlanError, plan_runs


@pytest.fixture(scope="module")
def laptop():
    return compose(["study=laptop"])


@pytest.mark.parametrize("study", ["smoke", "laptop", "paper"])
def test_twins_differ_in_their_context_alone(study):
    config = compose([f"study={study}"])
    pairs = context_scaling_runs(config)
    assert {run.context_length for _, run in pairs} == set(compared_contexts(config))
    assert {run.arch for _, run in pairs} == set(config.study.architectures)
    for reference, run in pairs:
        assert run.num_tokens == reference.num_tokens
        assert run.batch_sequences * run.context_length == reference.batch_sequences * reference.context_length
        a, b = reference.identity(), run.identity()
        assert {name for name in a if a[name] != b[name]} <= {"context_length", "batch_sequences"}


def test_runs_of_the_study_serve_where_they_are_the_twins(laptop):
    plan = plan_runs(laptop)
    extra = extra_runs(context_scaling_runs(laptop), plan)
    # FLOPs per token of an xLSTM do not depend on the context: its IsoFLOP runs have the same tokens
    assert {run.arch for run in extra} == {"transformer"}
    assert not {run.run_id for run in extra} & {run.run_id for run in plan}


def test_contexts_and_sizes_may_be_named():
    config = compose(
        ["study=laptop", "study.context_scaling.context_lengths=[256,512,2048]", "study.context_scaling.sizes=[d24]"]
    )
    pairs = context_scaling_runs(config)
    assert {run.size for _, run in pairs} == {"d24"} and len(pairs) == 2 * 3
    with pytest.raises(PlanError, match="sizes: no IsoFLOP run to compare has the size d99"):
        context_scaling_runs(compose(["study=laptop", "study.context_scaling.sizes=[d99]"]))
    with pytest.raises(PlanError, match="two contexts"):
        compared_contexts(compose(["study=laptop", "study.context_scaling.context_lengths=[256]"]))


def test_a_context_longer_than_a_step_is_refused(laptop):
    run = plan_runs(laptop)[0]
    with pytest.raises(PlanError, match="holds no sequence"):
        at_context(run, 100 * run.batch_sequences * run.context_length)
    # tokens that do not divide are met to the nearest whole sequence and step
    odd = at_context(run, 3 * run.context_length // 2 + 1)
    assert abs(odd.num_tokens / run.num_tokens - 1) < 0.5 / odd.num_train_steps


def test_a_study_without_isoflop_runs_has_none():
    assert context_scaling_runs(compose(["study=single"])) == []


def as_rows(runs, losses):
    return pd.DataFrame(
        {
            **{name: [getattr(run, name) for run in runs] for name in ("run_id", "arch", "size", "context_length")},
            **{name: [getattr(run, name) for run in runs] for name in ("num_params", "num_tokens", "num_flops")},
            "experiment_set": "isoflop",
            "status": ["ok" if np.isfinite(loss) else "diverged" for loss in losses],
            "val_loss": losses,
        }
    )


def test_the_table_holds_differences_to_the_reference(laptop):
    pairs = context_scaling_runs(laptop)
    runs = list({run.run_id: run for _, run in pairs}.values())
    losses = [4.0 - 0.01 * k for k in range(len(runs) - 1)] + [np.nan]
    table = context_table(as_rows(runs, losses), pairs, [run.run_id for run in plan_runs(laptop)])
    assert list(table.columns) == list(COLUMNS) and len(table) == len(pairs)
    by_id = dict(zip([run.run_id for run in runs], losses))
    for row, (reference, run) in zip(table.itertuples(), pairs, strict=True):
        if np.isfinite(by_id[run.run_id]):
            assert row.status == "ok"
            assert row.loss_difference == pytest.approx(by_id[run.run_id] - by_id[reference.run_id])
        else:
            assert row.status == "no_loss" and run.run_id in row.detail
    assert set(table["source"]) == {"study", "extra"} and (table["tokens_ratio"] == 1).all()


def test_published_runs_stand_in_where_they_are_near(laptop):
    """Twins are planted: tokens 4 % apart, parameters equal; and one that is too far from all."""
    near = [(1e6, 2e7, 512, 3.5), (1e6, 2.08e7, 1024, 3.4), (4e6, 5e6, 512, 3.2), (4e6, 9e6, 1024, 3.1)]
    runs = pd.DataFrame(near, columns=["num_params", "num_tokens", "context_length", "val_loss"])
    runs = runs.assign(arch="xlstm", run_id=[f"r{k}" for k in range(4)], status="ok", experiment_set="isoflop")
    runs["num_flops"], runs["size"] = 6 * runs["num_params"] * runs["num_tokens"], None
    table = published_context_table(runs)
    assert table["run_id"].tolist() == ["r0", "r1"] and table["source"].tolist() == ["published", "stands in"]
    assert table["tokens_ratio"].tolist() == pytest.approx([1, 1.04])
    assert table["loss_difference"].tolist() == pytest.approx([0, -0.1])
    assert published_context_table(runs[runs["context_length"] == 512]).empty
