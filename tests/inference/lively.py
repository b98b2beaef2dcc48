"""Small models whose sequence mixing matters: all parameters are moved away from their initial values; and decoders."""

import pytest
import torch

from xlstm_scaling.accounting import make_shape
from xlstm_scaling.inference.decoder import ModuleDecoder
from xlstm_scaling.inference.decoder_cpp import CppDecoder
from xlstm_scaling.inference.decoder_graph import GraphDecoder
from xlstm_scaling.kernels.cpp import build
from xlstm_scaling.models import build_model

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def lively_model(arch, dtype=torch.float32, vocab_size=37, embedding_dim=16, num_blocks=2, num_heads=2, chunk=4):
    """A model with random gates, norms and biases; ``chunk`` is that of the mLSTM kernel."""
    shape = make_shape(arch, embedding_dim, num_blocks, num_heads, vocab_size, chunk_size=chunk)
    options = {"kernel_chunk_size": chunk} if arch != "transformer" else {}
    model = build_model(shape, compute_dtype=dtype, seed=3, **options).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gates.bias" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
            else:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def graph_program(model, batch_size, max_length):
    """What a CUDA graph would replay, run by torch."""
    return GraphDecoder(model, batch_size, max_length, capture=False)


PROGRAMS = [
    pytest.param(CppDecoder, marks=needs_compiler, id="cpp"),
    pytest.param(graph_program, id="graph"),
    pytest.param(ModuleDecoder, id="torch"),
]
