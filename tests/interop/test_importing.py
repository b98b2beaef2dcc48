"""Folders written by transformers, and damaged ones, as models of ours."""

import json
import random
from functools import partial

import pytest
import torch
from made import TOLERANCE, liven, make_model, random_shape, random_tokens, write_run

from xlstm_scaling.cli import run_command
from xlstm_scaling.inference.benchmark import measure
from xlstm_scaling.inference.cells import BenchmarkModel
from xlstm_scaling.inference.generation import generate
from xlstm_scaling.interop.errors import InteropError
from xlstm_scaling.interop.exporting import export_huggingface
from xlstm_scaling.interop.importing import import_huggingface
from xlstm_scaling.interop.model_folder import describe, load_model, load_weights
from xlstm_scaling.training.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")
no_init_weights = pytest.importorskip("transformers.initialization").no_init_weights


def random_config(arch, seed):
    """A configuration of transformers that ours can hold, with what our own exports never write."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 4])
    common = {"vocab_size": draw.choice([37, 101, 285]), "num_hidden_layers": draw.randint(1, 3), "eos_token_id": 3}
    if arch == "llama":
        head_dim = draw.choice([16, 24, 64])
        return transformers.LlamaConfig(
            **common, hidden_size=heads * draw.choice([16, 40]), head_dim=head_dim, num_attention_heads=heads,
            intermediate_size=draw.randint(20, 200), rms_norm_eps=0.02,
            rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        )  # fmt: skip
    width = heads * draw.choice([16, 40, 64])
    return transformers.xLSTMConfig(
        **common, hidden_size=width, num_heads=heads, num_blocks=common["num_hidden_layers"], norm_eps=0.02,
        qk_dim_factor=draw.choice([0.5, 0.25, 1.0]), v_dim_factor=draw.choice([1.0, 2.0]), use_cache=False,
        ffn_proj_factor=draw.choice([2.667, 1.3]), ffn_round_up_to_multiple_of=draw.choice([64, 7]),
        output_logit_soft_cap=9.0, weight_mode=["single", "fused"][seed % 2],
    )  # fmt: skip


def save(folder, config, seed=0, **arguments):
    with no_init_weights():  # transformers' initialisation of fused gates does not run
        model = liven(transformers.AutoModelForCausalLM.from_config(config), seed)
    model.save_pretrained(folder, **arguments)
    return model


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("arch", ["xlstm", "llama"])
@torch.no_grad()
def test_logits_are_those_of_transformers(arch, seed, tmp_path):
    theirs = save(tmp_path / "hf", random_config(arch, seed), seed)
    description = import_huggingface(tmp_path / "hf", tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    assert model.num_params() == theirs.num_parameters() == description.source["num_params"]
    tokens = random_tokens(theirs.config.vocab_size, length=65 + seed, seed=seed)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    assert (model(tokens) - expected).abs().max() < TOLERANCE
    prompt = tokens[:, :9]
    got = theirs.generate(prompt, max_new_tokens=8, pad_token_id=3, use_cache=arch == "llama")
    assert torch.equal(got, generate(model, prompt, 8, eod_id=3))


@torch.no_grad()
def test_shards_of_bf16(tmp_path):
    config = random_config("llama", 1)
    config.hidden_size, config.num_hidden_layers = 64, 3
    liven(transformers.LlamaForCausalLM(config), 0).bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    description = import_huggingface(tmp_path / "hf", tmp_path / "ours", compute_dtype="bfloat16")
    assert description.source["weights_dtype"] == ["bfloat16"]
    assert {weight.dtype for weight in load_weights(tmp_path / "ours").values()} == {torch.bfloat16}
    model = load_model(tmp_path / "ours", compute_dtype="float32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokens = random_tokens(config.vocab_size)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert (model(tokens) - theirs(tokens).logits).abs().max() < TOLERANCE
    assert load_model(tmp_path / "ours").compute_dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ["xlstm", "transformer"])
def test_a_run_comes_back_bit_for_bit_and_goes_out_again(arch, tmp_path):
    model = make_model(random_shape(arch, 1), logit_cap=17.0)
    run = write_run(tmp_path, "run", model, {"logit_cap": 17.0})
    export_huggingface(run, tmp_path / "hf", tmp_path / "tokens" / "tiny", ignore_logit_cap=True)
    cap = 17.0 if arch == "transformer" else None
    import_huggingface(tmp_path / "hf", tmp_path / "ours", logit_cap=cap)
    back, tokens = load_model(tmp_path / "ours"), random_tokens(model.shape.vocab_size)
    assert back.shape == model.shape
    assert torch.equal(back(tokens), model(tokens))
    assert torch.equal(load_model(run)(tokens), model(tokens))
    export_huggingface(tmp_path / "ours", tmp_path / "again", ignore_logit_cap=True)
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_a_cap_that_was_left_out_stays_out_unless_asked_for(tmp_path, caplog):
    model = make_model(random_shape("transformer", 1))
    export_huggingface(write_run(tmp_path, "run", model, {}), tmp_path / "hf", ignore_logit_cap=True)
    assert import_huggingface(tmp_path / "hf", tmp_path / "ours").options["logit_cap"] is None
    assert "--logit-cap 30.0 restores it" in caplog.text
    with pytest.raises(InteropError, match="must be positive"):
        import_huggingface(tmp_path / "hf", tmp_path / "other", logit_cap=-1.0)


@torch.no_grad()
def test_imported_models_are_evaluated_and_benchmarked(tmp_path):
    config = random_config("xlstm", 2)
    config.v_dim_factor = 1.0
    theirs = save(tmp_path / "hf", config)
    import_huggingface(tmp_path / "hf", tmp_path / "ours")
    model, shape = load_model(tmp_path / "ours"), describe(tmp_path / "ours").shape
    tokens = random_tokens(shape.vocab_size)
    loss = theirs(tokens, labels=tokens).loss
    assert abs(model.loss(tokens[:, :-1], tokens[:, 1:]) - loss) < 1e-5
    entry = BenchmarkModel("imported", shape.arch, shape, trained=True, build=partial(load_model, tmp_path / "ours"))
    config = {"prefill_lengths": [8], "batch_sizes": [1], "generate_steps": 2, "repeats": 1, "warmup": 1,
              "max_cell_s": 60.0, "num_threads": 1, "dtype": "float32"}  # fmt: skip
    table = measure([entry], config, tmp_path / "measured", progress=False)
    assert table.status.tolist() == ["ok"]
    assert table.num_params.tolist() == [theirs.num_parameters()]


def test_damaged_and_foreign_folders(tmp_path, capsys):
    source, target = tmp_path / "hf", tmp_path / "ours"

    def refused(message):
        assert run_command(["import", str(source), str(target)]) == 1
        assert message in capsys.readouterr().err
        assert not target.exists()

    refused("has no config.json")
    theirs = save(source, random_config("llama", 2), max_shard_size="20KB")
    shards = sorted(source.glob("model-*.safetensors"))
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[: len(content) // 2])
    refused(f"{shards[0].name} is truncated")
    shards[0].unlink()
    refused(f"shards are missing in {source}, e.g. {shards[0].name}")
    shards[0].write_bytes(content)
    index = source / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    refused("not a file of the folder")
    index.write_text("{")
    refused("not valid JSON")
    index.write_text(json.dumps(whole))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 999}))
    refused("where the configuration gives (999")
    (source / "config.json").write_text(json.dumps(config))
    assert run_command(["import", str(source), str(target)]) == 0
    assert f"{theirs.num_parameters():,} parameters" in capsys.readouterr().out
    for path in (*shards, index):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    target = tmp_path / "other"
    refused("save the model with safetensors")


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a run"):
        load_model(tmp_path)
    model = make_model(random_shape("xlstm", 0))
    run = write_run(tmp_path, "run", model, {})
    content = (run / "final.ckpt").read_bytes()
    (run / "final.ckpt").write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(run)
    (run / "final.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="let the run finish"):
        load_model(run)
    (run / "model.json").write_text('{"format_version": 99}')
    with pytest.raises(InteropError, match="format 99"):
        load_model(run)
