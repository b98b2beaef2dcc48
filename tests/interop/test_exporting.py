"""Exported folders in the hands of transformers: logits, greedy generation, tokenizer; what is refused."""

import json
import sys

import pytest
import torch
from made import EOD, TEXT, TOLERANCE, make_model, random_shape, random_tokens, write_run

from xlstm_scaling.accounting import make_shape
from xlstm_scaling.cli import run_command
from xlstm_scaling.corpus.tokenizer import train_tokenizer
from xlstm_scaling.inference.generation import generate
from xlstm_scaling.interop.configurations import NO_INFERENCE_CHUNKS
from xlstm_scaling.interop.errors import InteropError
from xlstm_scaling.interop.exporting import check_export, export_huggingface
from xlstm_scaling.interop.huggingface_files import read_weights
from xlstm_scaling.kernels.cross_entropy import soft_cap

transformers = pytest.importorskip("transformers")

CLASSES = {"xlstm": "xLSTMForCausalLM", "transformer": "LlamaForCausalLM"}
OPTIONS = {
    "xlstm": {"logit_cap": 12.0, "norm_eps": 0.03},
    "transformer": {"logit_cap": None, "norm_eps": 0.03, "rope_theta": 700.0},
}
CASES = [("xlstm", seed, cached) for seed in range(4) for cached in (False, True)]
CASES += [("transformer", seed, True) for seed in range(5)]


def export(tmp_path, model, options, **arguments):
    run = write_run(tmp_path / "results", "run", model, options)
    notes = export_huggingface(run, tmp_path / "hf", tmp_path / "results" / "tokens" / "tiny", **arguments)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), notes


@pytest.mark.parametrize(("arch", "seed", "cached"), CASES)
@torch.no_grad()
def test_logits_and_greedy_generation_are_ours(arch, seed, cached, tmp_path):
    model = make_model(random_shape(arch, seed, cached), seed, **OPTIONS[arch])
    theirs, notes = export(tmp_path, model, OPTIONS[arch])
    assert type(theirs).__name__ == CLASSES[arch]
    assert theirs.num_parameters() == model.num_params()
    assert theirs.config.use_cache == theirs.generation_config.use_cache == cached == (not notes)
    tokens = random_tokens(model.shape.vocab_size, length=65 + 7 * seed, seed=seed)
    expected = model(tokens)
    assert expected.std() > 0.3
    assert (theirs(tokens).logits - expected).abs().max() < TOLERANCE
    prompt, eod = tokens[:, : 1 + 5 * seed], theirs.generation_config.eos_token_id
    assert torch.equal(theirs.generate(prompt, max_new_tokens=12), generate(model, prompt, 12, eod_id=eod))
    assert theirs.generation_config.pad_token_id == eod


@torch.no_grad()
def test_a_left_out_cap_changes_logits_and_not_what_is_likeliest(tmp_path):
    model = make_model(make_shape("transformer", 32, 2, 2, 37), logit_cap=2.0)
    theirs, (note,) = export(tmp_path, model, {"logit_cap": 2.0}, ignore_logit_cap=True)
    assert theirs.config.ignored_logit_cap == 2.0
    assert "2 * tanh(logits / 2)" in note
    assert note in (tmp_path / "hf" / "README.md").read_text()
    tokens = random_tokens(37)
    logits, expected = theirs(tokens).logits, model(tokens)
    assert (logits - expected).abs().max() > 0.1
    assert (soft_cap(logits, 2.0) - expected).abs().max() < TOLERANCE
    assert torch.equal(theirs.generate(tokens, max_new_tokens=20), generate(model, tokens, 20, eod_id=0))
    assert check_export(tmp_path / "results" / "runs" / "run", tmp_path / "hf") < TOLERANCE


def test_tokenizer_is_that_of_the_tokens(tmp_path):
    export(tmp_path, make_model(make_shape("xlstm", 16, 1, 1, 270)), {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = train_tokenizer([TEXT], {"vocab_size": 270})
    text = "Peace, 1941: déjà vu\n\n  the state "
    (expected,) = ours.encode([text])
    assert tokenizer(text).input_ids == expected.tolist()[:-1]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOD, ours.eod_id)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == ours.eod_id
    assert config["exported_from"]["run_id"] == "run"


def test_long_prompts_are_not_cut_where_the_cache_does_not_fit(tmp_path):
    theirs, _ = export(tmp_path, make_model(make_shape("xlstm", 16, 1, 1, 37)), {})
    assert theirs.config.max_inference_chunksize == NO_INFERENCE_CHUNKS


@torch.no_grad()
def test_rounded_weights(tmp_path):
    model = make_model(make_shape("transformer", 32, 1, 2, 37), logit_cap=None)
    theirs, notes = export(tmp_path, model, {"logit_cap": None}, dtype="bfloat16")
    assert theirs.dtype == torch.bfloat16
    assert "rounded to bfloat16" in notes[0]
    assert torch.equal(theirs.lm_head.weight, model.head.weight.bfloat16())
    assert check_export(tmp_path / "results" / "runs" / "run", tmp_path / "hf") < TOLERANCE


def test_a_check_finds_an_altered_export(tmp_path):
    model = make_model(make_shape("xlstm", 32, 1, 2, 37))
    theirs, _ = export(tmp_path, model, {})
    with torch.no_grad():
        theirs.backbone.blocks[0].mlstm_layer.fgate_preact.bias.add_(1.0)
    theirs.save_pretrained(tmp_path / "altered")
    with pytest.raises(InteropError, match="do not use"):
        check_export(tmp_path / "results" / "runs" / "run", tmp_path / "altered")


def test_what_to_install_is_said(tmp_path, monkeypatch):
    run = write_run(tmp_path, "run", make_model(make_shape("xlstm", 16, 1, 1, 37)), {})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InteropError, match=r"needs transformers; .* pip install 'xlstm-scaling\[hf\]'"):
        export_huggingface(run, tmp_path / "hf", with_tokenizer=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "hf").mkdir()
    with pytest.raises(InteropError, match="needs safetensors"):
        read_weights(tmp_path / "hf")


def test_command_line(tmp_path, capsys):
    model = make_model(make_shape("transformer", 16, 1, 1, 270), logit_cap=30.0)
    results, target = tmp_path / "results", tmp_path / "hf"
    write_run(results, "transformer-d16-aa", model, {})
    write_run(results, "transformer-d16-ab", model, {})
    arguments = [str(target), "--results", str(results)]
    for run, message in (
        ("d16-a", "2 runs match"),
        ("d17", "no run under"),
        ("d16-aa", "--ignore-logit-cap"),
    ):
        assert run_command(["export", run, *arguments]) == 1
        assert message in capsys.readouterr().err
        assert not target.exists()
    assert run_command(["export", "d16-aa", *arguments, "--ignore-logit-cap", "--check"]) == 0
    assert "logits agree" in capsys.readouterr().out
    assert run_command(["export", "d16-aa", *arguments, "--ignore-logit-cap"]) == 1
    assert "not empty" in capsys.readouterr().err
    (results / "tokens" / "tiny" / "tokenizer.json").unlink()
    arguments[0] = str(tmp_path / "other")
    assert run_command(["export", "d16-aa", *arguments, "--ignore-logit-cap"]) == 1
    assert "no tokenizer of tiny" in capsys.readouterr().err
    assert run_command(["export", "d16-aa", *arguments, "--ignore-logit-cap", "--without-tokenizer"]) == 0
    assert not (tmp_path / "other" / "tokenizer.json").exists()
