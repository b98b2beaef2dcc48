"""``xlstm-scaling ingest``: published run logs and tables -> the table of runs, its provenance, training curves."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

DESCRIPTION = "published run logs (the paper's pickles) and tables of runs (CSV, Parquet) -> the table of runs"
EPILOG = """examples:
  the paper's logs in a folder, as far as they are there, with training curves:
    xlstm-scaling ingest data/ --out results/paper/runs.parquet --curves results/paper/curves.parquet
  only the runs that the authors' rules select (what the fits should see):
    xlstm-scaling ingest data/ runs.csv --selected --out results/paper/runs.parquet
  fetch the logs first; they are checked by their published ids and kept in the folder:
    xlstm-scaling ingest --download data/ --out results/paper/runs.parquet
  another group's table, its columns mapped, N in millions:
    xlstm-scaling ingest fits.csv --columns num_params="Model Size" num_tokens="Training Tokens" val_loss=loss \\
      --units num_params=million --set arch=transformer context_length=2048 --out runs.parquet
  the same from a file:
    xlstm-scaling ingest fits.csv --mapping conf/published/chinchilla.yaml --out runs.parquet

Pickles are read without running anything in them. docs/published.md says more."""


def add_ingest_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling ingest``."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "paths", nargs="*", type=Path, metavar="PATH", help="log files (.pkl), tables (.csv, .parquet), folders of them"
    )
    text = "the table of runs: .parquet and .csv of this name, and .provenance.json"
    add("--out", type=Path, metavar="FILE", required=True, help=text)
    add("--curves", type=Path, metavar="FILE", help="write the training curves here too, as .parquet and .csv")
    add("--selected", action="store_true", help="only runs that their authors' selection rules keep")
    add("--experiment-set", choices=["isoflop", "tokenparam", "other"], help="of log files under a name of their own")
    add("--json", action="store_true", help="print what was found as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    tables = parser.add_argument_group("tables of other groups")
    tables.add_argument("--columns", nargs="+", metavar="OURS=THEIRS", help="columns by their name in the table")
    units = "unit of a column: a factor, or million, billion, bit, … (docs/published.md)"
    tables.add_argument("--units", nargs="+", metavar="OURS=UNIT", help=units)
    tables.add_argument("--set", nargs="+", metavar="OURS=VALUE", help="one value for all rows, e.g. arch=transformer")
    tables.add_argument(
        "--mapping", type=Path, metavar="FILE", help="all of this as YAML; the options above go over it"
    )
    fetching = parser.add_argument_group("download")
    text = "fetch the paper's logs into this folder, where they are not there yet, and read it"
    fetching.add_argument("--download", type=Path, metavar="FOLDER", help=text)
    text = "address of a file, with {repository}, {commit}, {path}, {name} (default: conf/published/paper.yaml)"
    fetching.add_argument("--url", metavar="TEMPLATE", help=text)


def run_ingest(args: argparse.Namespace) -> int:
    """Ingest, write, report; 0. Errors are exceptions whose message says what to do."""
    from tqdm import tqdm

    from xlstm_scaling.published.ingest import IngestError, ingest
    from xlstm_scaling.published.tables import TableMapping, check_mapping, load_mapping, parse_pairs
    from xlstm_scaling.published.upstream import Upstream
    from xlstm_scaling.study.files import write_json_atomic, write_table

    for option, path in (("--out", args.out), ("--curves", args.curves)):
        if path is not None and path.suffix not in (".parquet", ".csv"):
            raise IngestError(f"{option} {path}: give a name that ends in .parquet or .csv; both are written")
    if not args.paths and args.download is None:
        raise IngestError("nothing to read: name log files, tables or a folder, or --download FOLDER")
    mapping = TableMapping() if args.mapping is None else load_mapping(args.mapping)
    options = TableMapping(
        columns=parse_pairs(args.columns, "--columns"),
        units=parse_pairs(args.units, "--units"),
        constants=parse_pairs(args.set, "--set"),
    )
    check_mapping(options)
    upstream, paths = Upstream.load(), list(args.paths)
    if args.download is not None:
        shown = None if not args.quiet else True
        for name in tqdm(upstream.logs, desc="downloading", unit="file", disable=shown, leave=False):
            upstream.fetch(name, args.download, args.url)
        paths.append(args.download)
    result = ingest(paths, mapping.merged(options), args.experiment_set, upstream, not args.quiet, log.warning)
    runs, curves = result.runs, result.curves
    if args.selected:
        runs = runs[runs["selected"]].reset_index(drop=True)
        curves = curves[curves["run_id"].isin(runs["run_id"])]
        if runs.empty:
            raise IngestError(
                "not one run is selected: without --selected all are written, with the reasons in `exclusion`"
            )
    summary = result.summary() | {"num_written": len(runs)}
    if args.curves is not None:
        write_table(curves, args.curves)
    write_json_atomic(args.out.with_suffix(".provenance.json"), summary)
    write_table(runs, args.out)
    print(json.dumps(summary) if args.json else _report(summary, args.out))
    return 0


def _report(summary: dict[str, Any], out: Path) -> str:
    """The summary in a few lines."""
    lines = [f"{'architecture':12s} {'context':>8s} {'set':12s} {'runs':>6s} {'selected':>9s}"]
    lines += [
        f"{cell['arch']:12s} {cell['context_length']:8d} {cell['experiment_set']:12s} {cell['runs']:6d}"
        f" {cell['selected']:9d}"
        for cell in summary["cells"]
    ]
    status = ", ".join(f"{count} {name}" for name, count in summary["status"].items())
    lines.append(f"{summary['num_runs']} runs ({status}), {summary['num_selected']} selected")
    lines.append(f"{summary['num_merged']} restarts merged, {summary['num_duplicates']} duplicates dropped")
    if summary["excluded_by"]:
        rules = ", ".join(f"{name} {count}" for name, count in summary["excluded_by"].items())
        lines.append(f"excluded by: {rules}")
    lines.append(f"{summary['num_written']} runs written to {out.with_suffix('.parquet')}")
    return "\n".join(lines)
