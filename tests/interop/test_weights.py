"""The table of parameters against the models themselves, and what does not fit it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.interop.errors import InteropError
from xlstm_scaling.interop.weights import pieces, to_ours, to_theirs
from xlstm_scaling.models import build_model

SIZES = st.integers(1, 9)


@given(
    arch=st.sampled_from(["xlstm", "transformer"]), mode=st.sampled_from(["single", "fused"]), d=SIZES, blocks=SIZES,
    heads=SIZES, qk=SIZES, v=SIZES, ffn=SIZES, vocab=SIZES,
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_parameter_goes_over_and_comes_back(arch, mode, d, blocks, heads, qk, v, ffn, vocab):
    shape = ModelShape(arch, d, blocks, heads, v if arch == "transformer" else qk, v, ffn, vocab, 4)
    with torch.device("meta"):
        sizes = {name: p.shape for name, p in build_model(shape).named_parameters()}
    numbers = iter(range(10**9))
    ours = {name: torch.tensor([next(numbers) for _ in range(size.numel())]).view(size) for name, size in sizes.items()}
    table = pieces(shape, mode)
    theirs = to_theirs(table, ours)
    assert sorted(torch.cat([t.flatten() for t in theirs.values()]).tolist()) == list(range(next(numbers)))
    back = to_ours(table, theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@pytest.fixture
def theirs():
    shape = ModelShape("transformer", 8, 1, 2, 4, 4, 12, 11)
    table = pieces(shape)
    sizes = {piece.theirs: piece.size for piece in table}
    return table, {name: torch.zeros(size) for name, size in sizes.items()}


def test_tensors_that_do_not_fit_are_named(theirs):
    table, tensors = theirs
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(InteropError, match=f"missing, e.g. {name}$"):
        to_ours(table, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(InteropError, match=r"no place in the model, e\.g\. model\.layers\.1\."):
        to_ours(table, tensors | {"model.layers.1.mlp.up_proj.weight": torch.zeros(12, 8)})
    with pytest.raises(InteropError, match=rf"{name} has shape \(4, 8\) where the configuration gives \(8, 8\)"):
        to_ours(table, tensors | {name: torch.zeros(4, 8)})
