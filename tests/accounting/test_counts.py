"""Parameters and FLOPs: the published runs to the last digit, cases worked by hand, torch's own counter."""

import pandas as pd
import pytest

from xlstm_scaling.accounting import (
    architecture,
    count_flops,
    count_params,
    make_shape,
    prefill_bytes,
    prefill_flops,
    step_bytes,
    step_flops,
    training_flops,
    weight_bytes,
)


def test_published_runs_to_the_last_digit(paper):
    runs = pd.read_csv(paper / "runs.csv")
    runs = runs[runs.in_paper_640]
    assert len(runs) == 640
    for row in runs.itertuples():
        arch = {"llama": "transformer"}.get(row.arch, row.arch)
        shape = make_shape(arch, int(row.embedding_dim), int(row.num_blocks), int(row.num_heads), int(row.vocab_size))
        assert count_params(shape) == row.num_params, row.name
        flops = training_flops(
            shape, int(row.context_length), int(row.global_batch_size_sequences), int(row.num_train_steps)
        )
        assert flops == row.num_flops, row.name


def test_transformer_by_hand():
    shape = make_shape("transformer", 8, 1, 2, 10)  # head dim 4, d_ff = ceil64(21) = 64
    assert (shape.head_dim_qk, shape.head_dim_v, shape.ffn_dim, shape.chunk_size) == (4, 4, 64, None)
    block = 8 * 2 * 12 + 64 + 8 + 3 * 8 * 64 + 8
    assert count_params(shape) == block + 2 * 10 * 8 + 8
    assert count_params(shape, embedding=False) == block + 8
    flops = count_flops(shape, 3)
    assert flops.linear == 2 * 3 * (8 * 24 + 64 + 3 * 8 * 64 + 80)
    assert flops.sequence_mixing == 9 * 2 * 4 + 2.5 * 2 * 9 + 9 * 2 * 4
    assert flops.other == 2 * 3 * 64
    assert flops.forward_backward == 3 * (flops.linear + flops.sequence_mixing + flops.other)
    full = count_flops(shape, 3, "chinchilla")
    assert full.sequence_mixing == 2 * 9 * 2 * 4 + 3 * 2 * 9 + 2 * 9 * 2 * 4


def test_xlstm_by_hand():
    shape = make_shape("xlstm", 8, 1, 2, 10, chunk_size=2)  # d_v 4, d_qk 2, d_ff = ceil64(22) = 64
    assert (shape.head_dim_qk, shape.head_dim_v, shape.ffn_dim) == (2, 4, 64)
    block = 8 * 2 * 8 + 2 * 8 * 2 + 4 + 64 + 64 + 16 + 3 * 8 * 64 + 8
    assert count_params(shape) == block + 2 * 10 * 8 + 8
    chunk = 3 + 4 + 5 + 10 + 2 * 8 + 8 * 8 + 6 * 2 + 4 + 8 * 2  # inter-chunk recurrence, L = 2
    within = 3 + 6 * 4 + 4 + 8 * 2 + 8 + 8 * 4 + 8 + 14 + 4 * 4
    flops = count_flops(shape, 6)
    assert flops.sequence_mixing == 2 * 3 * (chunk + within)
    assert flops.other == 6 * 8 + 2 * 6 * 64
    assert flops.linear == 2 * 6 * (8 * 2 * 8 + 2 * 8 * 2 + 64 + 64 + 3 * 8 * 64 + 80)


def test_6nd_is_six_n_per_token():
    shape = make_shape("xlstm", 64, 2, 2, 512)
    assert count_flops(shape, 100, "6nd").forward_backward == 6 * count_params(shape) * 100


@pytest.mark.parametrize(("chunk", "causal"), [(64, 1.0), (128, 0.75)])
def test_tfla_saves_causal_work_only_in_long_chunks(chunk, causal):
    """The tiled kernel's cell by hand, 4 heads of d_qk 64 and d_v 128; all else is as in the paper's convention."""
    shape = make_shape("xlstm", 512, 1, 4, 100, chunk_size=chunk)
    gates, states = 2 * chunk + chunk * (chunk + 1) / 2 + 4 * chunk + 5, 64 * 128
    recurrent = gates + 2 * states + 2 * chunk * states + chunk * 64 + 2 * 64 + 2 * chunk * 64
    scores = causal * chunk * (5 * chunk + 2 + 2 * chunk * (64 + 128) + 3 * chunk)
    within = scores + chunk * (chunk + 1) / 2 + 2 * chunk
    across = 2 * chunk * states + 3 * chunk * 64
    together = 2 * chunk * 128 + 4 * chunk
    tiled, paper = count_flops(shape, 1024, "tfla"), count_flops(shape, 1024)
    assert tiled.sequence_mixing == 4 * 1024 / chunk * (recurrent + within + across + together)
    assert (tiled.linear, tiled.other) == (paper.linear, paper.other)


@pytest.mark.parametrize("arch", ["xlstm", "transformer", "hybrid"])
@pytest.mark.parametrize(("dim", "blocks", "heads", "T"), [(64, 2, 2, 128), (96, 1, 3, 64), (128, 3, 4, 200)])
def test_traced_agrees(arch, dim, blocks, heads, T):
    """torch's counter sees the linear layers exactly as the formula does, and attention without causality."""
    from xlstm_scaling.models.traced import traced_flops

    shape = make_shape(arch, dim, blocks, heads, 256)
    traced, formula = traced_flops(shape, T), count_flops(shape, T)
    assert traced.linear == formula.linear
    expected = 0
    for one in architecture(arch).block_shapes(shape):
        H, dk, dv = one.num_heads, one.head_dim_qk, one.head_dim_v
        if one.arch == "transformer":  # scores and weighted values over all T x T pairs; the softmax is not counted
            expected += 2 * T**2 * H * (dk + dv)
        else:  # matrix products of the chunkwise form: K'V, QK', SV, QC, Qn per chunk (padded to whole chunks)
            L = min(shape.chunk_size, T)
            expected += (
                H * -(-T // L) * (2 * L * dk * dv + 2 * L * L * dk + 2 * L * L * dv + 2 * L * dk * dv + 2 * L * dk)
            )
    assert traced.sequence_mixing == expected


def test_inference_counts_scale_as_they_should():
    xlstm, transformer = make_shape("xlstm", 512, 4, 4, 1000), make_shape("transformer", 512, 4, 8, 1000)
    assert step_flops(xlstm, 10) == step_flops(xlstm, 100_000)
    assert step_bytes(xlstm, 10) == step_bytes(xlstm, 100_000)
    growth = step_bytes(transformer, 2000) - step_bytes(transformer, 1000)
    assert growth == 4 * 2 * 8 * (64 + 64) * 1000  # blocks x bf16 x heads x (k, v) x tokens
    assert prefill_flops(xlstm, 256, batch_size=3) == 3 * prefill_flops(xlstm, 256)
    extra = prefill_bytes(xlstm, 256, batch_size=3) - prefill_bytes(xlstm, 256)
    assert extra == pytest.approx(2 * (prefill_bytes(xlstm, 256) - weight_bytes(xlstm)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_shape("mamba", 64, 1, 1, 10), "unknown architecture 'mamba'; known: xlstm, transformer"),
        (lambda: make_shape("xlstm", 10, 1, 3, 10), "embedding_dim = 10 is not divisible by num_heads = 3"),
        (lambda: make_shape("xlstm", 6, 1, 2, 10), "head_dim_v = 3 is not divisible"),
        (lambda: make_shape("transformer", 8, 0, 2, 10), "num_blocks must be a positive integer"),
        (lambda: count_flops(make_shape("xlstm", 8, 1, 1, 10), 4, "palm"), "unknown FLOP convention 'palm'"),
        (lambda: count_flops(make_shape("xlstm", 8, 1, 1, 10), 0), "context_length must be at least 1"),
    ],
)
def test_bad_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
