"""Options of the kernel commands; imports nothing heavy, so that every other command starts fast."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def _processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_compile_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``certify --compile``."""
    parser.add_argument("--target", nargs="+", metavar="ARCH", help="architectures to compile for (default: all known)")
    parser.add_argument("--shapes", choices=["all", "quick"], default="all", help="which problems (default: all)")
    parser.add_argument("--processes", type=int, default=_processes(), help="compilations side by side")
    parser.add_argument("--failures-only", action="store_true", help="print the rows that fail only")


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tune``."""
    parser.add_argument(
        "--op", nargs="+", metavar="OP", help="operations, e.g. mlstm/chunkwise rms_norm (default: all)"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of activations"
    )
    parser.add_argument(
        "--shape", nargs="+", metavar="NAME=SIZE",
        help="only problems of these sizes, or one of your own with all its sizes: --op rms_norm --shape M=4096 d=512",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder (default: $XLSTM_SCALING_KERNEL_TABLES or the package's)")
    parser.add_argument("--minutes", type=float, default=15.0, help="time to stop after (default: 15)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="compilations side by side")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
