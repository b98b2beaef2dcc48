"""Memory that a model of ours takes while it reads a prompt and generates: parameters, state or cache, activations.

``serving.serving_memory`` is what must be there at least; this is what the models in ``src/models`` allocate, as an
upper bound, for deciding whether to try at all: not all of it lives at once. Not counted: libraries' workspaces and the
device's context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from xlstm_scaling.accounting.counts import parts
from xlstm_scaling.accounting.dtypes import FP32_BYTES
from xlstm_scaling.accounting.memory import model_parameters
from xlstm_scaling.accounting.serving import state_bytes
from xlstm_scaling.accounting.shapes import ModelShape

TOKEN_ID_BYTES = 8


def inference_parameter_bytes(shape: ModelShape, weight: int = 2) -> int:
    """Bytes of the parameters as they lie in memory to generate: matrices of linear maps in ``weight`` bytes; the
    embedding, norms and gates, which are computed with in fp32, in four."""
    cast, kept = 0, 0
    for name, dims in model_parameters(shape).items():
        matrix = len(dims) == 2 and "gates" not in name and "embedding" not in name
        size = math.prod(dims)
        cast, kept = cast + size * matrix, kept + size * (not matrix)
    return weight * cast + FP32_BYTES * kept


def _block_memory(shape: ModelShape, tokens: int, act: int) -> int:
    """Activations of a block: around its sequence mixing and around its feed-forward, as a C allocator's heap keeps
    what the one has freed while the other runs."""
    mixing = max(part.kind.block_inference_bytes_per_token(part.shape, act) for part in parts(shape))
    return tokens * (mixing + act * 3 * shape.ffn_dim)


def inference_memory(
    shape: ModelShape,
    batch_size: int,
    prefill_length: int,
    generate_steps: int = 1,
    weight: int = 2,
    act: int = 2,
    prefill_chunk: int | None = None,
) -> Mapping[str, int]:
    """Bytes by item for a prompt of ``prefill_length`` tokens in ``batch_size`` sequences, then ``generate_steps``.

    Args:
        shape: of the model; ValueError for an unknown architecture.
        batch_size: sequences side by side.
        prefill_length: tokens of each prompt.
        generate_steps: tokens that the cache has room for beyond the prompt.
        weight, act: bytes of a weight and of an activation.
        prefill_chunk: tokens of one forward pass, None = the whole prompt. A chunk that attends to earlier ones needs
            a mask of chunk x prompt (``models/transformer.py``).

    Returns:
        ``parameters``, ``state`` (or cache), ``activations``, ``attention mask``, ``prompt``.
    """
    if min(batch_size, prefill_length) < 1 or generate_steps < 0 or (prefill_chunk or 1) < 1:
        raise ValueError("batch, prefill and chunk must be at least 1, steps at least 0")
    chunk = min(prefill_length, prefill_chunk or prefill_length)
    tokens, d = batch_size * chunk, shape.embedding_dim
    # the residual stream, its norm, what a block adds to it; the embedding before it is rounded
    stream = tokens * d * (3 * act + (FP32_BYTES if act < FP32_BYTES else 0))
    logits = batch_size * shape.vocab_size * (act + FP32_BYTES)
    masked = any(part.kind.attends for part in parts(shape)) and chunk < prefill_length
    return {
        "parameters": inference_parameter_bytes(shape, weight),
        "state": int(state_bytes(shape, prefill_length + generate_steps, batch_size, act)),
        "activations": stream + _block_memory(shape, tokens, act) + logits,
        # as bool and as a number; the heap keeps those of earlier chunks, which are smaller
        "attention mask": (1 + 2 * act) * chunk * prefill_length if masked else 0,
        "prompt": TOKEN_ID_BYTES * batch_size * prefill_length,
    }
