"""``xlstm-scaling claims``: what the paper reports, joined with what we computed."""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

log = logging.getLogger(__name__)

DESCRIPTION = "the paper's numbers, each with what its runs give, an interval and a verdict"
EPILOG = """examples:
  xlstm-scaling ingest runs.csv --selected --out results/paper/runs.parquet
  xlstm-scaling claims --runs results/paper/runs.parquet --inference-table inference.csv --out results/paper/claims
  only one topic, or one claim:
    xlstm-scaling claims --runs runs.parquet --only isoflop fault-runs-672 --out claims

Claims are in conf/claims/*.yaml; docs/claims.md says how they are judged and how to add one."""


def add_claims_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling claims``."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--runs", type=Path, required=True, metavar="FILE", help="table of runs of `ingest --selected` (.parquet, .csv)"
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="writes claims.parquet, .csv, .md and .html here")
    add(
        "--curves",
        type=Path,
        metavar="FILE",
        help="training curves of `ingest --curves` (default: curves.parquet beside FILE)",
    )
    add("--fits", type=Path, metavar="FOLDER", help="tables of `fit` of the same runs: loss surfaces are taken from it")
    text = "folder with inference.csv or inference.parquet, the published measurements"
    add("--inference", type=Path, metavar="FOLDER", help=text)
    add("--inference-table", type=Path, metavar="FILE", help="the published measurements (columns: docs/claims.md)")
    add("--claims", type=Path, metavar="FOLDER", help="files of claims (default: conf/claims)")
    add("--only", nargs="+", metavar="NAME", help="only these claims or topics")
    add("--resamples", type=int, metavar="R", help="bootstrap resamples (default: 500)", default=500)
    add("--quiet", action="store_true", help="no progress bar")


def run_claims(args: argparse.Namespace) -> int:
    """Answer, write, report; 0 whatever the verdicts are. Errors are exceptions whose message says what to do."""
    from tqdm import tqdm

    from xlstm_scaling.published.claims.answers import FUNCTIONS
    from xlstm_scaling.published.claims.evidence import Evidence
    from xlstm_scaling.published.claims.inference import read_measurements
    from xlstm_scaling.published.claims.ledger import build_ledger, load_claims, select_claims
    from xlstm_scaling.published.claims.page import html_page, markdown_page, summary_counts
    from xlstm_scaling.study.config import compose, conf_dir, to_dict
    from xlstm_scaling.study.files import read_table, write_table, write_text_atomic

    if args.resamples < 2:
        raise ValueError(f"--resamples must be at least 2, not {args.resamples}")
    claims, titles = load_claims(args.claims or conf_dir() / "claims", FUNCTIONS)
    claims = select_claims(claims, args.only)
    runs = read_table(args.runs)
    if "selected" in runs.columns:
        runs = runs[runs["selected"].fillna(False).astype(bool)]
        if runs.empty:
            raise ValueError(f"{args.runs}: not one run is selected")
    beside = args.runs.parent / "curves.parquet"
    curves = args.curves or (beside if beside.is_file() else None)
    table = args.inference_table or _inference_file(args.inference)
    config = to_dict(compose([]).fitting) | {"num_resamples": args.resamples}
    evidence = Evidence(
        runs,
        config,
        None if curves is None else read_table(curves),
        None if table is None else read_measurements(table),
        _fits(args.fits),
    )
    options = {"--curves": curves, "--fits": args.fits, "--inference-table": table, "--claims": args.claims}
    given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    command = ["xlstm-scaling", "claims", "--runs", str(args.runs), *given, "--resamples", str(args.resamples)]
    with tqdm(total=len(claims), desc="claims", disable=True if args.quiet else None, leave=False) as bar:
        ledger = build_ledger(
            claims, evidence, FUNCTIONS, shlex.join([*command, "--out", str(args.out)]), lambda _: bar.update()
        )
    about = f"{len(evidence.runs)} runs, {args.resamples} resamples, intervals of {100 * config['confidence']:g} %."
    write_table(ledger, args.out / "claims")
    write_text_atomic(args.out / "claims.md", markdown_page(ledger, titles, about))
    write_text_atomic(args.out / "claims.html", html_page(ledger, titles, about))
    print(summary_counts(ledger).to_string())
    circular = int((~ledger["independent"]).sum())
    if circular:
        print(f"{circular} rest, in part, on losses that were read off figures to agree with the printed parabolas")
    for row in ledger[ledger["verdict"] == "not reproduced"].itertuples():
        print(f"not reproduced: {row.id}: published {row.published:.6g}, ours {row.value:.6g}. {row.why}")
    missing = ledger.loc[ledger["verdict"] == "not answerable", "why"].value_counts()
    for why, count in missing.items():
        print(f"not answerable ({count}): {why}")
    for row in ledger[ledger["why"].str.startswith("the answer failed")].itertuples():
        log.warning("%s: %s", row.id, row.why)
    print(f"written to {args.out / 'claims.csv'}, .parquet, .md, .html")
    return 0


def _inference_file(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    for name in ("inference.parquet", "inference.csv"):
        if (folder / name).is_file():
            return folder / name
    log.warning("%s holds neither inference.parquet nor inference.csv: claims about inference stay unanswered", folder)
    return None


def _fits(folder: Path | None) -> dict:
    import pandas as pd

    names = ("surface", "surface_predictions")
    if folder is None or not all((folder / f"{name}.parquet").is_file() for name in names):
        return {}
    return {name: pd.read_parquet(folder / f"{name}.parquet") for name in names}
