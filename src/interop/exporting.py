"""A run or an imported model -> a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from xlstm_scaling import __version__
from xlstm_scaling.interop.configurations import Exported, export_configuration
from xlstm_scaling.interop.errors import InteropError
from xlstm_scaling.interop.huggingface_files import INSTALL, WEIGHTS, copy_tokenizer, new_folder
from xlstm_scaling.interop.model_folder import (
    TOKENIZER,
    ModelDescription,
    build_described,
    describe,
    load_weights,
)
from xlstm_scaling.interop.weights import pieces, to_theirs
from xlstm_scaling.kernels.cross_entropy import soft_cap
from xlstm_scaling.study.files import write_text_atomic

CLASSES = {"xlstm": "xLSTMForCausalLM", "llama": "LlamaForCausalLM"}
#: largest difference of logits that a check lets pass, relative to the largest logit (at least 1)
CHECK_TOLERANCE = 1e-4


def _transformers() -> Any:
    try:
        import safetensors.torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise InteropError(f"exporting needs {error.name}; {INSTALL}") from None
    return transformers


def find_tokens(description: ModelDescription, folder: Path, results: Path) -> Path | None:
    """The folder of the tokens that a run was trained on, beside its runs or under ``results``; None for others.

    FileNotFoundError where they are gone.
    """
    if description.tokens_id is None:
        return None
    places = [Path(folder).resolve().parent.parent / "tokens", Path(results) / "tokens"]
    for place in places:
        if (place / description.tokens_id / TOKENIZER).is_file():
            return place / description.tokens_id
    listed = " or ".join(str(place) for place in dict.fromkeys(places))
    raise FileNotFoundError(
        f"no tokenizer of {description.tokens_id} in {listed}: run the stage `tokens`, or pass --without-tokenizer"
    )


def export_huggingface(
    folder: Path,
    target: Path,
    tokens: Path | None = None,
    dtype: str = "float32",
    ignore_logit_cap: bool = False,
    with_tokenizer: bool = True,
) -> list[str]:
    """Write ``config.json``, ``model.safetensors``, ``generation_config.json``, the tokenizer and a README.

    Args:
        folder: a finished run, or an imported model.
        target: a new folder.
        tokens: the tokens of the run, for their tokenizer; an imported model has its own.
        dtype: that weights are stored in: float32, or bfloat16, which rounds them.
        ignore_logit_cap: export a Transformer without its soft cap on logits.
        with_tokenizer: leave the tokenizer out where this is false.

    Returns:
        What a user of the export should know, in sentences.

    Raises:
        InteropError: what transformers cannot represent, by field and value; ``target`` is not empty.
        FileNotFoundError: no model in ``folder``.
    """
    transformers = _transformers()
    from safetensors.torch import save_file

    description = describe(folder)
    exported = export_configuration(description, ignore_logit_cap)
    notes = list(exported.notes)
    if dtype != "float32":
        notes.append(f"weights are rounded to {dtype}; the model's own are float32.")
    weights = to_theirs(pieces(description.shape), load_weights(folder))
    with new_folder(target) as temporary:
        eos_token_id = description.eos_token_id
        if with_tokenizer and tokens is not None:
            eos_token_id = _write_tokenizer(transformers, tokens / TOKENIZER, description.eos_token, temporary)
        elif with_tokenizer:
            copy_tokenizer(folder, temporary)
        _write_configuration(transformers, description, exported, dtype, eos_token_id, temporary)
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        write_text_atomic(temporary / "README.md", _readme(description, exported, notes))
    return notes


def _write_tokenizer(transformers: Any, path: Path, eos_token: str | None, target: Path) -> int | None:
    """The tokenizer of a run as transformers keeps it; returns the id of its end-of-document token."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=eos_token, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(target)
    return tokenizer.eos_token_id


def _write_configuration(
    transformers: Any,
    description: ModelDescription,
    exported: Exported,
    dtype: str,
    eos_token_id: int | None,
    target: Path,
) -> None:
    config = transformers.AutoConfig.for_model(
        exported.model_type,
        **exported.fields,
        vocab_size=description.shape.vocab_size,
        tie_word_embeddings=False,
        use_cache=exported.use_cache,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=None,
        architectures=[CLASSES[exported.model_type]],
        dtype=dtype,
        exported_from={
            "program": f"xlstm-scaling {__version__}",
            "context_length": description.context_length,
            **description.source,
        },
    )
    config.save_pretrained(target)
    generation = transformers.GenerationConfig(
        bos_token_id=None, eos_token_id=eos_token_id, pad_token_id=eos_token_id, use_cache=exported.use_cache
    )
    generation.save_pretrained(target)


def _readme(description: ModelDescription, exported: Exported, notes: list[str]) -> str:
    name = description.source.get("run_id", "an imported model")
    lines = [
        "---",
        "library_name: transformers",
        "---",
        f"# {name}",
        "",
        f"A {CLASSES[exported.model_type]} exported by xlstm-scaling {__version__}; trained with "
        f"{description.compute_dtype} activations.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]
    if notes:
        lines += ["", "Deviations from the model as it was trained:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def check_export(folder: Path, exported: Path, num_tokens: int = 65, seed: int = 0) -> float:
    """The largest difference between our logits and those of the exported model, on random tokens, in fp32.

    Relative to the largest logit (at least 1). A soft cap that was left out is applied to theirs, weights are rounded
    as the export rounds them. InteropError where it is above CHECK_TOLERANCE.
    """
    transformers = _transformers()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    stored = transformers.AutoConfig.from_pretrained(exported).dtype
    description = describe(folder)
    model = build_described(description, "float32").to_empty(device="cpu")
    model.load_state_dict({name: weight.to(stored) for name, weight in load_weights(folder).items()})
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(description.shape.vocab_size, (2, num_tokens), generator=generator)
    expected = model.eval()(tokens)
    got = soft_cap(theirs(tokens).logits, getattr(theirs.config, "ignored_logit_cap", None))
    difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not difference <= CHECK_TOLERANCE:
        raise InteropError(
            f"the exported model's logits differ by {difference:.2g} of the largest, more than {CHECK_TOLERANCE:g}: "
            f"do not use {exported}"
        )
    return difference
