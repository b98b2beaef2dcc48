"""The commands ``xlstm-scaling provenance`` and ``xlstm-scaling clean``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

PROVENANCE = "where a run, a table, a figure or the report comes from: settings, runs, code, certificate, text, machine"
CLEAN = "remove what no study in a results folder needs: runs of older code, locks of the dead, temporary files"


def add_provenance_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    text = "a run's id or a part of it, a table (fits/isoflop), a figure (loss_vs_flops), a file of these, or report"
    parser.add_argument("name", metavar="NAME", help=text)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides that name the study")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_provenance(args: argparse.Namespace) -> int:
    """Print the chain."""
    from xlstm_scaling.study.config import compose
    from xlstm_scaling.study.paths import StudyPaths
    from xlstm_scaling.study.provenance import lines, provenance

    found = provenance(args.name, StudyPaths.of(compose(args.overrides), args.results))
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))
    return 0


def add_clean_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")
    parser.add_argument("--dry-run", action="store_true", help="say what would go")
    parser.add_argument("--unneeded", action="store_true", help="also runs of this code that no plan here names")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_clean(args: argparse.Namespace) -> int:
    """Remove, and say what. FileNotFoundError without a results folder."""
    from xlstm_scaling.study.clean import leftovers, remove

    if not args.results.is_dir():
        raise FileNotFoundError(f"no results folder {args.results}: name it with --results")
    found = leftovers(args.results, args.unneeded)
    kept = [one for one in found if one.kept]
    gone = [one for one in found if not one.kept] if args.dry_run else remove(found, args.results)
    total = sum(one.num_bytes for one in gone)
    if args.json:
        rows = [{**asdict(one), "path": str(one.path)} for one in (*gone, *kept)]
        print(json.dumps({"dry_run": args.dry_run, "num_bytes": total, "leftovers": rows}))
        return 0
    for one in gone:
        print(f"{one.kind:12s} {one.num_bytes / 1e6:10.3f} MB  {one.path}: {one.reason}")
    for one in kept:
        print(f"kept         {one.num_bytes / 1e6:10.3f} MB  {one.path}: {one.reason}, but {one.kept}")
    print(f"{len(gone)} leftovers, {total / 1e6:.3f} MB{': nothing was removed' if args.dry_run else ' removed'}")
    return 0
