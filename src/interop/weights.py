"""Parameters by their names here and in transformers: a table of pieces, read in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.interop.errors import InteropError


@dataclass(frozen=True)
class Piece:
    """Rows that are whole on both sides; a tensor of either side is the concatenation of its pieces in order."""

    ours: str
    theirs: str
    size: tuple[int, ...]


def pieces(shape: ModelShape, weight_mode: str = "single") -> list[Piece]:
    """All parameters of a model. ``weight_mode``: of transformers' xLSTM, single or fused."""
    d, vocab = shape.embedding_dim, shape.vocab_size
    xlstm = shape.arch == "xlstm"
    embedding, norm = ("backbone.embeddings", "backbone.out_norm") if xlstm else ("model.embed_tokens", "model.norm")
    table = [
        Piece("embedding.weight", f"{embedding}.weight", (vocab, d)),
        Piece("norm.weight", f"{norm}.weight", (d,)),
        Piece("head.weight", "lm_head.weight", (vocab, d)),
    ]
    for index in range(shape.num_blocks):
        theirs = f"backbone.blocks.{index}" if xlstm else f"model.layers.{index}"
        block = _xlstm_block(shape, weight_mode) if xlstm else _llama_block(shape)
        table += [Piece(f"blocks.{index}.{p.ours}", f"{theirs}.{p.theirs}", p.size) for p in block]
    return table


def _xlstm_block(shape: ModelShape, weight_mode: str) -> Iterator[Piece]:
    d, heads, ffn = shape.embedding_dim, shape.num_heads, shape.ffn_dim
    qk, v = heads * shape.head_dim_qk, heads * shape.head_dim_v
    fused = weight_mode == "fused"
    yield Piece("mlstm_norm.weight", "norm_mlstm.weight", (d,))
    for name, rows in (("q", qk), ("k", qk), ("v", v)):
        yield Piece("mlstm.qkv.weight", f"mlstm_layer.{'qkv_opreact' if fused else name}.weight", (rows, d))
    output_gate = "qkv_opreact" if fused else "ogate_preact"
    yield Piece("mlstm.output_gate.weight", f"mlstm_layer.{output_gate}.weight", (v, d))
    for name in ("igate_preact", "fgate_preact"):
        theirs = "mlstm_layer." + ("ifgate_preact" if fused else name)
        yield Piece("mlstm.gates.weight", f"{theirs}.weight", (heads, d))
        yield Piece("mlstm.gates.bias", f"{theirs}.bias", (heads,))
    yield Piece("mlstm.norm.weight", "mlstm_layer.multihead_norm.weight", (v,))
    yield Piece("mlstm.out.weight", "mlstm_layer.out_proj.weight", (d, v))
    yield Piece("ffn_norm.weight", "norm_ffn.weight", (d,))
    for name in ("proj_up_gate", "proj_up"):
        yield Piece("ffn.gate_up.weight", f"ffn.{'proj_up_gate_z' if fused else name}.weight", (ffn, d))
    yield Piece("ffn.down.weight", "ffn.proj_down.weight", (d, ffn))


def _llama_block(shape: ModelShape) -> Iterator[Piece]:
    d, width, ffn = shape.embedding_dim, shape.num_heads * shape.head_dim_v, shape.ffn_dim
    yield Piece("attention_norm.weight", "input_layernorm.weight", (d,))
    for name in ("q_proj", "k_proj", "v_proj"):
        yield Piece("attention.qkv.weight", f"self_attn.{name}.weight", (width, d))
    yield Piece("attention.out.weight", "self_attn.o_proj.weight", (d, width))
    yield Piece("ffn_norm.weight", "post_attention_layernorm.weight", (d,))
    for name in ("gate_proj", "up_proj"):
        yield Piece("ffn.gate_up.weight", f"mlp.{name}.weight", (ffn, d))
    yield Piece("ffn.down.weight", "mlp.down_proj.weight", (d, ffn))


def to_theirs(table: Iterable[Piece], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of our model -> those of transformers. InteropError names what does not fit."""
    return _rename([(p.ours, p.theirs, p.size) for p in table], ours)


def to_ours(table: Iterable[Piece], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of transformers -> those of our model. InteropError names what does not fit."""
    return _rename([(p.theirs, p.ours, p.size) for p in table], theirs)


def _rename(table: list[tuple[str, str, tuple[int, ...]]], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the source's tensors into pieces and join them under their new names; every tensor is used, and copied."""
    rows: dict[str, int] = {}
    for name, _, size in table:
        rows[name] = rows.get(name, 0) + size[0]
    missing, foreign = rows.keys() - source.keys(), source.keys() - rows.keys()
    if missing:
        raise InteropError(f"{len(missing)} tensors are missing, e.g. {sorted(missing)[0]}")
    if foreign:
        raise InteropError(f"{len(foreign)} tensors have no place in the model, e.g. {sorted(foreign)[0]}")
    start = dict.fromkeys(rows, 0)
    parts: dict[str, list[Tensor]] = {}
    for name, new, size in table:
        tensor = source[name]
        expected = (rows[name], *size[1:])
        if tuple(tensor.shape) != expected:
            raise InteropError(f"{name} has shape {tuple(tensor.shape)} where the configuration gives {expected}")
        parts.setdefault(new, []).append(tensor[start[name] : start[name] + size[0]])
        start[name] += size[0]
    return {new: torch.cat(tensors) for new, tensors in parts.items()}
