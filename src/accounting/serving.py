"""FLOPs of served requests, and memory of a device that answers them.

A request has a prompt of P tokens and G generated ones: the prompt's forward pass gives the first of them, and G - 1
steps at positions P, P + 1 ... the rest. FLOPs are those of `counts.prefill_flops` and `counts.step_flops`.
"""

from __future__ import annotations

from xlstm_scaling.accounting.counts import count_params, parts, prefill_flops, step_flops, sum_blocks
from xlstm_scaling.accounting.dtypes import BF16_BYTES, FP32_BYTES
from xlstm_scaling.accounting.feed_forward import qkv_width
from xlstm_scaling.accounting.shapes import ModelShape


def request_flops(shape: ModelShape, prefill_length: int, generate_length: int = 1) -> float:
    """FLOPs of one request. ValueError where P or G is below 1."""
    if prefill_length < 1 or generate_length < 1:
        raise ValueError(f"a request has at least one token in and one out, not {prefill_length} and {generate_length}")
    steps = generate_length - 1
    if steps == 0:
        return prefill_flops(shape, prefill_length)
    first, last = prefill_length, prefill_length + steps - 1  # linear in the position: the mean of both ends
    return prefill_flops(shape, prefill_length) + steps * (step_flops(shape, first) + step_flops(shape, last)) / 2


def served_token_flops(shape: ModelShape, prefill_length: int, generate_length: int = 1) -> float:
    """FLOPs of a served token, whether it is read or generated: those of a request over its P + G tokens."""
    return request_flops(shape, prefill_length, generate_length) / (prefill_length + generate_length)


def state_bytes(shape: ModelShape, tokens: int, batch_size: int = 1, act: int = BF16_BYTES) -> float:
    """Bytes of what is kept of a sequence: keys and values of all its tokens, or the mLSTM's state in fp32."""
    return batch_size * sum_blocks(shape, lambda kind, one: kind.block_state_bytes(one, tokens, act))


def serving_memory(
    shape: ModelShape,
    prefill_length: int,
    generate_length: int = 1,
    batch_size: int = 1,
    weight: int = BF16_BYTES,
    act: int = BF16_BYTES,
    prefill_chunk: int | None = None,
) -> dict[str, float]:
    """Bytes by item on one device that serves ``batch_size`` requests side by side.

    "prefill": the residual stream and the widest activations of one block (feed-forward, or q, k, v and the rest of
    sequence mixing) of the tokens that are read at once: the prompt, or ``prefill_chunk`` of it. Not counted:
    libraries' workspaces, the device's context, fragments.
    """
    tokens = batch_size * min(prefill_length, prefill_chunk or prefill_length)
    d = shape.embedding_dim
    mixing = (qkv_width(part.shape) + 3 * part.shape.num_heads * part.shape.head_dim_v for part in parts(shape))
    widest = max(3 * shape.ffn_dim, *mixing)
    return {
        "weights": float(weight * count_params(shape)),
        "state": state_bytes(shape, prefill_length + generate_length, batch_size, act),
        "prefill": float(act * tokens * (2 * d + widest)),
        "logits": float(FP32_BYTES * batch_size * shape.vocab_size),
    }
