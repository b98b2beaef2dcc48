"""The command ``xlstm-scaling adopt``: take runs and tokens over from another results folder."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

DESCRIPTION = "take over runs and tokens of another results folder, verified; nothing finished is overwritten"


def add_adopt_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("source", type=Path, metavar="PATH", help="a results folder, or one folder of runs/ or tokens/")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="results folder to take it to (default: results)"
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--link", action="store_true", help="hard links in place of copies, on one file system")
    way.add_argument("--move", action="store_true", help="remove from the source what was taken over")
    parser.add_argument("--dry-run", action="store_true", help="verify and say what would be done")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_adopt(args: argparse.Namespace) -> int:
    """Adopt and say what became of each folder; 1 where something was refused."""
    from xlstm_scaling.training.adopt import REFUSED, adopt, as_rows

    way = "link" if args.link else "move" if args.move else "copy"
    said = adopt(args.source, args.results, way, args.dry_run, not args.quiet)
    counts = Counter(one.state for one in said)
    if args.json:
        print(json.dumps({"counts": counts, "folders": as_rows(said)}))
    else:
        width = max(len(one.name) for one in said)
        for one in said:
            print(f"{one.kind:12s} {one.name:{width}s}  {one.state}{': ' if one.reason else ''}{one.reason}")
        print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts[REFUSED] else 0
