"""Memory of a device: parameters, gradients and moments exactly, activations as torch keeps them, shards as FSDP2's."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from xlstm_scaling.accounting import count_params, make_shape
from xlstm_scaling.accounting.memory import (
    Layout,
    kept_activations,
    loss_memory,
    micro_batch_sizes,
    model_parameters,
    plan_memory,
    shard_params,
    shard_rows,
    training_memory,
)
from xlstm_scaling.kernels.rotary_attention import rotary_attention_reference
from xlstm_scaling.models import build_model, transformer
from xlstm_scaling.models.layers import fast
from xlstm_scaling.training import parallel as parallel_module
from xlstm_scaling.training.parallel import Parallel

HEADS_7B = {"xlstm": 8, "transformer": 32, "hybrid": 8}
#: on a CPU the states of the mLSTM are kept in fp32, 64 tokens apart
CPU = {"chunk_tokens": 64, "state_bytes": 4}


def shape_7b(arch):
    return make_shape(arch, 4096, 32, HEADS_7B[arch], 50304)


@pytest.mark.parametrize("arch", ["xlstm", "transformer", "hybrid"])
def test_parameters_are_the_models(arch):
    shape = make_shape(arch, 96, 2, 3, 130)
    model = build_model(shape)
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == model_parameters(shape)
    assert shard_params(shape, 1) == count_params(shape)
    for degree in (2, 7, 64):
        assert sum(shard_params(shape, degree, rank) for rank in range(degree)) == count_params(shape)


def test_rows_are_cut_as_torch_cuts_them():
    for rows in (1, 5, 16, 64, 786):
        for degree in (1, 2, 3, 64):
            chunks = [chunk.shape[0] for chunk in torch.empty(rows, 1).chunk(degree)]
            assert [shard_rows(rows, degree, rank) for rank in range(degree)] == chunks + [0] * (degree - len(chunks))


@pytest.mark.parametrize("arch", ["xlstm", "transformer", "hybrid"])
def test_gradients_and_moments_of_one_device(arch):
    shape = make_shape(arch, 64, 2, 2, 96)
    model = build_model(shape, seed=0)
    optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-3, fused=True)
    model.loss(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
    optimizer.step()
    memory = training_memory(shape, 8, Layout())

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim())

    assert memory.items["parameters"] == size(model.parameters())
    assert memory.items["gradients"] == size(value.grad for value in model.parameters())
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert memory.items["AdamW moments"] == size(moments)


def as_on_a_gpu(op, x):
    """Attention by torch, where a CPU has a form that keeps less."""
    return rotary_attention_reference if op == "rotary_attention" else fast(op, x)


def kept_bytes(shape, context_length, sequences, dtype, documents, checkpointing):
    """Storage that autograd keeps for the backward pass, apart from the parameters'."""
    model = build_model(shape, compute_dtype=dtype, seed=0)
    model.activation_checkpointing = checkpointing
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (sequences, context_length + 1), generator=generator)
    starts = torch.zeros(sequences, context_length, dtype=torch.bool)
    starts[:, 0] = True
    starts[:, context_length // 2] = documents
    parameters = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(tokens[:, :-1], tokens[:, 1:], starts)
    return sum(kept.values())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["xlstm", "transformer", "hybrid"])
def test_activations_are_what_torch_keeps(arch, dtype, documents, monkeypatch):
    """Within 5 %, and with activation checkpointing. Rows' statistics and token ids are not counted."""
    monkeypatch.setattr(transformer, "fast", as_on_a_gpu)
    shape = make_shape(arch, 192, 3, 3, 512)
    layout = Layout(micro_batch_sequences=2, activation_bytes=dtype.itemsize, documents=documents, **CPU)
    items, loss = kept_activations(shape, 256, layout), loss_memory(shape, 256, layout)
    measured = kept_bytes(shape, 256, 2, dtype, documents, checkpointing=False)
    assert sum(items.values()) + loss == pytest.approx(measured, rel=0.05)
    measured = kept_bytes(shape, 256, 2, dtype, documents, checkpointing=True)
    assert items["block input"] + loss == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", ["xlstm", "transformer", "hybrid"])
def test_a_step_stays_below_the_sum(arch, checkpointing, monkeypatch):
    """What the allocator hands out at most over a whole step, second of its kind, against the sum of all items."""
    monkeypatch.setattr(transformer, "fast", as_on_a_gpu)
    shape, sequences, length = make_shape(arch, 192, 4, 3, 512), 2, 256
    model = build_model(shape, seed=0)
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-3, fused=True)
    tokens = torch.randint(0, shape.vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(0))

    def step():
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    layout = Layout(1, 1, sequences, 1, checkpointing, activation_bytes=4, documents=False, **CPU)
    memory = training_memory(shape, length, layout)
    before = memory.items["parameters"] + memory.items["AdamW moments"]
    peak = before + max(itertools.accumulate(size for _, size in events))
    assert peak <= memory.total <= 1.3 * peak


@pytest.fixture
def fake_devices():
    """As process ``rank`` of ``world``, which do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def enter(rank, world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return Parallel(rank, world, 0, world, "cpu")

    yield enter
    dist.destroy_process_group()
    parallel_module._mesh.cache_clear()


@pytest.mark.parametrize(("arch", "rank", "world"), [("xlstm", 0, 64), ("xlstm", 63, 64), ("transformer", 5, 48)])
def test_shards_of_7b_are_those_of_fsdp(fake_devices, arch, rank, world):
    """The real model on the meta device, laid over devices that do not exist: bytes of one of them."""
    shape = shape_7b(arch)
    parallel = fake_devices(rank, world)
    with torch.device("meta"):
        model = build_model(shape, compute_dtype=torch.bfloat16)
    for block in model.blocks:
        parallel._lay_out(block)
    parallel._lay_out(model)
    local = [value.to_local() for value in model.parameters()]
    own = 4 * shard_params(shape, world, rank)
    assert sum(value.numel() * value.element_size() for value in local) == own
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-3, fused=False, foreach=False)
    optimizer.step()
    moments = [s[key].to_local() for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(value.numel() * value.element_size() for value in moments) == 2 * own
    if rank == 0:
        memory = training_memory(shape, 8192, Layout(world, world, 8, activation_checkpointing=True))
        assert memory.items["parameters"] == memory.items["gradients"] == own
        assert memory.items["AdamW moments"] == 2 * own


def test_micro_batches_of_a_device():
    assert list(micro_batch_sizes(8)) == [8, 4, 3, 2, 1]
    assert list(micro_batch_sizes(1)) == [1]


@pytest.mark.parametrize("arch", ["xlstm", "transformer", "hybrid"])
def test_plan_of_7b(arch):
    """512 sequences of 8,192 tokens on 64 devices of 80 GB: with activation checkpointing, in one pass."""
    plan = plan_memory(shape_7b(arch), 8192, 512, 64, 80e9)
    assert plan.without is None
    assert plan.chosen is plan.checkpointed
    assert plan.chosen.layout.micro_batch_sequences == 8
    assert plan.chosen.total < 0.9 * 80e9
    roomy = plan_memory(shape_7b(arch), 8192, 512, 512, 141e9)
    assert roomy.chosen is roomy.without
    with pytest.raises(ValueError, match="nothing fits: 2 devices"):
        plan_memory(shape_7b(arch), 8192, 512, 2, 80e9)
    with pytest.raises(ValueError, match="leaves some of 64 devices without any"):
        plan_memory(shape_7b(arch), 8192, 32, 64, 80e9)


def test_more_devices_and_smaller_micro_batches_need_less():
    shape = shape_7b("xlstm")

    def total(**settings):
        return training_memory(shape, 8192, Layout(**settings)).total

    assert total(devices=64, shard=64) < total(devices=64, shard=8) < total(devices=64, shard=1)
    assert total(devices=64, shard=64) < total(devices=64, shard=64, micro_batch_sequences=2)
    assert total(devices=64, shard=64, activation_checkpointing=True) < total(devices=64, shard=64)
    for wrong in ({"devices": 4, "shard": 3}, {"micro_batches": 0}, {"activation_bytes": 8}):
        with pytest.raises(ValueError, match=r"must be|cannot be|bytes"):
            Layout(**wrong)


def test_command(capsys):
    from xlstm_scaling.cli import run_command

    command = ["memory", "--arch", "xlstm", "--embedding-dim", "4096", "--num-blocks", "32", "--num-heads", "8"]
    command += ["--vocab-size", "50304", "--context-length", "8192", "--batch-sequences", "512"]
    assert run_command([*command, "--devices", "64"]) == 0
    printed = capsys.readouterr().out
    assert "hardware.shard=full hardware.micro_batch_sequences=8 hardware.activation_checkpointing=true" in printed
    assert "activations kept: not even one sequence fits" in printed
    assert run_command([*command, "--devices", "64", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["chosen"] == "checkpointed"
    assert content["checkpointed"]["total"] == pytest.approx(sum(content["checkpointed"]["items"].values()))
    for refused, says in (
        (["--devices", "2"], "nothing fits"),
        (["--devices", "64", "--shard", "5"], "does not divide"),
        (["--devices", "64", "--shard", "some"], "none, full or a number"),
    ):
        assert run_command([*command, *refused]) == 1
        assert says in capsys.readouterr().err


def test_accounting_needs_no_torch():
    code = "import sys, xlstm_scaling.accounting.memory_command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
