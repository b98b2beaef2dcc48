"""Memory of inference: parameters and states byte by byte, and what a real pass takes."""

import multiprocessing

import pytest
import torch

from xlstm_scaling.accounting import count_params, make_shape
from xlstm_scaling.accounting.inference_memory import inference_memory, inference_parameter_bytes
from xlstm_scaling.inference.timing import parameter_bytes, pass_memory, prepare
from xlstm_scaling.models import build_model

ARCHS = ("xlstm", "transformer", "hybrid")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_parameters_and_state_are_those_of_the_model(arch, dtype, size):
    shape = make_shape(arch, 32, 3, 2, 64)
    model = prepare(build_model(shape, seed=0), dtype)
    assert inference_parameter_bytes(shape, size) == parameter_bytes(model)
    if size == 4:
        assert inference_parameter_bytes(shape, size) == 4 * count_params(shape)
    state = model.init_state(5, 40)
    tensors = [x for part in state for x in (part if isinstance(part, tuple) else (part.k, part.v))]
    assert inference_memory(shape, 5, 32, 8, size, size)["state"] == sum(x.nbytes for x in tensors)


def test_what_grows_with_what():
    xlstm, transformer = (make_shape(arch, 256, 4, 4, 1024) for arch in ARCHS[:2])
    whole, longer = (inference_memory(xlstm, 2, length, prefill_chunk=512) for length in (4096, 2**20))
    assert {name for name in whole if whole[name] != longer[name]} == {"prompt"}  # constant but for the prompt itself
    short, long = (inference_memory(transformer, 2, length) for length in (1000, 2000))
    assert long["state"] == pytest.approx(2 * short["state"], rel=1e-2)
    assert inference_memory(transformer, 2, 2000, prefill_chunk=500)["attention mask"] == 5 * 500 * 2000
    with pytest.raises(ValueError, match="at least 1"):
        inference_memory(xlstm, 0, 1)


def _rise(arch, batch, length):
    torch.set_num_threads(1)
    shape = make_shape(arch, 256, 2, 4, 512)
    model = prepare(build_model(shape, seed=0), torch.float32)
    pass_memory(model, torch.zeros(1, 8, dtype=torch.int64), 1)  # libraries
    _, peak = pass_memory(model, torch.zeros(batch, length, dtype=torch.int64), 1)
    return peak - parameter_bytes(model)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_pass_takes_about_what_is_predicted(arch):
    """In a process of its own; by the kernel's mark of the resident set."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.apply(_rise, (arch, 4, 2048))
    items = inference_memory(make_shape(arch, 256, 2, 4, 512), 4, 2048, 1, 4, 4)
    predicted = sum(items.values()) - items["parameters"]
    assert 0.6 < measured / predicted < 1.25
