"""The command ``xlstm-scaling``: each stage of a study by hand, with Hydra overrides."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

EPILOG = """stages, in order:
  tokens     text -> tokens                      plan       grid -> plan of runs
  train      one run (or all) of the plan        runs       results -> the table of runs
  fit        table of runs -> laws               inference  latency measurements and the runtime model
  evaluate   loss beyond the training context    figures    tables -> figures
  findings   tables -> what the study found      explore    laws -> a page to explore them
  report     everything on one page
before training: certify   the kernels of this device, against float64

Overrides are Hydra's: study=smoke training.seed=1 study.sizes.d40.learning_rate=0.005
The whole study: make reproduce, or snakemake --cores 2 --config study=laptop"""

#: errors whose message says all: printed without a traceback
EXPECTED_ERRORS = (ValueError, OSError)


def _parser() -> argparse.ArgumentParser:
    from xlstm_scaling import __version__

    parser = argparse.ArgumentParser(
        prog="xlstm-scaling",
        description="Scaling laws of xLSTM and Transformer language models, stage by stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xlstm-scaling {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, handler: str) -> argparse.ArgumentParser:
        """``handler``: module:function of this package, imported when it is called."""
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(handler=handler)
        return sub

    _add_stages(command)
    _add_tools(command)
    return parser


def _add_stages(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    """The stages of a study, and what shows its configuration and state."""

    def stage(name: str, text: str) -> argparse.ArgumentParser:
        sub = command(name, text, "stage_commands:run_stage")
        sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, e.g. study=smoke")
        sub.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    stage("config", "print the resolved configuration")
    tokens = stage("tokens", "text -> tokenizer and token shards (resumes by itself)")
    tokens.add_argument("--workers", type=int, metavar="N", help="processes side by side (default: the CPUs there are)")
    tokens.add_argument("--part", metavar="I/N", help="make share I of N only, I = 1 ... N; without it, all are merged")
    stage("plan", "the study's grid -> the plan of runs")
    train = stage("train", "train one run of the plan (resumes by itself)")
    train.add_argument("--run", help="run id, or a part of it that only one run has")
    train.add_argument("--trunk", help="train what the runs of this trunk share (training.schedule.decay=constant)")
    train.add_argument("--all", action="store_true", help="train all runs of the plan, one after the other")
    train.add_argument("--uncertified", action="store_true", help="train with kernels that no certificate covers")
    train.add_argument("--plan", type=Path, help="a plan.json to take the run from, instead of overrides")
    status = stage("status", "a study at a glance: done, running, failed, diverged, tokens/s, time left")
    status.add_argument("--all", action="store_true", help="list finished and pending runs too")
    status.add_argument("--json", action="store_true", help="print JSON")
    stage("runs", "results of all runs -> the table of runs")
    text = "fetch the paper's published files, checked by their ids (runs=published)"
    stage("download", text).add_argument("--only", nargs="+", metavar="NAME", help="fetch these files only")
    stage("fit", "table of runs -> laws with intervals")
    stage("inference", "time to first token and step time on this machine, and the runtime model")
    stage("evaluate", "trained models -> loss by position, beyond their training context too")
    stage("findings", "tables -> what the study found, in sentences")
    stage("report", "all results on one offline page, report.html; of an unfinished study too, with what failed")
    text = "one of the paper's first three experiments: its tables and figures, in a folder of the study"
    experiment = stage("experiment", text)
    experiment.add_argument("--name", required=True, help="isoflop_sweep, latency_profile or context_scaling")
    experiment.add_argument("--part", choices=["plan", "tables", "figures"], help="this part alone, for the workflow")
    figures = stage("figures", "tables -> figures")
    figures.add_argument("--only", nargs="+", metavar="NAME", help="draw these figures only")
    explore = stage("explore", "laws -> an offline page on which budget, context and limits are dragged")
    explore.add_argument("--out", type=Path, metavar="FILE", help="the page (default: explorer.html of the study)")


def _add_tools(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    """Commands beside the stages; the modules of their options import nothing heavy."""
    from xlstm_scaling import count_command
    from xlstm_scaling.accounting import memory_command
    from xlstm_scaling.fitting import command as surface
    from xlstm_scaling.fitting import runtime_command as runtime
    from xlstm_scaling.inference import command as inference
    from xlstm_scaling.interop import command as interop
    from xlstm_scaling.kernels.arguments import add_tune_arguments
    from xlstm_scaling.kernels.certification import command as certification
    from xlstm_scaling.planning import command as planning
    from xlstm_scaling.published import command as published
    from xlstm_scaling.published.claims import command as claims
    from xlstm_scaling.report import compare_command as compare
    from xlstm_scaling.study import cost_command as cost
    from xlstm_scaling.study import upkeep_command as upkeep
    from xlstm_scaling.training import adopt_command as adopt

    text = "every setting: key, type, default, meaning (docs/configuration.md)"
    reference = command("config-reference", text, "study.reference:run_reference")
    reference.add_argument("--out", type=Path, help="write it to this file (default: print it)")
    text = "compare the kernels of this device with float64: every output, every gradient"
    certification.add_certify_arguments(command("certify", text, "kernels.certification.command:run_certify"))
    text = "measure configurations of the Triton kernels on this GPU and write its table"
    add_tune_arguments(command("tune", text, "kernels.tune_command:run_tune"))
    published.add_ingest_arguments(command("ingest", published.DESCRIPTION, "published.command:run_ingest"))
    claims.add_claims_arguments(command("claims", claims.DESCRIPTION, "published.claims.command:run_claims"))
    text = "one loss surface L(N, D) from a table of runs, with intervals"
    surface.add_surface_arguments(command("fit-surface", text, "fitting.command:run_surface"))
    runtime.add_runtime_arguments(command("runtime", runtime.DESCRIPTION, "fitting.runtime_command:run_runtime"))
    interop.add_export_arguments(command("export", interop.EXPORT_DESCRIPTION, "interop.command:run_export"))
    interop.add_import_arguments(command("import", interop.IMPORT_DESCRIPTION, "interop.command:run_import"))
    inference.add_generate_arguments(command("generate", inference.DESCRIPTION, "inference.command:run_generate"))
    compare.add_compare_arguments(command("compare", compare.DESCRIPTION, "report.compare_command:run_compare"))
    count_command.add_count_arguments(command("count", count_command.DESCRIPTION, "count_command:run_count"))
    text = "memory of a device in training: what fits, item by item"
    memory_command.add_memory_arguments(command("memory", text, "accounting.memory_command:run_memory"))
    adopt.add_adopt_arguments(command("adopt", adopt.DESCRIPTION, "training.adopt_command:run_adopt"))
    cost.add_cost_arguments(command("cost", cost.DESCRIPTION, "study.cost_command:run_cost"))
    upkeep.add_provenance_arguments(command("provenance", upkeep.PROVENANCE, "study.upkeep_command:run_provenance"))
    upkeep.add_clean_arguments(command("clean", upkeep.CLEAN, "study.upkeep_command:run_clean"))
    planning.add_recommend_arguments(command("recommend", planning.DESCRIPTION, "planning.command:run_recommend"))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, with overrides before and after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def run_command(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit status."""
    args = _parse(argv)
    level = os.environ.get("XLSTM_SCALING_LOG", "INFO").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr, force=True)
    module, _, function = args.handler.partition(":")
    try:
        return getattr(importlib.import_module(f"xlstm_scaling.{module}"), function)(args)
    except EXPECTED_ERRORS as error:
        if level == "DEBUG":
            raise
        message = str(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and "disk full" not in message:
            message = f"disk full ({error}): free some space and run again; nothing but the last steps is lost"
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"{message}: not yours to use; --results FOLDER (workflow: --config results=FOLDER) takes another"
        print(f"xlstm-scaling {args.command}: {message}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from xlstm_scaling.study.errors import EXIT_PREEMPTED, Preempted

        if isinstance(error, Preempted):
            print(f"xlstm-scaling {args.command}: {error}", file=sys.stderr)
            return EXIT_PREEMPTED
        raise


def main() -> None:
    """Entry point; a run of a workflow is forked from a process that has imported torch already (warm start), unless
    torchrun has started it."""
    argv = sys.argv[1:]
    if argv and argv[0] == "train" and "WORLD_SIZE" not in os.environ:
        from xlstm_scaling.warmstart import run_warm

        status = run_warm(argv)
        if status is not None:
            sys.exit(status)
    sys.exit(run_command(argv))


if __name__ == "__main__":
    main()
