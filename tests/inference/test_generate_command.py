"""The command `generate`: of a run that is trained here, of imported models, and what it refuses."""

import io
import json
import re

import pytest
import torch

from xlstm_scaling import stages
from xlstm_scaling.accounting import make_shape
from xlstm_scaling.cli import run_command
from xlstm_scaling.corpus.tokenizer import train_tokenizer
from xlstm_scaling.inference import timing
from xlstm_scaling.inference.command import Text, TextStream, check_memory
from xlstm_scaling.inference.generation import generate
from xlstm_scaling.interop.model_folder import ModelDescription, build_described, describe, load_model, save_model
from xlstm_scaling.models import build_model
from xlstm_scaling.study.config import to_dict
from xlstm_scaling.study.plan import plan_runs

TEXT = "the state of the union: déjà vu, naïve 😀 日本語 and so on "
EOD = "<|endoftext|>"


@pytest.fixture(scope="session")
def runs(tiny_config, tiny_tokens):
    """Architecture -> the id of its smallest run, trained."""
    chosen = {}
    for run in plan_runs(tiny_config):
        chosen.setdefault(run.arch, run)
    for run in chosen.values():
        stages.train(run, to_dict(tiny_config.hardware), tiny_tokens, progress=False, uncertified=True)
    return {arch: run.run_id for arch, run in chosen.items()}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """An imported model with random weights over a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("imported")
    tokenizer = train_tokenizer([TEXT * 5], {"vocab_size": 262, "eod_token": EOD})
    (folder / "tokenizer.json").write_bytes(tokenizer.content)
    shape = make_shape("transformer", 16, 1, 2, 262)
    save_model(folder, ModelDescription(shape, {}, eos_token=EOD), build_model(shape, seed=1).state_dict())
    return folder


def command(capsys, *words):
    status = run_command(["generate", *map(str, words)])
    return status, *capsys.readouterr()


def test_a_trained_run_continues_a_prompt(arch, runs, tiny_tokens, capsys):
    prompt = "the state of union"
    words = [runs[arch], "--prompt", prompt, "--max-tokens", 20, "--results", tiny_tokens]
    status, out, err = command(capsys, *words)
    assert status == 0
    assert re.search(
        r"\d+ tokens read, first token after [\d.e-]+ s; 20 tokens generated, [\d,.e+]+ tokens/s; (state|cache) of",
        err,
    )
    status, line, _ = command(capsys, *words, "--json", "--prefill-chunk", 2)
    row = json.loads(line)
    assert (status, len(row["tokens"]), row["stopped"], row["prompt"]) == (0, 20, "max_tokens", prompt)
    assert out == prompt + row["text"] + "\n"
    folder = tiny_tokens / "runs" / runs[arch]
    model, text = load_model(folder), Text(folder, describe(folder), tiny_tokens)
    ids = text.encode(prompt, "prompt")
    assert row["prompt_tokens"] == len(ids)
    assert generate(model, torch.from_numpy(ids), 20)[0, len(ids) :].tolist() == row["tokens"]
    by_torch = json.loads(command(capsys, *words, "--json", "--decoder", "torch")[1])
    assert by_torch["tokens"] == row["tokens"]
    assert text.decode(row["tokens"]) == row["text"]


def test_a_batch_is_its_prompts(arch, runs, tiny_tokens, capsys, monkeypatch, tmp_path):
    prompts = ["the", "the state of union is strong", "war and peace"]
    settings = ["--max-tokens", 9, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--results", tiny_tokens]
    alone = []
    for seed, prompt in enumerate(prompts, 5):
        words = [runs[arch], "--prompt", prompt, "--seed", seed, *settings]
        alone.append(json.loads(command(capsys, *words, "--json")[1]))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[1:]) + "\n")
    words = [runs[arch], "--prompt", prompts[0], "--prompt-file", tmp_path / "prompts.txt", "--seed", 5, *settings]
    assert [json.loads(line) for line in command(capsys, *words, "--json")[1].splitlines()] == alone
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(prompts)))
    _, out, _ = command(capsys, runs[arch], "--prompt-file", "-", "--seed", 5, *settings)
    assert out == "".join(f"[{i}] {row['prompt']}{row['text']}\n" for i, row in enumerate(alone, 1))


def test_generation_ends_with_the_document(imported, capsys):
    model = load_model(imported)
    with torch.no_grad():  # the end of document is the likeliest token, whatever was read
        model.head.weight.zero_()
    save_model(imported.parent / "ends", ModelDescription(model.shape, {}, eos_token=EOD), model.state_dict())
    (imported.parent / "ends" / "tokenizer.json").write_bytes((imported / "tokenizer.json").read_bytes())
    words = [imported.parent / "ends", "--prompt", "so", "--max-tokens", 5, "--json"]
    assert json.loads(command(capsys, *words)[1])["tokens"] == [0] * 5
    status, out, err = command(capsys, *words, "--stop-at-end-of-document")
    row = json.loads(out)
    assert (status, row["tokens"], row["text"], row["stopped"]) == (0, [0], "", "end_of_document")
    assert "no further token" in err


def test_text_comes_in_whole_characters(imported):
    text = Text(imported, ModelDescription(make_shape("xlstm", 16, 1, 1, 262), {}), imported)
    ids = text.encode(TEXT * 9, "prompt")
    assert len(ids) > 300
    printer = TextStream(text, ids[:3])
    pieces = [printer.push([token]) for token in ids[3:]]
    assert "�" not in "".join(pieces)
    assert sum(not piece for piece in pieces) > 50  # inside of characters
    assert text.decode(ids[:3]) + "".join(pieces) + printer.close() == TEXT * 9
    broken = [token for token in ids if token > 180][:1] * 7  # the same byte over and over is no character
    printer = TextStream(text, ids[:1])
    pieces = [printer.push([token]) for token in [*broken, *ids[:2]]]
    assert text.decode(ids[:1]) + "".join(pieces) + printer.close() == text.decode([*ids[:1], *broken, *ids[:2]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--prompt", "a"], "no folder with a model and no run"),
        (["MODEL"], "there is no prompt"),
        (["MODEL", "--prompt", ""], "the prompt is empty"),
        (["MODEL", "--prompt", "a", "--prompt", ""], "--prompt 2 is empty"),
        (["MODEL", "--prompt-file", "FILE"], "line 2 is empty"),
        (["MODEL", "--prompt-file", "missing.txt"], "missing.txt"),
        (["MODEL", "--prompt", "a", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["MODEL", "--prompt", "a", "--prefill-chunk", "0"], "--prefill-chunk must be at least 1"),
        (["MODEL", "--prompt", "a", "--temperature", "-1"], "temperature must be 0 (greedy) or positive"),
        (["MODEL", "--prompt", "a", "--temperature", "1", "--top-p", "2"], "top_p must lie in (0, 1]"),
        (["MODEL", "--prompt", "a", "--top-k", "3"], "give a --temperature above 0"),
        (["MODEL", "--prompt", "a", "--device", "cuda:99"], "CUDA devices"),
        (["MODEL", "--prompt", "a", "--device", "abacus"], "--device abacus"),
        (["MODEL", "--prompt", "a", "--max-tokens", str(10**12)], "GB of them the cache"),
        (["MODEL", "--prompt", "a", "--decoder", "graph"], "CUDA graphs need a GPU"),
        (["SMALL", "--prompt", "z"], "another model's tokenizer"),
        (["BARE", "--prompt", "a"], "no tokenizer.json in"),
        (["NAMELESS", "--prompt", "a", "--stop-at-end-of-document"], "does not say which token ends a document"),
    ],
)
def test_what_it_refuses(words, message, imported, tmp_path, capsys):
    (tmp_path / "file.txt").write_text("one\n\nthree\n")
    models = {"MODEL": imported, "FILE": tmp_path / "file.txt"}
    for name, vocab_size, tokenizer in (("SMALL", 40, True), ("BARE", 262, False), ("NAMELESS", 262, True)):
        models[name] = tmp_path / name
        shape = make_shape("transformer", 16, 1, 2, vocab_size)
        save_model(models[name], ModelDescription(shape, {}), build_model(shape, seed=1).state_dict())
        if tokenizer:
            (models[name] / "tokenizer.json").write_bytes((imported / "tokenizer.json").read_bytes())
    status, out, err = command(capsys, *(models.get(word, word) for word in words), "--results", tmp_path)
    assert (status, out) == (1, "")
    assert message in err


@pytest.mark.parametrize(("arch", "grows"), [("xlstm", False), ("transformer", True)])
def test_memory_is_estimated_beforehand(arch, grows, monkeypatch):
    shape = make_shape(arch, 64, 3, 4, 300)
    meta, device = build_described(ModelDescription(shape, {})), torch.device("cpu")
    real = build_model(shape, seed=0).init_state(2, 500)
    tensors = [x for one in real for x in (one if isinstance(one, tuple) else (one.k, one.v))]
    state = check_memory(meta, 2, 400, 100, 50, device)
    assert state == sum(x.nbytes for x in tensors)
    assert (check_memory(meta, 2, 400, 600, 50, device) == 2 * state) == grows
    weights = 4 * meta.num_params()
    monkeypatch.setattr(timing, "available_bytes", lambda device: weights + state - 1)
    with pytest.raises(ValueError, match="shorten or split the prompts"):
        check_memory(meta, 2, 400, 100, 400, device)


@pytest.mark.parametrize(("arch", "kept"), [("transformer", "cache"), ("hybrid", "state and cache")])
def test_the_mask_of_a_chunk_is_counted_wherever_a_block_attends(arch, kept, monkeypatch):
    shape = make_shape(arch, 64, 4, 4, 300)
    meta, device = build_described(ModelDescription(shape, {})), torch.device("cpu")
    needed = 4 * meta.num_params() + check_memory(meta, 2, 400, 100, 400, device)
    monkeypatch.setattr(timing, "available_bytes", lambda device: needed)
    check_memory(meta, 2, 400, 100, 400, device)  # a prompt at once needs none
    with pytest.raises(ValueError, match=f"GB of them the {kept}, and"):
        check_memory(meta, 2, 400, 100, 50, device)
