"""``xlstm-scaling export`` and ``xlstm-scaling import``: models to and from folders of Hugging Face transformers."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

log = logging.getLogger(__name__)

EXPORT_DESCRIPTION = "a trained model -> a folder that Hugging Face transformers loads"
IMPORT_DESCRIPTION = "a folder of Hugging Face transformers (xLSTM, Llama) -> a model of this program"
EXPORT_EPILOG = """examples:
  xlstm-scaling export xlstm-d112b2-c256-n8x229 exported/ --check
  xlstm-scaling export results/runs/transformer-d112b2-c256-n8x225-d97f9d0f35 exported/ --ignore-logit-cap

docs/interoperability.md says what has no counterpart."""
DTYPES = ("float32", "bfloat16")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling export``."""
    parser.epilog, parser.formatter_class = EXPORT_EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, its id or a part of it that only one has, or an imported model")
    add("target", type=Path, metavar="DIR", help="a new folder")
    add("--format", choices=["hf"], default="hf", help="hf: Hugging Face transformers (the default)")
    add("--results", type=Path, default=Path("results"), help="results folder (default: results)")
    add("--dtype", choices=DTYPES, default="float32", help="of the stored weights (default: float32, as trained)")
    text = "export a Transformer without its soft cap on logits, which Llama does not have"
    add("--ignore-logit-cap", action="store_true", help=text)
    add("--without-tokenizer", action="store_true", help="leave the tokenizer out")
    add("--check", action="store_true", help="load the export with transformers and compare its logits with ours")


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling import``."""
    add = parser.add_argument
    add("source", type=Path, metavar="DIR", help="config.json with model.safetensors, or shards and their index")
    add("target", type=Path, metavar="OUT", help="a new folder, for xlstm_scaling.interop.model_folder.load_model")
    add("--logit-cap", type=float, metavar="CAP", help="soft cap on the logits of a Llama that was trained with one")
    add("--compute-dtype", choices=DTYPES, default="float32", help="of activations (default: float32)")


def run_export(args: argparse.Namespace) -> int:
    """Export a model; prints where it is, and what deviates."""
    from xlstm_scaling.interop.exporting import check_export, export_huggingface, find_tokens
    from xlstm_scaling.interop.model_folder import describe, find_model

    folder = find_model(args.run, args.results)
    tokens = None if args.without_tokenizer else find_tokens(describe(folder), folder, args.results)
    notes = export_huggingface(
        folder, args.target, tokens, args.dtype, args.ignore_logit_cap, not args.without_tokenizer
    )
    for note in notes:
        log.warning("%s", note)
    print(f"{folder.name} -> {args.target}")
    if args.check:
        print(f"logits agree with transformers to {check_export(folder, args.target):.1g} of the largest")
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Import a model; prints what it is."""
    from xlstm_scaling.interop.importing import import_huggingface

    description = import_huggingface(args.source, args.target, args.logit_cap, args.compute_dtype)
    shape = description.shape
    print(
        f"{args.source} -> {args.target}: {shape.arch}, {shape.num_blocks} blocks of width {shape.embedding_dim}, "
        f"{description.source['num_params']:,} parameters"
    )
    return 0
