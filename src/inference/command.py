"""``xlstm-scaling generate``: a trained or imported model continues prompts."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from xlstm_scaling.inference.generation import Sampling
    from xlstm_scaling.interop.model_folder import ModelDescription
    from xlstm_scaling.models import LanguageModel

log = logging.getLogger(__name__)

DESCRIPTION = "continue prompts with a trained or imported model"
EPILOG = """examples:
  xlstm-scaling generate xlstm-d112b2-c256-n8x229 --prompt "The state of the union"
  xlstm-scaling generate imported/ --prompt-file prompts.txt --temperature 0.8 --top-p 0.95 --json

docs/generation.md says how batches and long prompts are read."""
REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no character (yet)
CONTEXT_TOKENS = 8  # before the text that is decoded next, for decoders that look back


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling generate``."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, its id or a part of it that only one has, or an imported model")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; several make a batch")
    add("--prompt-file", metavar="FILE", help="one prompt a line; - reads stdin")
    add("--max-tokens", type=int, default=64, metavar="N", help="most tokens to add (default: 64)")
    add("--temperature", type=float, default=0.0, metavar="T", help="of the softmax; 0, the default, is greedy")
    add("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="sample among the most likely tokens that sum to P")
    add("--seed", type=int, default=0, help="of the samples; prompt i of a batch draws with seed + i (default: 0)")
    add("--stop-at-end-of-document", action="store_true", help="end where the model ends the document")
    add("--prefill-chunk", type=int, default=2048, metavar="N", help="tokens of a prompt in one pass (default: 2048)")
    add("--device", default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    add("--dtype", choices=["float32", "bfloat16"], help="of activations (default: as trained)")
    add("--decoder", choices=["auto", "torch", "cpp", "graph"], default="auto",
        help="what makes the tokens: auto (default), the model in torch, C++ on a CPU, a CUDA graph")  # fmt: skip
    add("--json", action="store_true", help="print a line of JSON for every prompt")
    add("--results", type=Path, default=Path("results"), help="results folder (default: results)")


class Text:
    """A model's tokenizer: prompts to ids, and ids to text.

    A run's prompts are encoded as its documents were, in bounded memory; an imported model's by what its tokenizer.json
    says, with the special tokens that it adds. Text that spells a special token is ordinary text.
    ``eod_id``: the token that ends a document; None where nobody knows. FileNotFoundError or ValueError say what the
    tokenizer lacks.
    """

    def __init__(self, folder: Path, description: ModelDescription, results: Path) -> None:
        self.path, self.vocab_size = find_tokenizer(folder, description, results), description.shape.vocab_size
        self.eod_id, self.trained, self.tokenizer = description.eos_token_id, None, None
        if description.tokens_id is not None:
            from xlstm_scaling.corpus.tokenizer import load_tokenizer

            self.trained = load_tokenizer({"file": str(self.path), "eod_token": description.eos_token})
            self.eod_id = self.trained.eod_id
            return
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{self.path} is not a Hugging Face tokenizer.json ({error})") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        if self.eod_id is None and description.eos_token is not None:
            self.eod_id = self.tokenizer.token_to_id(description.eos_token)

    def encode(self, prompt: str, name: str) -> np.ndarray:
        """The tokens (T,) int64 of a prompt; ``name`` is what errors call it."""
        if not prompt:
            raise ValueError(f"{name} is empty")
        if self.trained is not None:
            (ids,) = self.trained.encode([prompt])
            ids = ids[:-1]  # without the end of the document
        else:
            ids = np.array(self.tokenizer.encode(prompt).ids, dtype=np.int64)
        if not len(ids):
            raise ValueError(f"{name} has no tokens: {prompt!r}")
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f"{name} has the token {ids.max()}, the model's vocabulary ends at {self.vocab_size - 1}: "
                f"{self.path} is another model's tokenizer"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        if self.trained is not None:
            return self.trained.decode(ids)
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


class TextStream:
    """Text of tokens as they come; a character whose bytes are spread over tokens comes when it is complete."""

    def __init__(self, text: Text, prompt: Sequence[int]) -> None:
        self.text, self.ids = text, [int(token) for token in prompt[-CONTEXT_TOKENS:]]
        self.printed = len(text.decode(self.ids))

    def push(self, ids: Sequence[int]) -> str:
        """What these tokens complete."""
        self.ids += ids
        decoded = self.text.decode(self.ids)
        complete = len(decoded.rstrip(REPLACEMENT))
        complete = max(complete, len(decoded) - 3)  # the bytes that a character may lack are at most 3
        piece = decoded[self.printed : complete]
        self.printed = max(self.printed, complete)
        if complete == len(decoded) and len(self.ids) > 8 * CONTEXT_TOKENS:  # decode the end only, next time
            self.ids = self.ids[-CONTEXT_TOKENS:]
            self.printed = len(self.text.decode(self.ids))
        return piece

    def close(self) -> str:
        """What has never become a character."""
        return self.text.decode(self.ids)[self.printed :]


def find_tokenizer(folder: Path, description: ModelDescription, results: Path) -> Path:
    """tokenizer.json of a run's tokens, beside its runs or under ``results``, or in an imported model's folder."""
    from xlstm_scaling.interop.model_folder import TOKENIZER

    if description.tokens_id is None:
        places, remedy = [Path(folder)], "import the model from a folder that holds one"
    else:
        roots = [Path(folder).resolve().parent.parent, Path(results)]
        places, remedy = [root / "tokens" / description.tokens_id for root in roots], "run the stage `tokens`"
    for place in places:
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    raise FileNotFoundError(f"no {TOKENIZER} in {' or '.join(str(p) for p in dict.fromkeys(places))}: {remedy}")


def read_prompts(prompts: Sequence[str], file: str | None) -> dict[str, str]:
    """Name -> text of the prompts on the command line, then of the file's lines."""
    named = {"the prompt" if len(prompts) == 1 and file is None else f"--prompt {i}": text
             for i, text in enumerate(prompts, 1)}  # fmt: skip
    if file is not None:
        where = "stdin" if file == "-" else file
        try:
            content = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text ({error})") from error
        lines = content.removesuffix("\n").split("\n")
        named |= {f"{where}, line {i}": line.removesuffix("\r") for i, line in enumerate(lines, 1)}
    if not named:
        raise ValueError("there is no prompt: give --prompt TEXT, or --prompt-file FILE")
    return named


def find_device(name: str) -> torch.device:
    """The device of this name. Raises ValueError where there is none."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def kept_name(model: LanguageModel) -> str:
    """What a model keeps of what it has read: the state of mLSTM blocks, the cache of attention blocks, or both."""
    from xlstm_scaling.models.transformer import TransformerBlock

    kinds = {isinstance(block, TransformerBlock) for block in model.blocks}
    return " and ".join(name for name, attends in (("state", False), ("cache", True)) if attends in kinds)


def check_memory(
    model: LanguageModel, batch: int, prompt_length: int, max_new_tokens: int, chunk: int, device: torch.device
) -> int:
    """Bytes of the state or cache, of a model on the meta device. Raises ValueError where memory does not suffice for
    it, the weights and the mask of a chunk."""
    from xlstm_scaling.inference.generation import state_bytes
    from xlstm_scaling.inference.timing import available_bytes

    length, kept = prompt_length + max_new_tokens, kept_name(model)
    state, free = state_bytes(model, batch, length), available_bytes(str(device))
    needed = state + sum(p.numel() * p.element_size() for p in model.parameters())
    if "cache" in kept and chunk < prompt_length:
        needed += 5 * chunk * prompt_length  # as bool and as a bias
    if needed > free:
        raise ValueError(
            f"{batch} x {length:,} tokens need {needed / 1e9:.3g} GB, {state / 1e9:.3g} GB of them the "
            f"{kept}, and {free / 1e9:.3g} GB are free on {device}: "
            "shorten or split the prompts, or lower --max-tokens or --prefill-chunk"
        )
    return state


def _check(args: argparse.Namespace) -> Sampling:
    from xlstm_scaling.inference.generation import Sampling

    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {args.max_tokens}")
    if args.prefill_chunk < 1:
        raise ValueError(f"--prefill-chunk must be at least 1, got {args.prefill_chunk}")
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        raise ValueError("--top-k and --top-p choose among samples: give a --temperature above 0")
    return Sampling(args.temperature, args.top_k, args.top_p, args.seed)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.4g} tokens/s" if tokens and seconds > 0 else "no further token"


def run_generate(args: argparse.Namespace) -> int:
    """Continue the prompts: a single one is printed as it comes, others when all are done."""
    sampling = _check(args)
    named = read_prompts(args.prompt, args.prompt_file)

    import torch

    from xlstm_scaling.inference.decoder import decoder_class
    from xlstm_scaling.inference.generation import stream, until_end
    from xlstm_scaling.inference.timing import prepare
    from xlstm_scaling.interop.model_folder import build_described, describe, find_model, load_model

    folder = find_model(args.run, args.results)
    description = describe(folder)
    text = Text(folder, description, args.results)
    eod_id = text.eod_id if args.stop_at_end_of_document else None
    if args.stop_at_end_of_document and eod_id is None:
        raise ValueError(f"{folder} does not say which token ends a document")
    device = find_device(args.device)
    ids = [text.encode(prompt, name) for name, prompt in named.items()]
    longest = max(map(len, ids))
    length = longest + args.max_tokens
    meta = build_described(description, args.dtype)
    state = check_memory(meta, len(ids), longest, args.max_tokens, args.prefill_chunk, device)
    if description.context_length is not None and length > description.context_length:
        log.warning("%s tokens: the model was trained on contexts of %s", f"{length:,}", description.context_length)
    model = prepare(load_model(folder, args.dtype), meta.compute_dtype, str(device))
    decoder_class(model, args.decoder)  # says what is wrong before anything is printed

    prompts, alone = list(named.values()), len(ids) == 1 and not args.json
    printer = TextStream(text, ids[0]) if alone else None
    if printer is not None:
        print(prompts[0], end="", flush=True)
    start, first_s, blocks = time.perf_counter(), 0.0, []
    for block in stream(
        model, [torch.from_numpy(one) for one in ids], args.max_tokens, sampling, args.prefill_chunk, eod_id,
        decoder=args.decoder,
    ):  # fmt: skip
        blocks.append(block)
        if printer is not None:
            print(printer.push(block[0].tolist()), end="", flush=True)
        if not first_s:
            block.tolist()  # waits for the device
            first_s = time.perf_counter() - start
    new = [until_end(row, eod_id).tolist() for row in torch.cat(blocks, 1).cpu()]
    seconds = time.perf_counter() - start - first_s
    if printer is not None:
        print(printer.close())
    else:
        _print_all(args, text, prompts, ids, new, eod_id)
    rest = sum(map(len, new)) - len(new)
    print(
        f"{sum(map(len, ids)):,} tokens read, first token after {first_s:.4g} s; {sum(map(len, new)):,} tokens "
        f"generated, {_rate(rest, seconds)}; {kept_name(meta)} of "
        f"{state / 1e6:.4g} MB",
        file=sys.stderr,
    )
    return 0


def _print_all(
    args: argparse.Namespace,
    text: Text,
    prompts: Sequence[str],
    ids: Sequence[np.ndarray],
    new: Sequence[list[int]],
    eod_id: int | None,
) -> None:
    for number, (prompt, read, made) in enumerate(zip(prompts, ids, new), 1):
        printer = TextStream(text, read)
        continued = printer.push(made) + printer.close()
        if not args.json:
            print(f"[{number}] {prompt}{continued}")
            continue
        ended = eod_id is not None and made[-1] == eod_id
        row: dict[str, Any] = {"prompt": prompt, "text": continued, "prompt_tokens": len(read), "tokens": made}
        print(json.dumps(row | {"stopped": "end_of_document" if ended else "max_tokens"}, ensure_ascii=False))
