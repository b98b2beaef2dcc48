"""The stages as the command runs them: what `stages` does, and what is printed of it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf

from xlstm_scaling import experiments, stages
from xlstm_scaling.study.config import ConfigError, compose, to_dict
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import plan_runs
from xlstm_scaling.study.run_spec import RunSpec, find_trunks
from xlstm_scaling.study.status import unfinished_lines


def run_stage(args: argparse.Namespace) -> int:
    """Compose the configuration that the overrides name and run the stage ``args.command``; returns 0."""
    if args.command == "train" and args.plan is not None:
        _train_from_plan(args)
        return 0
    config = compose(args.overrides)
    _STAGES[args.command](args, config, StudyPaths.of(config, args.results))
    return 0


def _config(args: argparse.Namespace, config: DictConfig, paths: StudyPaths) -> None:
    print(OmegaConf.to_yaml(config, resolve=True), end="")


def _plan(args: argparse.Namespace, config: DictConfig, paths: StudyPaths) -> None:
    table = stages.plan(config, paths)
    columns = ["run_id", "num_params", "num_tokens", "num_flops", "learning_rate", "epochs", "estimated_time_s"]
    print(table[columns].to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    total = table.num_flops.sum()
    print(f"{len(table)} runs, {total:.4g} FLOPs, about {table.estimated_time_s.sum() / 60:.3g} core-minutes")
    trunks = find_trunks(plan_runs(config))
    if trunks:
        saved = sum(trunk.saved_flops for trunk in trunks)
        shared = sum(len(trunk.runs) for trunk in trunks)
        print(f"{shared} runs branch off {len(trunks)} trunks: {saved:.4g} FLOPs ({saved / total:.0%}) less to train")


def _train(args: argparse.Namespace, config: DictConfig, paths: StudyPaths) -> None:
    _train_runs(args, plan_runs(config), to_dict(config.hardware))


def _train_from_plan(args: argparse.Namespace) -> None:
    if args.overrides:
        raise ConfigError("give either --plan or overrides, not both")
    content, specs = stages.load_plan(args.plan)
    _train_runs(args, specs, content["hardware"])


def _train_runs(args: argparse.Namespace, specs: Sequence[RunSpec], hardware: dict) -> None:
    if [args.all, args.run is not None, args.trunk is not None].count(True) != 1:
        names = "\n  ".join(spec.run_id for spec in specs[:20])
        raise ConfigError(f"name a run with --run, or give --all; the plan has {len(specs)}:\n  {names}")
    leads = os.environ.get("RANK", "0") == "0"  # of several processes (torchrun) one speaks
    progress = not args.quiet
    trunks = {trunk.trunk_id: trunk for trunk in find_trunks(specs)}
    if args.trunk is not None and args.trunk not in trunks:
        raise ConfigError(f"no trunk {args.trunk!r} in the plan; there are: {', '.join(trunks) or 'none'}")
    for name in [args.trunk] if args.trunk is not None else trunks if args.all else []:
        result = stages.train_trunk(trunks[name], hardware, args.results, progress, args.uncertified)
        if leads:
            print(f"{name}: {result['status']}, kept at steps {', '.join(map(str, result['steps']))}")
    if args.trunk is not None:
        return
    for spec in specs if args.all else [stages.find_run(specs, args.run)]:
        result = stages.train(spec, hardware, args.results, progress, args.uncertified, trunks.get(spec.trunk_id or ""))
        if leads:
            print(f"{spec.run_id}: {result['status']}, validation loss {result['val_loss']:.4f} nat/token")


def _status(args: argparse.Namespace, config: DictConfig, paths: StudyPaths) -> None:
    status = stages.status(config, paths)
    table = status.runs
    if args.json:
        counts = table.state.value_counts().to_dict()
        shares = {"flops_done": status.flops_done, "flops_planned": status.flops_planned}
        runs = json.loads(table.to_json(orient="records"))
        print(json.dumps({"states": counts, **shares, "seconds_left": status.seconds_left, "runs": runs}))
        return
    print(status.summary())
    shown = table if args.all else table[~table.state.isin(["ok", "pending"])]
    if len(shown):
        columns = ["run_id", "state", "step", "steps", "loss", "tokens_per_s", "where"]
        print()
        print(shown[columns].to_string(index=False, na_rep="", float_format=lambda value: f"{value:,.4g}"))
    for line in unfinished_lines(status, paths.results, ("failed", "diverged", "stopped")):
        print(line)


def _findings(args: argparse.Namespace, config: DictConfig, paths: StudyPaths) -> None:
    for row in stages.findings(config, paths).itertuples():
        print(f"- {row.statement}")


_STAGES: dict[str, Callable[[argparse.Namespace, DictConfig, StudyPaths], object]] = {
    "config": _config,
    "tokens": lambda args, config, paths: stages.tokens(config, paths, not args.quiet, args.workers, args.part),
    "plan": _plan,
    "train": _train,
    "status": _status,
    "runs": lambda args, config, paths: stages.runs(paths),
    "download": lambda args, config, paths: stages.download(config, paths, args.only, not args.quiet),
    "fit": lambda args, config, paths: stages.fit(config, paths),
    "inference": lambda args, config, paths: stages.inference(config, paths, not args.quiet),
    "evaluate": lambda args, config, paths: stages.evaluate(config, paths, not args.quiet),
    "findings": _findings,
    "report": lambda args, config, paths: print(stages.report(config, paths)),
    "figures": lambda args, config, paths: stages.figures(config, paths, args.only, not args.quiet),
    "explore": lambda args, config, paths: print(stages.explore(config, paths, args.out)),
    "experiment": lambda args, config, paths: print(
        experiments.run(args.name, config, paths, args.part, not args.quiet)
    ),
}
