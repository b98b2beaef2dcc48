"""FLOPs and bytes by kind of kernel: they add up to the totals, scale as they should, and take arrays."""

import numpy as np
import pytest

from xlstm_scaling.accounting import (
    dtype_bytes,
    make_shape,
    prefill_bytes,
    prefill_flops,
    prefill_work,
    step_bytes,
    step_flops,
    step_work,
    weight_bytes,
)

SHAPES = [make_shape("xlstm", 96, 3, 4, 500, chunk_size=128), make_shape("transformer", 96, 3, 2, 500)]
SHAPES.append(make_shape("hybrid", 96, 5, 4, 500, attention_every=2))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.arch)
@pytest.mark.parametrize(("length", "batch", "size"), [(1, 1, 2), (100, 3, 2), (4097, 8, 4)])
def test_parts_add_up_to_the_totals(shape, length, batch, size):
    prefill, step = prefill_work(shape, length, batch, size, size), step_work(shape, length, batch, size, size)
    assert prefill.flops == pytest.approx(prefill_flops(shape, length, batch), rel=1e-13)
    assert prefill.bytes == pytest.approx(prefill_bytes(shape, length, batch, size, size), rel=1e-13)
    assert step.flops == pytest.approx(step_flops(shape, length, batch), rel=1e-13)
    assert step.bytes == pytest.approx(step_bytes(shape, length, batch, size, size), rel=1e-13)
    assert prefill.weight_bytes == step.weight_bytes == weight_bytes(shape, size)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.arch)
def test_arrays_give_what_numbers_give(shape):
    lengths, batches = np.array([1.0, 65.0, 2000.0]), np.array([[1.0], [7.0]])
    for function in (prefill_work, step_work):
        many = function(shape, lengths, batches)
        for name in ("linear_flops", "mixing_flops", "scores", "activation_bytes", "state_bytes", "streams"):
            values = np.broadcast_to(getattr(many, name), (2, 3))
            for (i, j), value in np.ndenumerate(values):
                one = function(shape, int(lengths[j]), int(batches[i, 0]))
                assert value == pytest.approx(getattr(one, name), rel=1e-13), name


def test_scores_and_streams_by_hand():
    xlstm, transformer, hybrid = SHAPES
    # five blocks: three of 4 heads in a row, two whose queries do not wait
    assert prefill_work(hybrid, 10, 2).streams == pytest.approx(5 / (3 / (2 * 4) + 2 / (2 * 4 * 10)))
    assert prefill_work(transformer, 10, 2).scores == pytest.approx(2 * 3 * 2 * 0.65 * 100)
    assert step_work(transformer, 10, 2).scores == 2 * 3 * 2 * 11
    assert prefill_work(xlstm, 10, 2).scores == step_work(xlstm, 10, 2).scores == 0
    assert prefill_work(transformer, 10, 2).streams == 2 * 2 * 10  # every query of every head
    assert prefill_work(xlstm, 10, 2).streams == step_work(xlstm, 10, 2).streams == 2 * 4


def test_logits_of_every_token():
    shape = SHAPES[0]
    last, every = (prefill_work(shape, 100, 2, logits=which) for which in ("last", "all"))
    assert every.linear_flops - last.linear_flops == 2 * 99 * 2 * 96 * 500
    # the product's input and result in bf16; cast: read bf16, write fp32; soft cap: read and write fp32
    assert every.activation_bytes - last.activation_bytes == 2 * 99 * (2 * (96 + 500) + 500 * (2 + 4 + 4 + 4))
    assert (every.mixing_flops, every.state_bytes) == (last.mixing_flops, last.state_bytes)
    with pytest.raises(ValueError, match="last, all"):
        prefill_work(shape, 100, logits="none")


def test_sizes_of_dtypes():
    assert [dtype_bytes(name) for name in ("bfloat16", "float32", "float64")] == [2, 4, 8]
    with pytest.raises(ValueError, match="int3"):
        dtype_bytes("int3")
