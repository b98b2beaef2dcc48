"""Rooflines on paper: the accounting's numbers, and floors that make sense."""

import pytest
import torch

from xlstm_scaling.accounting.hardware import DEVICES, find_device
from xlstm_scaling.accounting.xlstm import cell_flops_tfla
from xlstm_scaling.kernels import problems, roofline


def test_mlstm_counts_are_the_accountings():
    problem = problems.mlstm(4, 4, 8192, 256, 512)
    forward = roofline.work(problem, backward=False)
    assert forward.flops == 4 * 4 * 8192 // 64 * cell_flops_tfla(64, 256, 512)
    both = roofline.work(problem)
    assert both.flops == 3 * forward.flops and both.num_bytes == 3 * forward.num_bytes
    # per chunk and head: k, v for the states, q, k, v for the outputs, h; a state written and read
    activations = 2 * 64 * (3 * 256 + 3 * 512)
    assert forward.num_bytes == pytest.approx(128 * 16 * (activations + 2 * 2 * 256 * 512), rel=0.01)


def test_floor_takes_the_chunk_that_needs_least():
    problem = problems.mlstm(1, 8, 8192, 256, 512)
    seconds, counted = roofline.floor_s(problem, DEVICES["H100"])
    assert counted.chunk in roofline.FLOOR_CHUNKS
    for chunk in roofline.FLOOR_CHUNKS:
        work = roofline.work(problem, chunk=chunk)
        assert seconds <= DEVICES["H100"].floor_s(work.flops, work.num_bytes)
    faster, _ = roofline.floor_s(problem, DEVICES["H200"])
    forward, _ = roofline.floor_s(problem, DEVICES["H100"], backward=False)
    assert faster <= seconds and forward == pytest.approx(seconds / 3)


def test_a_step_is_bound_by_memory_and_a_head_by_products():
    step = problems.step(32, 8, 256, 512)
    work = roofline.work(step)
    state = 32 * 8 * 256 * 512 * 4
    assert work.num_bytes == pytest.approx(2 * state, rel=0.02)
    device = DEVICES["H100"]
    assert roofline.floor_s(step, device)[0] == work.num_bytes / device.bytes_per_s
    head = problems.cross_entropy(8192, 4096)
    assert roofline.floor_s(head, device)[0] == pytest.approx(6 * 8192 * 4096 * 50304 / device.bf16_flops_per_s)


@pytest.mark.parametrize("problem", problems.all_problems(), ids=lambda problem: problem.name)
def test_every_problem_has_a_floor(problem):
    row = roofline.table([problem])[-1]
    assert 0 < row["floor_ms_H200"] <= row["floor_ms_H100"] < 1e3
    assert row["flops_per_byte"] == row["flops"] / row["bytes"]


def test_attention_is_counted_over_half_the_square():
    flops = roofline.attention_flops(1, 65536, 16, 128, backward=False)
    assert flops == pytest.approx(2 * 65536**2 * 16 * 128, rel=0.02)


def test_devices():
    assert find_device("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_device("nvidia-h200").name == "H200"
    assert find_device("NVIDIA GeForce RTX 4090") is None
    assert DEVICES["A100"].flops_per_s("float32") == 52e12  # three tf32 products
    assert DEVICES["MI300X"].flops_per_s("float32") == pytest.approx(217.9e12)
    with pytest.raises(ValueError, match="no peak of 'float64'"):
        DEVICES["A100"].flops_per_s("float64")
    assert roofline.work(problems.rms_norm(8, 16, torch.float16), backward=False).num_bytes == 2 * 4 * 8 * 16
