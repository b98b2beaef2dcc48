"""Shapes and options both ways, the released 7B model, and what each side refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_scaling.accounting import count_params, make_shape
from xlstm_scaling.interop.configurations import (
    export_configuration,
    factor_for,
    feed_forward_dim,
    import_configuration,
)
from xlstm_scaling.interop.errors import InteropError
from xlstm_scaling.interop.model_folder import ModelDescription

#: the fields of NX-AI/xLSTM-7b's config.json that say something about the model
RELEASED = {
    "model_type": "xlstm", "architectures": ["xLSTMForCausalLM"], "vocab_size": 50304, "embedding_dim": 4096,
    "num_blocks": 32, "num_heads": 8, "head_dim": 512, "qk_dim_factor": 0.5, "v_dim_factor": 1.0,
    "mlstm_round_up_to_multiple_of": 64, "ffn_proj_factor": 2.667, "ffn_round_up_to_multiple_of": 64,
    "norm_eps": 1e-06, "cell_norm_eps": 1e-06, "eps": 1e-06, "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0,
    "igate_bias_init_range": -10.0, "add_out_norm": True, "add_post_blocks_norm": True, "add_post_norm": False,
    "add_qk_norm": False, "add_embedding_dropout": False, "use_bias": False, "tie_word_embeddings": False,
    "weight_mode": "single", "chunk_size": 64, "chunkwise_kernel": "chunkwise--triton_xl_chunk",
    "sequence_kernel": "native_sequence__triton", "step_kernel": "triton", "mode": "inference",
    "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
    "rms_norm_eps": 1e-05, "rope_scaling": None, "pretraining_tp": 1, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "torch_dtype": "float16",
}  # fmt: skip


def test_the_released_7b_is_our_7b():
    plan = import_configuration(RELEASED)
    assert plan.shape == make_shape("xlstm", 4096, 32, 8, 50304)
    assert plan.options == {"logit_cap": 30.0, "norm_eps": 1e-6}
    assert round(count_params(plan.shape) / 1e9, 2) == 6.87


def test_llama_2_7b():
    plan = import_configuration(LLAMA)
    assert count_params(plan.shape) == 6_738_415_616
    assert plan.options == {"logit_cap": None, "norm_eps": 1e-5, "rope_theta": 10_000.0}
    assert plan.context_length == 4096


@given(width=st.integers(1, 20_000), dim=st.integers(1, 60_000))
def test_every_width_has_a_factor(width, dim):
    factor = factor_for(width, dim)
    assert int(width * factor) == feed_forward_dim(width, factor, 1) == dim
    assert abs(factor * width - dim) < 1


@given(width=st.integers(1, 300), heads=st.integers(1, 8), qk=st.integers(1, 70), v=st.integers(1, 70),
       ffn=st.integers(1, 900))  # fmt: skip
def test_xlstm_shapes_survive_the_way_there_and_back(width, heads, qk, v, ffn):
    shape = {"arch": "xlstm", "embedding_dim": width, "num_blocks": 2, "num_heads": heads, "head_dim_qk": qk,
             "head_dim_v": v, "ffn_dim": ffn, "vocab_size": 11, "chunk_size": 32}  # fmt: skip
    shape = type(make_shape("xlstm", 8, 1, 1, 8))(**shape)
    exported = export_configuration(ModelDescription(shape, {"norm_eps": 1e-3, "logit_cap": 20}))
    plan = import_configuration(exported.fields | {"model_type": "xlstm", "vocab_size": 11})
    assert plan.shape == shape
    assert plan.options == {"norm_eps": 1e-3, "logit_cap": 20.0}
    assert exported.use_cache == (heads * qk % 64 == 0 and heads * v % 64 == 0)


def test_sizes_that_the_cache_rounds_are_said_with_the_nearest():
    exported = export_configuration(ModelDescription(make_shape("xlstm", 112, 2, 2, 11), {}))
    assert "qk_dim = 64, v_dim = 128" in exported.notes[0]
    assert "qk_dim = 56, v_dim = 112" in exported.notes[0]


REFUSED_XLSTM = [
    ("use_bias", True), ("add_out_norm", False), ("add_post_blocks_norm", False), ("add_post_norm", True),
    ("add_qk_norm", True), ("eps", 1e-5), ("gate_soft_cap", 20.0), ("tie_word_embeddings", True),
    ("weight_mode", "other"), ("hidden_size", 2048), ("num_hidden_layers", 30), ("qk_dim_factor", 0.3),
    ("v_dim_factor", 0.0001), ("ffn_proj_factor", -1), ("num_heads", 0), ("vocab_size", None),
    ("quantization_config", {"bits": 4}), ("model_type", "mamba"), ("norm_eps", "1e-6"),
]  # fmt: skip
REFUSED_LLAMA = [
    ("num_key_value_heads", 8), ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True),
    ("tie_word_embeddings", True), ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5}), ("partial_rotary_factor", 0.5),
    ("num_attention_heads", 33), ("head_dim", 127), ("rms_norm_eps", 0), ("hidden_size", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [(RELEASED, *case) for case in REFUSED_XLSTM] + [(LLAMA, *case) for case in REFUSED_LLAMA],
    ids=lambda x: str(x)[:24] if not isinstance(x, dict) else "",
)
def test_import_refuses_by_field_and_value(base, name, value):
    names = {"rope_scaling": "rope_type", "rope_parameters": "rope_type", "hidden_size": "embedding_dim|hidden_size",
             "num_hidden_layers": "num_blocks", "num_attention_heads": "num_key_value_heads"}  # fmt: skip
    with pytest.raises(InteropError, match=names.get(name, name)):
        import_configuration(base | {name: value})


def test_the_nearest_factor_is_named():
    with pytest.raises(InteropError, match=r"1228 channels .* nearest that do are 1232 \(qk_dim_factor = 0.300781\)"):
        import_configuration(RELEASED | {"qk_dim_factor": 0.3})


XLSTM, TRANSFORMER = make_shape("xlstm", 64, 1, 2, 11), make_shape("transformer", 64, 1, 2, 11)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (TRANSFORMER, {}, r"logit_cap = 30.0 .* --ignore-logit-cap"),
        (TRANSFORMER, {"logit_cap": 20.0}, "logit_cap = 20.0"),
        (XLSTM, {"logit_cap": None}, "logit_cap = None"),
        (XLSTM, {"forget_gate": "exponential"}, "forget_gate = 'exponential'"),
        (XLSTM, {"rope_theta": 1e4}, "rope_theta"),
        (make_shape("transformer", 64, 1, 2, 11).__class__("mamba", 8, 1, 1, 8, 8, 8, 8), {}, "arch = 'mamba'"),
    ],
)
def test_export_refuses_by_field_and_value(shape, options, message):
    with pytest.raises(InteropError, match=message):
        export_configuration(ModelDescription(shape, options))


def test_how_a_model_is_computed_is_no_obstacle():
    options = {"kernel_form": "chunkwise", "kernel_chunk_size": 16, "kernel_backend": "auto", "input_gate_bias": -8.0}
    assert export_configuration(ModelDescription(XLSTM, options)).fields["output_logit_soft_cap"] == 30.0
