"""The command ``xlstm-scaling count``: parameters and FLOPs of one model."""

from __future__ import annotations

import argparse
import json

from xlstm_scaling.accounting.counts import count_flops, count_params, make_shape
from xlstm_scaling.accounting.memory_command import add_shape_arguments, shape_options

DESCRIPTION = "parameters and FLOPs per sequence of one model, under a named convention"


def add_count_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_shape_arguments(parser)
    for name in ("embedding-dim", "num-blocks", "num-heads", "vocab-size", "context-length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--chunk-size", type=int, default=64, help="mLSTM chunk [tokens] (default: 64)")
    parser.add_argument(
        "--convention", default="paper", choices=["paper", "chinchilla", "tfla", "6nd", "traced"],
        help="how FLOPs are counted (default: paper)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_count(args: argparse.Namespace) -> int:
    """Print the counts. ValueError for a shape that cannot be."""
    sizes = (args.embedding_dim, args.num_blocks, args.num_heads, args.vocab_size, args.chunk_size)
    shape = make_shape(args.arch, *sizes, **shape_options(args))
    if args.convention == "traced":
        from xlstm_scaling.models.traced import traced_flops

        flops = traced_flops(shape, args.context_length)
    else:
        flops = count_flops(shape, args.context_length, args.convention)
    counts = {
        "num_params": count_params(shape),
        "flops_forward": flops.forward,
        "flops_forward_backward": flops.forward_backward,
        "flops_linear": flops.linear,
        "flops_sequence_mixing": flops.sequence_mixing,
        "flops_other": flops.other,
    }
    if args.json:
        print(json.dumps(counts | {"convention": args.convention, "context_length": args.context_length}))
    else:
        for name, value in counts.items():
            print(f"{name:24s} {value:,}")
    return 0
