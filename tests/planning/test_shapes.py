"""Shapes that are proposed can be built, and look like those that were trained."""

import itertools

import numpy as np
import pandas as pd
import pytest

from xlstm_scaling.accounting import count_params, prefill_flops, step_flops
from xlstm_scaling.accounting.serving import request_flops, served_token_flops, serving_memory, state_bytes
from xlstm_scaling.planning.choose import Candidates
from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.runtime import Load
from xlstm_scaling.planning.shapes import ShapeFamily, buildable_shapes, family_of_runs

ARCHS = ("xlstm", "transformer")


@pytest.mark.parametrize("arch", ARCHS)
def test_shapes_are_what_kernels_like(arch):
    shapes = buildable_shapes(ShapeFamily(arch), 1e7, 1e12)
    for shape in shapes:
        assert shape.num_heads * shape.head_dim_v == shape.embedding_dim
        assert shape.embedding_dim % 64 == 0 and shape.ffn_dim % 64 == 0
        assert shape.head_dim_v in (64, 128, 256) and shape.head_dim_qk >= 32
        assert 1e7 <= count_params(shape) <= 1e12


@pytest.mark.parametrize("arch", ARCHS)
def test_sizes_leave_no_wide_gaps_where_laws_are_fitted(arch):
    sizes = np.sort([count_params(shape) for shape in buildable_shapes(ShapeFamily(arch), 1e8, 1e11)])
    assert (sizes[1:] / sizes[:-1]).max() < 1.25


@pytest.mark.parametrize("arch", ARCHS)
def test_the_papers_grid_gives_the_papers_shapes(arch, paper):
    runs = pd.read_csv(paper / "runs.csv").replace({"arch": {"llama": "transformer", "mlstm": "xlstm"}})
    family = family_of_runs(arch, runs)
    shapes = {(s.embedding_dim, s.num_blocks, s.num_heads) for s in buildable_shapes(family, 5e7, 1e10)}
    swept = runs[(runs["arch"] == arch) & (runs["experiment_set"] == "isoflop")]
    trained = set(zip(swept["embedding_dim"], swept["num_blocks"], swept["num_heads"]))
    for width, blocks, heads in trained:
        same = {depth for d, depth, h in shapes if (d, h) == (width, heads)}
        assert same, (width, heads)
        assert min(abs(blocks - depth) for depth in same) <= 8
    assert len(shapes & trained) > len(trained) / 3


def test_depth_keeps_growing_with_width_beyond_the_runs():
    family = ShapeFamily("xlstm")
    assert family.usual_blocks(8192) == pytest.approx(64) and family.usual_blocks(4096) == 32


def test_a_study_with_one_head_count_keeps_it():
    rows = [
        {"arch": "xlstm", "embedding_dim": d, "num_blocks": 2, "num_heads": 1, "vocab_size": 1024, "chunk_size": 64}
        for d in (16, 24, 40)
    ]
    family = family_of_runs("xlstm", pd.DataFrame(rows).assign(experiment_set="isoflop"))
    shapes = buildable_shapes(family, 1e4, 1e6)
    assert {s.num_heads for s in shapes} == {1} and {s.vocab_size for s in shapes} == {1024}
    small = [shape for shape in shapes if 16 <= shape.embedding_dim <= 40]
    assert {16, 24, 40} <= {s.embedding_dim for s in small}
    assert {s.num_blocks for s in small if s.embedding_dim == 24} == {2}
    assert {s.num_blocks for s in small} <= {1, 2, 3}


def test_no_shape_is_an_error():
    with pytest.raises(PlanningError, match="can be built"):
        buildable_shapes(ShapeFamily("xlstm"), 1e3, 2e3)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("prompt", "out"), [(1, 1), (100, 1), (100, 2), (300, 17)])
def test_request_flops_are_the_sum_of_prompt_and_steps(arch, prompt, out):
    shape = ShapeFamily(arch).shape(512, 12)
    expected = prefill_flops(shape, prompt) + sum(step_flops(shape, prompt + i) for i in range(out - 1))
    assert request_flops(shape, prompt, out) == pytest.approx(expected, rel=1e-12)
    assert served_token_flops(shape, prompt, out) == pytest.approx(expected / (prompt + out), rel=1e-12)


def test_state_grows_with_the_prompt_in_the_transformer_alone():
    for arch, grows in (("xlstm", False), ("transformer", True)):
        shape = ShapeFamily(arch).shape(1024, 24)
        short, long = (state_bytes(shape, tokens) for tokens in (1024, 4096))
        assert (long == 4 * short) if grows else (long == short)
        total = [sum(serving_memory(shape, 2048, 1, batch).values()) for batch in (1, 2, 4)]
        assert total == sorted(total) and total[0] > 2 * count_params(shape)


def test_measured_memory_grows_by_at_least_the_cache(paper):
    """The authors' Transformers: what a longer prompt adds to the memory they reserved covers our keys and values."""
    from xlstm_scaling.accounting import shape_of_row
    from xlstm_scaling.study.published import measurements_table

    table = measurements_table(pd.read_csv(paper / "inference.csv"), {"device": "d", "dtype": "bfloat16"})
    table = table[(table["arch"] == "transformer") & (table["batch_size"] == 8) & table["peak_memory_bytes"].notna()]
    checked = 0
    for _, rows in table.groupby("model"):
        rows = rows.set_index("prefill_length")["peak_memory_bytes"].to_dict() | {"row": rows.iloc[0]}
        if {2048, 8192} <= set(rows):
            shape = shape_of_row(rows["row"])
            cache = state_bytes(shape, 8192, 8) - state_bytes(shape, 2048, 8)
            assert cache <= rows[8192] - rows[2048] < 3 * cache
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("arch", ARCHS)
def test_smooth_costs_follow_the_shapes(arch):
    pool = Candidates.of(buildable_shapes(ShapeFamily(arch), 5e7, 1e11), 8192, Load(8192))
    smooth = pool.smooth()
    near = np.interp(np.log(pool.num_params), np.log(smooth.num_params), np.log(smooth.train))
    error = np.abs(near - np.log(pool.train))[(pool.num_params > 1e8) & (pool.num_params < 5e10)]
    assert error.mean() < 0.01 and error.max() < 0.06
    for a, b in itertools.pairwise(smooth.train):
        assert a < b
