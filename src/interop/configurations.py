"""Configurations of transformers' xLSTM and Llama against ours, both ways; what has no counterpart is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.accounting.shapes import ceil_to_multiple
from xlstm_scaling.interop.errors import InteropError, refuse
from xlstm_scaling.interop.model_folder import ModelDescription
from xlstm_scaling.kernels.mlstm.state import EPS
from xlstm_scaling.models.language_model import LOGIT_CAP
from xlstm_scaling.models.layers import NORM_EPS
from xlstm_scaling.models.transformer import ROPE_THETA
from xlstm_scaling.models.xlstm import GATE_CAP

#: what the sizes of transformers' xLSTM cache are rounded up to; the layers themselves are not rounded
CACHE_MULTIPLE = 64
#: of our options: how a model is computed or initialised, which no other program needs to know
EXECUTION_OPTIONS = frozenset({"kernel_form", "kernel_backend", "kernel_chunk_size", "input_gate_bias"})
CARRIED_OPTIONS = {"xlstm": {"logit_cap", "norm_eps"}, "transformer": {"logit_cap", "norm_eps", "rope_theta"}}
#: chunk that an imported xLSTM's FLOPs are counted at, where its configuration has none [tokens]
CHUNK_SIZE = 64
#: prompts of transformers' xLSTM longer than this are read with states in the cache's dtype, bf16 by default
NO_INFERENCE_CHUNKS = 2**31 - 1


@dataclass(frozen=True)
class Exported:
    """``model_type`` and fields of a configuration of transformers, and what its readers should know."""

    model_type: str
    fields: dict[str, Any]
    use_cache: bool
    notes: list[str]


# ours -> theirs


def export_configuration(description: ModelDescription, ignore_logit_cap: bool = False) -> Exported:
    """The configuration that computes what our model computes. InteropError names what transformers cannot hold.

    ``ignore_logit_cap``: leave out a Transformer's soft cap, which Llama does not have; the notes say so.
    """
    shape, options = description.shape, description.options
    known = {"xlstm": _export_xlstm, "transformer": _export_llama}
    if shape.arch not in known:
        raise refuse("arch", shape.arch, f"transformers counterparts are known for {', '.join(known)}")
    for name in sorted(options.keys() - EXECUTION_OPTIONS - CARRIED_OPTIONS[shape.arch]):
        raise refuse(f"model option {name}", options[name], "it has no counterpart in transformers")
    return known[shape.arch](description, ignore_logit_cap)


def factor_for(width: int, dim: int) -> float:
    """A factor f with int(width · f) = dim, dim / width where that is exact enough."""
    return next(f for f in (dim / width, (dim + 0.5) / width) if int(width * f) == dim)


def feed_forward_dim(width: int, factor: float, multiple: int) -> int:
    """The width of transformers' xLSTM feed-forward: width · factor in floating point, rounded up to ``multiple``."""
    return int((width * factor + multiple - 1) // multiple * multiple)


def _export_xlstm(description: ModelDescription, ignore_logit_cap: bool) -> Exported:
    shape, options = description.shape, description.options
    d, heads = shape.embedding_dim, shape.num_heads
    cap = options.get("logit_cap", LOGIT_CAP)
    if cap is None:
        raise refuse("logit_cap", cap, "xLSTMForCausalLM always caps its logits; train with a logit_cap to export")
    qk, v = heads * shape.head_dim_qk, heads * shape.head_dim_v
    ffn = (2.667, 64)
    if feed_forward_dim(d, *ffn) != shape.ffn_dim:
        ffn = (factor_for(d, shape.ffn_dim), 1)
    unrounded = [f"{n} = {dim}" for n, dim in (("qk_dim", qk), ("v_dim", v)) if dim % CACHE_MULTIPLE]
    notes = []
    if unrounded:
        nearest = ", ".join(
            f"{n} = {ceil_to_multiple(dim, CACHE_MULTIPLE)}"
            for n, dim in (("qk_dim", qk), ("v_dim", v))
            if dim % CACHE_MULTIPLE
        )
        notes.append(
            f"use_cache is false: transformers makes its xLSTM cache for sizes rounded up to {CACHE_MULTIPLE} "
            f"({nearest}), this model has {', '.join(unrounded)}, and a forward pass with a cache fails. Logits and "
            "generation are right without one; generation reads the whole sequence again for every token."
        )
    fields = {
        "hidden_size": d,
        "embedding_dim": d,
        "num_hidden_layers": shape.num_blocks,
        "num_blocks": shape.num_blocks,
        "num_heads": heads,
        "use_bias": False,
        "add_out_norm": True,
        "norm_eps": options.get("norm_eps", NORM_EPS),
        "norm_reduction_force_float32": True,
        "qk_dim_factor": factor_for(d, qk),
        "v_dim_factor": factor_for(d, v),
        "chunk_size": shape.chunk_size or CHUNK_SIZE,
        "mode": "inference",
        "return_last_states": True,
        "autocast_kernel_dtype": description.compute_dtype,
        "inference_state_dtype": "float32",
        "eps": EPS,
        "ffn_proj_factor": ffn[0],
        "ffn_round_up_to_multiple_of": ffn[1],
        "gate_soft_cap": GATE_CAP,
        "output_logit_soft_cap": float(cap),
        "weight_mode": "single",
        **({"max_inference_chunksize": NO_INFERENCE_CHUNKS} if unrounded else {}),
    }
    return Exported("xlstm", fields, not unrounded, notes)


def _export_llama(description: ModelDescription, ignore_logit_cap: bool) -> Exported:
    shape, options = description.shape, description.options
    cap = options.get("logit_cap", LOGIT_CAP)
    notes = []
    if cap is not None and not ignore_logit_cap:
        raise refuse(
            "logit_cap", cap,
            "LlamaForCausalLM has no soft cap on its logits. Pass --ignore-logit-cap to export without it: greedy "
            "generation stays the same, losses and sampling do not",
        )  # fmt: skip
    if cap is not None:
        notes.append(
            f"the logits lack the soft cap the model was trained with: {cap:g} * tanh(logits / {cap:g}) gives the "
            "model's own. Greedy generation is the same without it; losses, probabilities and sampling are not."
        )
    if shape.embedding_dim % shape.num_heads:
        raise refuse(
            "num_heads", shape.num_heads, f"LlamaConfig wants a divisor of hidden_size = {shape.embedding_dim}"
        )
    if shape.head_dim_qk != shape.head_dim_v:
        raise refuse("head_dim_qk", shape.head_dim_qk, f"Llama has one head_dim, head_dim_v is {shape.head_dim_v}")
    fields = {
        "hidden_size": shape.embedding_dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.num_blocks,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "head_dim": shape.head_dim_v,
        "hidden_act": "silu",
        "rms_norm_eps": options.get("norm_eps", NORM_EPS),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(options.get("rope_theta", ROPE_THETA))},
        "attention_bias": False,
        "mlp_bias": False,
        **({"max_position_embeddings": description.context_length} if description.context_length else {}),
        **({} if cap is None else {"ignored_logit_cap": float(cap)}),
    }
    return Exported("llama", fields, True, notes)


# theirs -> ours


@dataclass(frozen=True)
class Imported:
    """Shape and options of our model, and how its weights are laid out over there."""

    shape: ModelShape
    options: dict[str, Any]
    weight_mode: str = "single"
    context_length: int | None = None


def import_configuration(config: Mapping[str, Any]) -> Imported:
    """``config.json`` of transformers -> our model. InteropError names the field that our models cannot represent.

    Fields that are absent have transformers' defaults. Kernels, dtypes and caches are execution, and are not carried.
    """
    known = {"xlstm": _import_xlstm, "llama": _import_llama}
    model_type = config.get("model_type")
    if model_type not in known:
        raise refuse("model_type", model_type, f"known are {', '.join(known)}")
    _only(config, "quantization_config", (None,), "export the model without quantization first")
    _only(config, "tie_word_embeddings", (False, None), "the head has weights of its own here, and they are counted")
    return known[model_type](config)


#: fields of transformers' xLSTM (and of the first releases' configurations) that have one meaning here
XLSTM_FIXED: tuple[tuple[str, tuple, str], ...] = (
    ("use_bias", (False,), "only gates have biases here"),
    ("add_out_norm", (True,), "the head reads normed activations here"),
    ("add_post_blocks_norm", (True,), "the head reads normed activations here"),
    ("add_post_norm", (False,), "blocks are normed before, not after"),
    ("add_qk_norm", (False,), "queries and keys are not normed here"),
    ("add_embedding_dropout", (False,), "there is no dropout here"),
    ("eps", (EPS,), "the kernels of the cell have it built in"),
    ("gate_soft_cap", (GATE_CAP,), "the cap of the gates is fixed here"),
)


def _import_xlstm(config: Mapping[str, Any]) -> Imported:
    for name, allowed, why in XLSTM_FIXED:
        _only(config, name, allowed, why)
    d = _same(config, "hidden_size", "embedding_dim")
    blocks = _same(config, "num_hidden_layers", "num_blocks")
    heads, vocab = _integer(config, "num_heads"), _integer(config, "vocab_size")
    weight_mode = config.get("weight_mode", "single")
    if weight_mode not in ("single", "fused"):
        raise refuse("weight_mode", weight_mode, "known are single and fused")
    dims = {}
    for name, default in (("qk_dim_factor", 0.5), ("v_dim_factor", 1.0)):
        factor = _number(config, name, default)
        dim = int(d * factor)
        if dim < heads or dim % heads:
            nearest = max(1, round(d * factor / heads)) * heads
            reason = (
                f"{dim} channels do not divide into num_heads = {heads}; the nearest that do are {nearest} "
                f"({name} = {nearest / d:g})"
            )
            raise refuse(name, factor, reason)
        dims[name] = dim // heads
    multiple = _integer(config, "ffn_round_up_to_multiple_of", 64)
    shape = ModelShape(
        arch="xlstm",
        embedding_dim=d,
        num_blocks=blocks,
        num_heads=heads,
        head_dim_qk=dims["qk_dim_factor"],
        head_dim_v=dims["v_dim_factor"],
        ffn_dim=feed_forward_dim(d, _number(config, "ffn_proj_factor", 2.667), multiple),
        vocab_size=vocab,
        chunk_size=_integer(config, "chunk_size", CHUNK_SIZE),
    )
    cap = config.get("output_logit_soft_cap", 30.0)
    options = {"logit_cap": None if cap is None else _number(config, "output_logit_soft_cap", 30.0)}
    return Imported(shape, options | {"norm_eps": _number(config, "norm_eps", 1e-6)}, weight_mode)


def _import_llama(config: Mapping[str, Any]) -> Imported:
    _only(config, "hidden_act", ("silu", "swish"), "the gate of the feed-forward is a SiLU here")
    _only(config, "attention_bias", (False,), "attention has no biases here")
    _only(config, "mlp_bias", (False,), "the feed-forward has no biases here")
    d, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    if config.get("num_key_value_heads") not in (None, heads):
        raise refuse(
            "num_key_value_heads", config["num_key_value_heads"],
            f"attention is without grouped queries here, only {heads} (= num_attention_heads) will do",
        )  # fmt: skip
    head_dim = config.get("head_dim")
    if head_dim is None:
        if d % heads:
            raise refuse("num_attention_heads", heads, f"it does not divide hidden_size = {d}")
        head_dim = d // heads
    if head_dim % 2:
        raise refuse("head_dim", head_dim, "rotary positions turn pairs of channels; it must be even")
    shape = ModelShape(
        arch="transformer",
        embedding_dim=d,
        num_blocks=_integer(config, "num_hidden_layers"),
        num_heads=heads,
        head_dim_qk=head_dim,
        head_dim_v=head_dim,
        ffn_dim=_integer(config, "intermediate_size"),
        vocab_size=_integer(config, "vocab_size"),
    )
    norm_eps = _number(config, "rms_norm_eps", 1e-6)
    options = {"logit_cap": None, "norm_eps": norm_eps, "rope_theta": _rope_theta(config)}
    return Imported(shape, options, context_length=config.get("max_position_embeddings"))


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of plain rotary positions, from ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise refuse("rope_type", kind, "positions are rotated without scaling here, rope_type = 'default'")
    for source in (rope, config):
        _only(source, "partial_rotary_factor", (1, None), "all channels of a head are rotated here")
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _only(config: Mapping[str, Any], name: str, allowed: tuple, why: str) -> None:
    """Refuse a field that is there with another value than those allowed."""
    if name in config and config[name] not in allowed:
        raise refuse(name, config[name], f"{why} (only {name} = {allowed[0]!r})")


def _same(config: Mapping[str, Any], name: str, other: str) -> int:
    """An integer that goes by two names, which must agree where both are there."""
    values = {key: config[key] for key in (name, other) if config.get(key) is not None}
    if len(set(values.values())) > 1:
        raise refuse(other, values[other], f"{name} is {values[name]}, and it means the same")
    return _integer({name: next(iter(values.values()), None)}, name)


def _integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InteropError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InteropError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)
