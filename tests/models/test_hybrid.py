"""The hybrid: which blocks attend, that it is made of the other models' blocks, and what it refuses."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xlstm_scaling.accounting import architecture, count_flops, count_params, make_shape, shape_of_row
from xlstm_scaling.accounting.hybrid import attention_head_dim, is_attention
from xlstm_scaling.models import build_model
from xlstm_scaling.models.transformer import TransformerBlock
from xlstm_scaling.models.xlstm import XLSTMBlock
from xlstm_scaling.study.config import ConfigError, compose
from xlstm_scaling.study.plan import PlanError, plan_runs
from xlstm_scaling.study.run_spec import spec_of


@given(every=st.integers(2, 12), num_blocks=st.integers(1, 60))
def test_one_block_in_k_attends_and_never_the_first(every, num_blocks):
    attends = [is_attention(index, num_blocks, every) for index in range(num_blocks)]
    assert not attends[0]
    whole, left = divmod(num_blocks, every)
    assert sum(attends) == whole + (left > 1)
    assert all(attends[every - 1 :: every][:whole])
    assert all(sum(attends[i : i + every]) <= 1 for i in range(0, num_blocks, every))


@given(half=st.integers(1, 600))
def test_attention_heads_divide_the_mlstms(half):
    dim = attention_head_dim(2 * half)
    assert dim % 2 == 0 and (2 * half) % dim == 0 and dim <= 128
    assert not any((2 * half) % larger == 0 for larger in range(dim + 2, min(128, 2 * half) + 1, 2))


def test_the_model_has_the_blocks_that_are_counted():
    shape = make_shape("hybrid", 64, 6, 2, 50, attention_every=3)
    kinds = {"xlstm": XLSTMBlock, "transformer": TransformerBlock}
    names = [one.arch for one in architecture("hybrid").block_shapes(shape)]
    assert names == ["xlstm", "xlstm", "transformer"] * 2
    assert [type(block) for block in build_model(shape).blocks] == [kinds[name] for name in names]


def test_costs_lie_between_those_of_its_parts():
    """All counts but the feed-forward's width are those of the blocks; with equal heads they are exact sums."""
    sizes = (256, 8, 4, 500)
    xlstm, transformer, hybrid = (make_shape(arch, *sizes) for arch in ("xlstm", "transformer", "hybrid"))
    assert xlstm.ffn_dim == transformer.ffn_dim == hybrid.ffn_dim
    assert hybrid.attention_every == 4
    for count in (count_params, lambda shape: count_flops(shape, 512).forward):
        fixed = count(xlstm) - 8 * (count(xlstm) - count(make_shape("xlstm", 256, 7, 4, 500)))
        blocks = {s.arch: (count(s) - fixed) / 8 for s in (xlstm, transformer)}
        assert count(hybrid) == pytest.approx(fixed + 6 * blocks["xlstm"] + 2 * blocks["transformer"], rel=1e-12)


@torch.no_grad()
def test_it_is_its_blocks_one_after_the_other():
    """The same weights in an xLSTM's and a Transformer's blocks, composed by hand."""
    shape = make_shape("hybrid", 32, 2, 2, 61)
    model = build_model(shape, compute_dtype=torch.float64, seed=0).double()
    x = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    first, second = architecture("hybrid").block_shapes(shape)
    mlstm, attention = XLSTMBlock(first).double(), TransformerBlock(second).double()
    mlstm.load_state_dict(model.blocks[0].state_dict())
    attention.load_state_dict(model.blocks[1].state_dict())
    by_hand = attention(mlstm(model.embedding(x))[0])[0]
    torch.testing.assert_close(model(x), model.logits(model.norm(by_hand)), rtol=1e-12, atol=1e-12)


def test_options_reach_the_blocks_that_have_them():
    shape = make_shape("hybrid", 32, 2, 2, 61)
    model = build_model(shape, input_gate_bias=-3.0, rope_theta=1e4)
    assert model.blocks[0].mlstm.gates.bias[0] == -3.0
    assert model.blocks[1].attention.theta == 1e4
    with pytest.raises(TypeError, match="Hybrid has no option dropout"):
        build_model(shape, dropout=0.1)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("hybrid", {"attention_every": 1}, "attention_every must be at least 2, got 1: 1 is a Transformer"),
        ("hybrid", {"attention_evry": 3}, r"'hybrid' has not all of the shape options \['attention_evry'\]"),
        ("xlstm", {"attention_every": 3}, r"'xlstm' has not all of the shape options \['attention_every'\]"),
    ],
)
def test_wrong_shape_options_are_named(arch, options, message):
    with pytest.raises(ValueError, match=message):
        make_shape(arch, 32, 2, 2, 61, **options)


def test_shapes_survive_tables():
    import pandas as pd

    shapes = [make_shape("hybrid", 32, 4, 2, 61, attention_every=2), make_shape("transformer", 32, 2, 2, 61)]
    table = pd.DataFrame([shape.as_dict() for shape in shapes])
    assert table["attention_every"].isna().tolist() == [False, True]
    assert [shape_of_row(row) for _, row in table.iterrows()] == shapes
    assert "attention_every" not in shapes[1].as_dict()  # identities of runs are what they were


def test_a_study_takes_it_by_one_word():
    two = plan_runs(compose(["study=laptop"]))
    three = plan_runs(compose(["study=laptop", "architectures=[xlstm,transformer,hybrid]"]))
    names = {run.run_id for run in three}
    assert {run.run_id for run in two} < names and len(three) == 3 * len(two) // 2
    hybrid = [run for run in three if run.arch == "hybrid"]
    assert all(run.shape["attention_every"] == 4 and spec_of(asdict(run)) == run for run in hybrid)
    assert {run.model_options["rope_theta"] for run in hybrid} == {5e5}
    other = plan_runs(
        compose(["study=laptop", "architectures=[hybrid]", "study.shape_options.hybrid.attention_every=2"])
    )
    assert not {run.run_id for run in other} & names


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(PlanError, match="unknown architecture 'mamba'; known: xlstm, transformer, hybrid"):
        plan_runs(compose(["study=smoke", "architectures=[xlstm,mamba]"]))
    with pytest.raises((ConfigError, PlanError), match="shape options"):
        plan_runs(compose(["study=smoke", "architectures=[hybrid]", "+study.shape_options.hybrid.heads=2"]))
