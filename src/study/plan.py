"""The planner: a study's grid -> the plan of runs, each with its exact N, D, steps, recipe and identity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from xlstm_scaling.accounting import ARCHITECTURES, ModelShape, architecture, count_flops, count_params, make_shape
from xlstm_scaling.accounting.shapes import OPTIONAL_DIMENSIONS
from xlstm_scaling.corpus.identity import tokens_id, tokens_spec
from xlstm_scaling.study.config import ConfigError, to_dict
from xlstm_scaling.study.files import read_json, write_json_atomic
from xlstm_scaling.study.machine import resolve_compute_dtype
from xlstm_scaling.study.run_spec import RunSpec, find_trunks, spec_of
from xlstm_scaling.study.schemas import IsoflopCell, SizeConfig, StudyConfig, TokenParamCell, TrainingConfig


class PlanError(ConfigError):
    """A study that cannot be run or fitted; the message says why and what to change."""


def model_vocab_size(config: DictConfig) -> int:
    """Rows of the embedding: the tokenizer's vocabulary, padded where the tokenizer says so."""
    vocab, multiple = config.tokenizer.vocab_size, config.tokenizer.pad_vocab_to_multiple_of
    if vocab is None:
        raise PlanError("tokenizer.vocab_size is needed to plan (the number of tokens in the tokenizer's file)")
    return vocab if not multiple else -(-vocab // multiple) * multiple


def num_heads(study: StudyConfig, arch: str, embedding_dim: int, explicit: int | dict | None = None) -> int:
    """Heads by the size, else by ``study.heads``: an exception for the width, else ``num_heads``, else the most heads
    of at least ``head_dim`` that divide the width."""
    if isinstance(explicit, int):
        return explicit
    if explicit is not None and arch in explicit:
        return int(explicit[arch])
    rule = study.heads.get(arch)
    if rule is None:
        if arch not in ARCHITECTURES:
            raise PlanError(f"study.architectures: no architecture {arch!r}; there are: {', '.join(ARCHITECTURES)}")
        raise PlanError(f"study.heads.{arch} is missing: give it num_heads or head_dim, e.g. {{head_dim: 64}}")
    if embedding_dim in rule.by_width:
        return rule.by_width[embedding_dim]
    if rule.num_heads is not None:
        return rule.num_heads
    if rule.head_dim is None:
        raise PlanError(f"study.heads.{arch}: neither num_heads nor head_dim, and by_width lacks {embedding_dim}")
    most = max(1, embedding_dim // rule.head_dim)
    return next(n for n in range(most, 0, -1) if embedding_dim % (2 * n) == 0 or n == 1)


class Planner:
    """Turns one composed configuration into runs."""

    def __init__(self, config: DictConfig) -> None:
        try:  # plain objects: reading a DictConfig costs more than all the arithmetic here
            self.study: StudyConfig = OmegaConf.to_object(config.study)
            self.training: TrainingConfig = OmegaConf.to_object(config.training)
        except MissingMandatoryValue as error:
            raise PlanError(str(error).splitlines()[0]) from None
        self.vocab_size = model_vocab_size(config)
        self.tokens = tokens_spec(to_dict(config.corpus), to_dict(config.tokenizer))
        self.tokens_id = tokens_id(to_dict(config.corpus), to_dict(config.tokenizer))
        self.dtype = resolve_compute_dtype(self.training.compute_dtype, config.hardware.device)
        self.optimizer = asdict(self.training.optimizer)
        self.validation = asdict(self.training.validation)
        self.guard = asdict(self.training.guard)
        self.scales: dict[tuple[ModelShape, int], list[float]] = {}
        if self.training.schedule.decay == "constant":
            for shape, context_length, flops in self.demands():
                self.scales.setdefault((shape, context_length), []).append(flops)

    def shape(self, arch: str, embedding_dim: int, num_blocks: int, heads: int | dict | None = None) -> ModelShape:
        try:
            n = num_heads(self.study, arch, embedding_dim, heads)
            options = self.study.shape_options.get(arch, {})
            return make_shape(arch, embedding_dim, num_blocks, n, self.vocab_size, **options)
        except ValueError as error:
            raise PlanError(f"size d={embedding_dim}, blocks={num_blocks}: {error}") from None

    def learning_rate(self, shape: ModelShape, flops: float) -> float:
        rule = self.training.learning_rate
        exception = rule.by_width.get(shape.arch, {}).get(shape.embedding_dim)
        if exception is not None:
            return exception
        width = (rule.reference_width / shape.embedding_dim) ** rule.width_exponent
        budget = (rule.reference_flops / flops) ** rule.flops_exponent
        return float(f"{min(rule.maximum, rule.base * width * budget):.4g}")

    def batch_sequences(self, context_length: int, flops: float, explicit: int | None) -> int:
        if explicit is not None:
            return explicit
        rule = self.training.batch
        tokens = rule.base_tokens * (flops / rule.reference_flops) ** rule.flops_exponent
        return max(rule.min_sequences, 2 ** round(math.log2(tokens / context_length)))

    def run(
        self,
        shape: ModelShape,
        context_length: int,
        batch: int,
        steps: int,
        learning_rate: float,
        warmup_steps: int | None = None,
        **place: object,
    ) -> RunSpec:
        schedule = self.training.schedule
        shortest = min([steps, *self.steps_of(shape, context_length, batch)])
        warmups = (warmup_steps, schedule.warmup_steps, shortest * schedule.warmup_fraction)
        warmup = next(value for value in warmups if value is not None)
        cooldown = (
            schedule.cooldown_steps if schedule.cooldown_steps is not None else steps * schedule.cooldown_fraction
        )
        return RunSpec(
            shape=shape.as_dict(),
            context_length=context_length,
            batch_sequences=batch,
            num_train_steps=steps,
            learning_rate=learning_rate,
            warmup_steps=min(math.ceil(warmup), steps),
            cooldown_steps=min(math.ceil(cooldown), max(0, steps - math.ceil(warmup))),
            final_fraction=schedule.final_fraction,
            optimizer=self.optimizer,
            validation=self.validation,
            model_options=self.training.model_options.get(shape.arch, {}),
            seed=self.training.seed,
            compute_dtype=self.dtype,
            decay=schedule.decay,
            guard=self.guard,
            tokens=self.tokens,
            tokens_id=self.tokens_id,
            **place,
        )

    def steps_for(self, what: str, flops_per_step: float, budget_flops: float) -> int:
        """Steps that cost the budget, to the nearest ``steps_multiple``; PlanError below ``min_steps``."""
        multiple = self.training.steps_multiple
        steps = max(multiple, round(budget_flops / flops_per_step / multiple) * multiple)
        exact = budget_flops / flops_per_step
        if exact < self.training.min_steps:
            raise PlanError(
                f"{what}: the budget of {budget_flops:.3g} FLOPs pays {exact:.2g} steps of {flops_per_step:.3g} FLOPs, "
                f"fewer than training.min_steps = {self.training.min_steps}; raise the budget, or lower the model "
                "size or training.batch.base_tokens"
            )
        return steps

    def architectures(self, cell: IsoflopCell | TokenParamCell) -> Sequence[str]:
        return [a for a in self.study.architectures if cell.architectures is None or a in cell.architectures]

    def size(self, name: str) -> SizeConfig:
        sizes = self.study.sizes
        if name not in sizes:
            raise PlanError(f"size {name!r} is not in study.sizes; known: {', '.join(sizes)}")
        return sizes[name]

    def steps_of(self, shape: ModelShape, context_length: int, batch: int) -> list[float]:
        """Steps of all runs that share a recipe with a constant learning rate."""
        per_step = count_flops(shape, context_length).forward_backward * batch
        return [flops / per_step for flops in self.scales.get((shape, context_length), [])]

    def isoflop_shapes(self, cell: IsoflopCell, arch: str) -> list[tuple[str, ModelShape, float | None]]:
        """Name, shape and explicit learning rate of every size of a cell."""
        shapes = []
        for size_name in cell.sizes:
            size = self.size(size_name)
            shape = self.shape(arch, size.embedding_dim, size.num_blocks, size.num_heads)
            shapes.append((size_name, shape, size.learning_rate))
        for width, depths in cell.grid.items():
            shapes += [(f"d{width}b{depth}", self.shape(arch, width, depth), None) for depth in depths]
        return shapes

    def demands(self) -> Iterator[tuple[ModelShape, int, float]]:
        """Shape, context length and FLOPs of every run whose batch and learning rate follow from its FLOPs."""
        for cell in self.study.isoflop.values():
            for arch in self.architectures(cell):
                for _, shape, _ in self.isoflop_shapes(cell, arch):
                    yield shape, cell.context_length, cell.budget_flops
        for cell in self.study.tokenparam.values():
            for arch in self.architectures(cell):
                for size in map(self.size, cell.sizes):
                    shape = self.shape(arch, size.embedding_dim, size.num_blocks, size.num_heads)
                    flops = count_flops(shape, cell.context_length).forward_backward / cell.context_length
                    for ratio in cell.ratios:
                        yield shape, cell.context_length, ratio * count_params(shape) * flops

    def scale(self, shape: ModelShape, context_length: int, flops: float) -> float:
        """FLOPs that a run's recipe follows: its own; with a constant learning rate those of the longest run of its
        shape and context, so that runs which differ in length alone share their recipe."""
        return max(self.scales.get((shape, context_length), [flops]))

    def isoflop_runs(self, name: str, cell: IsoflopCell) -> Iterator[RunSpec]:
        budget, T = cell.budget_flops, cell.context_length
        for arch in self.architectures(cell):
            for size_name, shape, explicit_lr in self.isoflop_shapes(cell, arch):
                scale = self.scale(shape, T, budget)
                batch = self.batch_sequences(T, scale, cell.batch_sequences)
                per_step = count_flops(shape, T).forward_backward * batch
                steps = self.steps_for(f"study.isoflop.{name}, {arch} {size_name}", per_step, budget)
                rates = (
                    explicit_lr,
                    cell.learning_rate_by_width.get(shape.embedding_dim),
                    self.learning_rate(shape, scale),
                )
                rate = next(value for value in rates if value is not None)
                yield self.run(
                    shape, T, batch, steps, rate, experiment_set="isoflop", isoflop_tag=float(budget), size=size_name
                )

    def tokenparam_runs(self, name: str, cell: TokenParamCell) -> Iterator[RunSpec]:
        T = cell.context_length
        if bool(cell.ratios) == bool(cell.num_train_steps):
            raise PlanError(f"study.tokenparam.{name}: give either ratios or num_train_steps")
        for arch in self.architectures(cell):
            for size_name in cell.sizes:
                size = self.size(size_name)
                shape = self.shape(arch, size.embedding_dim, size.num_blocks, size.num_heads)
                params, flops_per_token = count_params(shape), count_flops(shape, T).forward_backward / T
                for target in cell.ratios or cell.num_train_steps:
                    if cell.ratios:
                        ratio, flops = target, target * params * flops_per_token
                        scale = self.scale(shape, T, flops)
                        batch = self.batch_sequences(T, scale, cell.batch_sequences)
                        what = f"study.tokenparam.{name}, {arch} {size_name} at ratio {ratio:g}"
                        steps = self.steps_for(what, flops_per_token * T * batch, flops)
                    else:
                        if cell.batch_sequences is None:
                            raise PlanError(f"study.tokenparam.{name}: num_train_steps needs batch_sequences")
                        batch, steps = cell.batch_sequences, target
                        scale = flops_per_token * T * batch * steps
                        ratio = nearest_ratio(batch * T * steps / params)
                    rates = (cell.learning_rate, size.learning_rate, self.learning_rate(shape, scale))
                    rate = next(value for value in rates if value is not None)
                    yield self.run(
                        shape, T, batch, steps, rate, cell.warmup_steps, experiment_set="tokenparam", ratio_tag=ratio,
                        size=size_name,
                    )  # fmt: skip

    def runs(self) -> list[RunSpec]:
        """All runs of the study, each once. Raises PlanError on a grid that cannot be fitted."""
        self.check_grid()
        runs: dict[str, RunSpec] = {}
        for name, cell in self.study.isoflop.items():
            for run in self.isoflop_runs(name, cell):
                runs.setdefault(run.run_id, run)
        for name, cell in self.study.tokenparam.items():
            for run in self.tokenparam_runs(name, cell):
                runs.setdefault(run.run_id, run)
        if not runs:
            raise PlanError("the study has no runs: give study.isoflop or study.tokenparam at least one cell")
        return list(runs.values())

    def check_grid(self) -> None:
        study = self.study
        if not study.architectures:
            raise PlanError(f"study.architectures is empty; known architectures: {', '.join(ARCHITECTURES)}")
        for arch in study.architectures:
            try:
                architecture(arch)
            except ValueError as error:
                raise PlanError(f"study.architectures: {error}") from None
        for name, cell in study.isoflop.items():
            count = len(set(cell.sizes)) + sum(len(depths) for depths in cell.grid.values())
            if count < study.min_sizes:
                raise PlanError(
                    f"study.isoflop.{name} has {count} sizes; a parabola needs at least study.min_sizes = "
                    f"{study.min_sizes} for a fit with an interval"
                )


#: the token/param ratios that the paper labels runs with
PAPER_RATIOS = (22.0, 44.0, 110.0, 220.0, 550.0, 1100.0, 2200.0)


def nearest_ratio(ratio: float, tolerance: float = 0.18) -> float | None:
    """The paper's ratio label within ``tolerance`` (relative) of a run's D/N, else None."""
    label = min(PAPER_RATIOS, key=lambda r: abs(math.log(r / ratio)))
    return label if abs(ratio / label - 1) <= tolerance else None


def plan_runs(config: DictConfig) -> list[RunSpec]:
    """The runs of a study (see ``Planner.runs``); needs no tokens on disk."""
    return Planner(config).runs()


def plan_table(runs: Sequence[RunSpec], config: DictConfig, corpus_tokens: float | None) -> pd.DataFrame:
    """One row a run: identity, N, D, H, recipe, trunk if it shares one, epochs over the corpus and estimated time."""
    rows = []
    shared = {trunk.trunk_id for trunk in find_trunks(runs)}
    for run in runs:
        rows.append(
            {
                "run_id": run.run_id,
                "experiment_set": run.experiment_set,
                "isoflop_tag": run.isoflop_tag,
                "ratio_tag": run.ratio_tag,
                "size": run.size,
                "context_length": run.context_length,
                **run.shape,
                "num_params": run.num_params,
                "num_tokens": run.num_tokens,
                "num_flops": run.num_flops,
                "tokens_per_param": run.num_tokens / run.num_params,
                "global_batch_size_sequences": run.batch_sequences,
                "num_train_steps": run.num_train_steps,
                "trunk_id": run.trunk_id if run.trunk_id in shared else None,
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "compute_dtype": run.compute_dtype,
                "epochs": run.num_tokens / corpus_tokens if corpus_tokens else math.nan,
                "estimated_time_s": run.num_flops / config.hardware.flops_per_s,
            }
        )
    table = pd.DataFrame(rows)
    for column in ("isoflop_tag", "ratio_tag"):
        table[column] = table[column].astype("float64")
    for column in OPTIONAL_DIMENSIONS:
        table[column] = table[column].astype("Int64") if column in table else pd.Series(pd.NA, table.index, "Int64")
    return table


def plan_warnings(table: pd.DataFrame, config: DictConfig) -> list[str]:
    """What a reader should know about the plan. Raises PlanError where runs repeat the corpus too often."""
    study = config.study
    warnings = []
    worst = table.loc[table.epochs.idxmax()] if table.epochs.notna().any() else None
    if worst is not None and worst.epochs > study.max_epochs:
        raise PlanError(
            f"corpus too small for the plan: {worst.run_id} needs {worst.num_tokens:.3g} tokens, {worst.epochs:.1f} "
            f"epochs of the corpus, above study.max_epochs = {study.max_epochs:g}; use more text, smaller budgets, or "
            "larger models"
        )
    repeated = table[table.epochs > study.warn_epochs]
    if len(repeated):
        warnings.append(
            f"{len(repeated)} of {len(table)} runs repeat the corpus more than {study.warn_epochs:g} times (most: "
            f"{repeated.epochs.max():.1f}): repeated data is worth less (Muennighoff et al., 2023)"
        )
    return warnings


def write_plan(path: Path, runs: Sequence[RunSpec], config: DictConfig, warnings: Sequence[str] = ()) -> None:
    """A plan that runs can be trained from: ``plan.json``."""
    write_json_atomic(
        path,
        {
            "study": config.study.name,
            "corpus": config.corpus.name,
            "hardware": to_dict(config.hardware),
            "warnings": list(warnings),
            "runs": [asdict(run) for run in runs],
        },
    )


def load_plan(path: Path) -> tuple[dict, list[RunSpec]]:
    """``plan.json`` -> its content and its runs.

    FileNotFoundError where there is none, PlanError where it is of code with other settings; both say what to run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no plan at {path}: run the stage `plan` first")
    content = read_json(path)
    specs = [spec_of(run) for run in content["runs"]]
    if None in specs:
        raise PlanError(f"{path} is a plan of other code than this: run the stage `plan` again")
    return content, specs


def benchmarked_runs(config: DictConfig, runs: Sequence[RunSpec]) -> list[RunSpec]:
    """Trained runs that the inference stage measures: ``inference.num_trained`` by architecture, the largest of the
    largest budget at the base context (of all runs where there is no such budget)."""
    chosen = []
    for arch in config.study.architectures:
        of_arch = [run for run in runs if run.arch == arch]
        base = [run for run in of_arch if run.context_length == config.study.base_context and run.isoflop_tag]
        top = max((run.isoflop_tag for run in base), default=None)
        candidates = [run for run in base if run.isoflop_tag == top] or of_arch
        chosen += sorted(candidates, key=lambda run: -run.num_params)[: config.inference.num_trained]
    return chosen
