"""The command ``xlstm-scaling memory``: what a device needs to train a model, and what fits."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from xlstm_scaling.accounting.counts import ARCHITECTURES, count_params, make_shape
from xlstm_scaling.accounting.dtypes import dtype_bytes
from xlstm_scaling.accounting.memory import HEADROOM, Memory, plan_memory

#: dtypes that models train in
DTYPES = ("bfloat16", "float32")


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Which architecture, and what its shapes are free in."""
    parser.add_argument("--arch", required=True, help=", ".join(ARCHITECTURES))
    text = "hybrid: one attention block in so many (default: 4)"
    parser.add_argument("--attention-every", type=int, metavar="K", help=text)


def shape_options(args: argparse.Namespace) -> dict[str, int]:
    """What was given of the options of a shape (``make_shape``)."""
    return {} if args.attention_every is None else {"attention_every": args.attention_every}


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_shape_arguments(parser)
    for name in ("embedding-dim", "num-blocks", "num-heads", "vocab-size", "context-length", "batch-sequences"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--devices", type=int, default=1, help="devices that train it together (default: 1)")
    text = "devices that share the parameters: full (default), none or a number"
    parser.add_argument("--shard", default="full", help=text)
    parser.add_argument("--device-memory", type=float, default=80e9, help="of one device [bytes] (default: 80e9)")
    text = "of activations (default: bfloat16)"
    parser.add_argument("--compute-dtype", default="bfloat16", choices=DTYPES, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")


def shard_of(text: str, devices: int) -> int:
    """Devices that share the parameters. Raises ValueError."""
    named = {"none": 1, "full": devices}
    if text not in named and not (text.isdigit() and int(text)):
        raise ValueError(f"--shard must be none, full or a number of devices, got {text!r}")
    degree = named[text] if text in named else int(text)
    if devices % degree:
        raise ValueError(f"--shard {degree} does not divide --devices {devices}")
    return degree


def _columns(memories: dict[str, Memory | None]) -> list[str]:
    """The items of each setting side by side, in GB."""
    shown = {title: memory for title, memory in memories.items() if memory is not None}
    names = list(dict.fromkeys(name for memory in shown.values() for name in memory.items))
    width = max(map(len, names)) + 2
    lines = ["memory of a device [GB]".ljust(width) + "".join(f"{title:>28s}" for title in shown)]
    for name in names:
        lines.append(name.ljust(width) + "".join(f"{m.items.get(name, 0) / 1e9:28.2f}" for m in shown.values()))
    lines.append("total".ljust(width) + "".join(f"{memory.total / 1e9:28.2f}" for memory in shown.values()))
    layouts = [memory.layout for memory in shown.values()]
    lines.append("sequences at once".ljust(width) + "".join(f"{x.micro_batch_sequences:28d}" for x in layouts))
    lines.append("micro-batches a step".ljust(width) + "".join(f"{x.micro_batches:28d}" for x in layouts))
    return lines


def run_memory(args: argparse.Namespace) -> int:
    """Print the settings that fit; ValueError where none does."""
    if args.devices < 1 or args.device_memory <= 0:
        raise ValueError("--devices and --device-memory must be positive")
    sizes = (args.embedding_dim, args.num_blocks, args.num_heads, args.vocab_size)
    shape = make_shape(args.arch, *sizes, **shape_options(args))
    degree = shard_of(args.shard, args.devices)
    plan = plan_memory(
        shape,
        args.context_length,
        args.batch_sequences,
        args.devices,
        args.device_memory,
        degree,
        dtype_bytes(args.compute_dtype),
    )
    settings = {"activations kept": plan.without, "activation checkpointing": plan.checkpointed}
    if args.json:
        found = {
            name: None if memory is None else {"total": memory.total, "items": memory.items, **asdict(memory.layout)}
            for name, memory in (("without", plan.without), ("checkpointed", plan.checkpointed))
        }
        chosen = "without" if plan.without else "checkpointed"
        about = {"num_params": count_params(shape), "device_memory": args.device_memory, "headroom": HEADROOM}
        print(json.dumps(about | {"chosen": chosen, **found}))
        return 0
    print(
        f"{count_params(shape):,} parameters, {args.batch_sequences} x {args.context_length:,} tokens a step,", end=" "
    )
    print(f"{args.devices} devices, parameters over {degree}")
    print("\n".join(_columns(settings)))
    for title, memory in settings.items():
        if memory is None:
            print(f"{title}: not even one sequence fits {HEADROOM:.0%} of {args.device_memory / 1e9:g} GB")
    layout = plan.chosen.layout
    shard = {1: "none", args.devices: "full"}.get(degree, degree) if args.devices > 1 else "none"
    again = str(layout.activation_checkpointing).lower()
    print(f"choose: hardware.shard={shard} hardware.micro_batch_sequences={layout.micro_batch_sequences}", end=" ")
    print(f"hardware.activation_checkpointing={again}")
    return 0
