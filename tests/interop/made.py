"""Small models whose every parameter matters, of ours in run folders and of transformers in theirs."""

import json
import random

import torch

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.corpus.tokenizer import train_tokenizer
from xlstm_scaling.models import build_model
from xlstm_scaling.training.checkpoint import save_file

EOD = "<|endoftext|>"
TEXT = "the state of the union is strong; our people, 1941 and before, keep the peace " * 3
TOLERANCE = 1e-4  # of logits


def liven(model, seed):
    """Random weights that neither vanish nor saturate: products of unit scale, norms around 1, gates half open.

    Wide open input gates would divide by small normalisers, and show rounding instead of mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "embed" in name:
                p.copy_(noise)
            elif p.dim() == 2:
                p.copy_(noise / p.shape[1] ** 0.5)
            elif "norm" in name:
                p.copy_(1 + 0.4 * noise)
            elif "igate_preact" in name:
                p.copy_(noise - 3)
            elif "fgate_preact" in name and "ifgate" not in name:
                p.copy_(2 * noise)
            else:  # both gates of every head, the input gates first
                heads = p.numel() // 2
                p.copy_(torch.cat([noise[:heads] - 3, 2 * noise[heads:]]))
    return model.eval()


def random_shape(arch, seed, cached=False):
    """A shape with odd vocabulary, any feed-forward width, heads of 16 to 64 channels.

    ``cached``: xLSTM of sizes that transformers' cache can hold. Query and key channels are half of the value channels
    but for every third seed.
    """
    draw = random.Random(seed)
    heads, head_dim = draw.choice([1, 2, 4]), draw.choice([16, 32, 64])
    if cached:
        heads, head_dim = draw.choice([(1, 128), (2, 64), (4, 32)])
    qk = head_dim
    if arch == "xlstm":
        qk = head_dim // 2 if cached or seed % 3 else head_dim - 3
    return ModelShape(
        arch, heads * head_dim, draw.randint(1, 3), heads, qk, head_dim, draw.randint(20, 200),
        draw.choice([37, 101, 285]), 64 if arch == "xlstm" else None,
    )  # fmt: skip


def make_model(shape, seed=0, **options):
    return liven(build_model(shape, **options), seed)


def write_run(results, name, model, options, vocab_size=300, **spec):
    """A finished run under ``results``, with the tokenizer of its tokens; returns its folder."""
    folder, tokens = results / "runs" / name, results / "tokens" / "tiny"
    tokenizer = train_tokenizer([TEXT], {"vocab_size": 270})
    tokens.mkdir(parents=True, exist_ok=True)
    (tokens / "tokenizer.json").write_bytes(tokenizer.content)
    folder.mkdir(parents=True)
    content = {
        "shape": model.shape.as_dict(),
        "model_options": options,
        "compute_dtype": "float32",
        "context_length": 64,
        "tokens": {"tokenizer": {"eod_token": EOD}},
        "tokens_id": "tiny",
    }
    (folder / "spec.json").write_text(json.dumps(content | spec))
    save_file(folder / "final.ckpt", {"identity": "", "model": model.state_dict(), "result": {}})
    return folder


def random_tokens(vocab_size, batch=2, length=71, seed=0):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
