"""The command ``xlstm-scaling compare``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DESCRIPTION = "two or more studies side by side: which exponents and rankings of architectures carry over"


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling compare``."""
    parser.add_argument(
        "studies", nargs="+", type=Path, metavar="STUDY",
        help="results folders of studies, e.g. results/laptop; the first is the reference",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for the table, the text and the figure (default: print only)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_compare(args: argparse.Namespace) -> int:
    """Print the comparison, write it where --out says."""
    from xlstm_scaling.report.comparison import compare_studies, comparison_text, write_comparison

    for folder in args.studies:
        if not folder.is_dir():
            raise FileNotFoundError(f"no study in {folder}: name a results folder, e.g. results/laptop")
    table = compare_studies(args.studies)
    if args.out is not None:
        write_comparison(table, args.out)
        print(f"{args.out}/comparison.csv, .md, .svg and .png", file=sys.stderr)
    print(table.to_json(orient="records") if args.json else comparison_text(table))
    return 0
