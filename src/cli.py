"""The command ``xlstm-scaling``: each stage of a study by hand, with Hydra overrides."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xlstm_scaling.study.status import StudyStatus

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xlstm-scaling",
        description="Scaling laws of xLSTM and Transformer language models, stage by stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from xlstm_scaling import __version__

    parser.add_argument("--version", action="version", version=f"xlstm-scaling {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def stage(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, e.g. study=smoke")
        sub.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    stage("config", "print the resolved configuration")
    text = "every setting: key, type, default, meaning (docs/configuration.md)"
    reference = commands.add_parser("config-reference", help=text, description=text)
    reference.add_argument("--out", type=Path, help="write it to this file (default: print it)")
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

    from xlstm_scaling.kernels.arguments import add_tune_arguments
    from xlstm_scaling.kernels.certification import command as certification

    text = "compare the kernels of this device with float64: every output, every gradient"
    certification.add_certify_arguments(commands.add_parser("certify", help=text, description=text))
    text = "measure configurations of the Triton kernels on this GPU and write its table"
    add_tune_arguments(commands.add_parser("tune", help=text, description=text))
    from xlstm_scaling.published import command as published

    text = published.DESCRIPTION
    published.add_ingest_arguments(commands.add_parser("ingest", help=text, description=text))
    from xlstm_scaling.published import claims_command

    text = claims_command.DESCRIPTION
    claims_command.add_claims_arguments(commands.add_parser("claims", help=text, description=text))

    from xlstm_scaling.fitting.command import add_surface_arguments

    text = "one loss surface L(N, D) from a table of runs, with intervals"
    add_surface_arguments(commands.add_parser("fit-surface", help=text, description=text))

    from xlstm_scaling.fitting import runtime_command as runtime

    text = runtime.DESCRIPTION
    runtime.add_runtime_arguments(commands.add_parser("runtime", help=text, description=text))

    from xlstm_scaling.interop import command as interop

    text = interop.EXPORT_DESCRIPTION
    interop.add_export_arguments(commands.add_parser("export", help=text, description=text))
    text = interop.IMPORT_DESCRIPTION
    interop.add_import_arguments(commands.add_parser("import", help=text, description=text))

    from xlstm_scaling.inference import command as inference

    text = inference.DESCRIPTION
    inference.add_generate_arguments(commands.add_parser("generate", help=text, description=text))

    from xlstm_scaling.report import compare_command as compare

    text = compare.DESCRIPTION
    compare.add_compare_arguments(commands.add_parser("compare", help=text, description=text))

    from xlstm_scaling.accounting import memory_command

    count = commands.add_parser("count", help="parameters and FLOPs of one model", description=_count.__doc__)
    memory_command.add_shape_arguments(count)
    for name in ("embedding-dim", "num-blocks", "num-heads", "vocab-size", "context-length"):
        count.add_argument(f"--{name}", type=int, required=True)
    count.add_argument("--chunk-size", type=int, default=64, help="mLSTM chunk [tokens] (default: 64)")
    count.add_argument(
        "--convention", default="paper", choices=["paper", "chinchilla", "tfla", "6nd", "traced"],
        help="how FLOPs are counted (default: paper)",
    )  # fmt: skip
    count.add_argument("--json", action="store_true", help="print JSON")

    text = "memory of a device in training: what fits, item by item"
    memory_command.add_memory_arguments(commands.add_parser("memory", help=text, description=text))

    from xlstm_scaling.training import adopt_command

    text = adopt_command.DESCRIPTION
    adopt_command.add_adopt_arguments(commands.add_parser("adopt", help=text, description=text))

    from xlstm_scaling.study import cost_command

    text = cost_command.DESCRIPTION
    cost_command.add_cost_arguments(commands.add_parser("cost", help=text, description=text))

    from xlstm_scaling.study import upkeep_command as upkeep

    text = upkeep.PROVENANCE
    upkeep.add_provenance_arguments(commands.add_parser("provenance", help=text, description=text))
    text = upkeep.CLEAN
    upkeep.add_clean_arguments(commands.add_parser("clean", help=text, description=text))

    from xlstm_scaling.planning import command as planning

    text = planning.DESCRIPTION
    planning.add_recommend_arguments(commands.add_parser("recommend", help=text, description=text))
    return parser


def _count(args: argparse.Namespace) -> int:
    """Parameters and FLOPs per sequence of one model, under a named convention."""
    from xlstm_scaling.accounting import count_flops, count_params, make_shape
    from xlstm_scaling.accounting.memory_command import shape_options

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


def _config_reference(args: argparse.Namespace) -> int:
    from xlstm_scaling.study.files import write_text_atomic
    from xlstm_scaling.study.reference import reference

    if args.out is None:
        print(reference(), end="")
    else:
        write_text_atomic(args.out, reference())
    return 0


def _memory(args: argparse.Namespace) -> int:
    from xlstm_scaling.accounting.memory_command import run_memory

    return run_memory(args)


def _adopt(args: argparse.Namespace) -> int:
    from xlstm_scaling.training.adopt_command import run_adopt

    return run_adopt(args)


def _provenance(args: argparse.Namespace) -> int:
    from xlstm_scaling.study.upkeep_command import run_provenance

    return run_provenance(args)


def _clean(args: argparse.Namespace) -> int:
    from xlstm_scaling.study.upkeep_command import run_clean

    return run_clean(args)


def _cost(args: argparse.Namespace) -> int:
    from xlstm_scaling.study.cost_command import run_cost

    return run_cost(args)


def _recommend(args: argparse.Namespace) -> int:
    from xlstm_scaling.planning.command import run_recommend

    return run_recommend(args)


def _certify(args: argparse.Namespace) -> int:
    from xlstm_scaling.kernels.certification.command import run_certify

    return run_certify(args)


def _tune(args: argparse.Namespace) -> int:
    from xlstm_scaling.kernels.tuning import tune_command

    return tune_command(args)


def _ingest(args: argparse.Namespace) -> int:
    from xlstm_scaling.published.command import run_ingest

    return run_ingest(args)


def _fit_surface(args: argparse.Namespace) -> int:
    from xlstm_scaling.fitting.command import run_surface

    return run_surface(args)


def _runtime(args: argparse.Namespace) -> int:
    from xlstm_scaling.fitting.runtime_command import run_runtime

    return run_runtime(args)


def _claims(args: argparse.Namespace) -> int:
    from xlstm_scaling.published.claims_command import run_claims

    return run_claims(args)


def _export(args: argparse.Namespace) -> int:
    from xlstm_scaling.interop.command import run_export

    return run_export(args)


def _import(args: argparse.Namespace) -> int:
    from xlstm_scaling.interop.command import run_import

    return run_import(args)


def _compare(args: argparse.Namespace) -> int:
    from xlstm_scaling.report.compare_command import run_compare

    return run_compare(args)


def _generate(args: argparse.Namespace) -> int:
    from xlstm_scaling.inference.command import run_generate

    return run_generate(args)


def _stage(args: argparse.Namespace) -> int:
    from xlstm_scaling import stages
    from xlstm_scaling.study.config import ConfigError, compose
    from xlstm_scaling.study.paths import StudyPaths

    progress = not args.quiet
    if args.command == "train" and args.plan is not None:
        if args.overrides:
            raise ConfigError("give either --plan or overrides, not both")
        content, specs = stages.load_plan(args.plan)
        return _train(args, specs, content["hardware"], progress)
    config = compose(args.overrides)
    if args.command == "config":
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config, resolve=True), end="")
        return 0
    paths = StudyPaths.of(config, args.results)
    if args.command == "tokens":
        stages.tokens(config, paths, progress, args.workers, args.part)
    elif args.command == "plan":
        from xlstm_scaling.study.plan import find_trunks, plan_runs

        table = stages.plan(config, paths)
        columns = ["run_id", "num_params", "num_tokens", "num_flops", "learning_rate", "epochs", "estimated_time_s"]
        print(table[columns].to_string(index=False, float_format=lambda x: f"{x:.4g}"))
        total = table.num_flops.sum()
        print(f"{len(table)} runs, {total:.4g} FLOPs, about {table.estimated_time_s.sum() / 60:.3g} core-minutes")
        trunks = find_trunks(plan_runs(config))
        if trunks:
            saved = sum(trunk.saved_flops for trunk in trunks)
            shared = sum(len(trunk.runs) for trunk in trunks)
            print(
                f"{shared} runs branch off {len(trunks)} trunks: {saved:.4g} FLOPs ({saved / total:.0%}) less to train"
            )
    elif args.command == "train":
        from xlstm_scaling.study.config import to_dict
        from xlstm_scaling.study.plan import plan_runs

        return _train(args, plan_runs(config), to_dict(config.hardware), progress)
    elif args.command == "status":
        return _status(args, stages.status(config, paths), args.results)
    elif args.command == "runs":
        stages.runs(paths)
    elif args.command == "download":
        stages.download(config, paths, args.only, progress)
    elif args.command == "fit":
        stages.fit(config, paths)
    elif args.command == "inference":
        stages.inference(config, paths, progress)
    elif args.command == "evaluate":
        stages.evaluate(config, paths, progress)
    elif args.command == "findings":
        for row in stages.findings(config, paths).itertuples():
            print(f"- {row.statement}")
    elif args.command == "report":
        print(stages.report(config, paths))
    elif args.command == "figures":
        stages.figures(config, paths, args.only, progress)
    elif args.command == "explore":
        print(stages.explore(config, paths, args.out))
    elif args.command == "experiment":
        from xlstm_scaling import experiments

        print(experiments.run(args.name, config, paths, args.part, progress))
    return 0


def _status(args: argparse.Namespace, status: StudyStatus, results: Path) -> int:
    table = status.runs
    if args.json:
        counts = table.state.value_counts().to_dict()
        shares = {"flops_done": status.flops_done, "flops_planned": status.flops_planned}
        runs = json.loads(table.to_json(orient="records"))
        print(json.dumps({"states": counts, **shares, "seconds_left": status.seconds_left, "runs": runs}))
        return 0
    print(status.summary())
    shown = table if args.all else table[~table.state.isin(["ok", "pending"])]
    if len(shown):
        columns = ["run_id", "state", "step", "steps", "loss", "tokens_per_s", "where"]
        print()
        print(shown[columns].to_string(index=False, na_rep="", float_format=lambda value: f"{value:,.4g}"))
    from xlstm_scaling.study.status import log_tail

    for row in table[table.state.isin(["failed", "diverged", "stopped"])].itertuples():
        print(f"\n{row.run_id} {row.state}: {row.detail or 'it goes on when it is started again'}")
        path = results / "logs" / "runs" / f"{row.run_id}.log"
        if row.state != "diverged" and path.is_file():
            print(f"  {path} ends with")
            print("".join(f"    {line}\n" for line in log_tail(path)), end="")
    return 0


def _train(args: argparse.Namespace, specs: Sequence, hardware: dict, progress: bool) -> int:
    from xlstm_scaling import stages
    from xlstm_scaling.study.config import ConfigError
    from xlstm_scaling.study.plan import find_trunks

    if [args.all, args.run is not None, args.trunk is not None].count(True) != 1:
        names = "\n  ".join(spec.run_id for spec in specs[:20])
        raise ConfigError(f"name a run with --run, or give --all; the plan has {len(specs)}:\n  {names}")
    leads = os.environ.get("RANK", "0") == "0"  # of several processes (torchrun) one speaks
    trunks = {trunk.trunk_id: trunk for trunk in find_trunks(specs)}
    if args.trunk is not None and args.trunk not in trunks:
        raise ConfigError(f"no trunk {args.trunk!r} in the plan; there are: {', '.join(trunks) or 'none'}")
    for name in [args.trunk] if args.trunk is not None else trunks if args.all else []:
        result = stages.train_trunk(trunks[name], hardware, args.results, progress, args.uncertified)
        if leads:
            print(f"{name}: {result['status']}, kept at steps {', '.join(map(str, result['steps']))}")
    chosen = specs if args.all else [stages.find_run(specs, args.run)] if args.run is not None else []
    for spec in chosen:
        result = stages.train(spec, hardware, args.results, progress, args.uncertified, trunks.get(spec.trunk_id or ""))
        if leads:
            print(f"{spec.run_id}: {result['status']}, validation loss {result['val_loss']:.4f} nat/token")
    return 0


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message says all: printed without a traceback."""
    return (ValueError, FileNotFoundError, OSError)


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
    handlers: dict[str, Callable[[argparse.Namespace], int]] = {"count": _count, "certify": _certify, "tune": _tune}
    handlers |= {"ingest": _ingest, "fit-surface": _fit_surface, "claims": _claims, "runtime": _runtime}
    handlers |= {"export": _export, "import": _import, "memory": _memory, "generate": _generate, "compare": _compare}
    handlers |= {"config-reference": _config_reference}
    handlers |= {"recommend": _recommend, "cost": _cost, "adopt": _adopt, "provenance": _provenance, "clean": _clean}
    handler = handlers.get(args.command, _stage)
    try:
        return handler(args)
    except expected_errors() as error:
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
