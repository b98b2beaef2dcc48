"""Draw the figures of a study from its results folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from xlstm_scaling.study.files import atomic_write

from .registry import FIGURES, ON_DEMAND
from .tables import FigureError, Tables

FORMATS = ("svg", "png")


def figure_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `figures` group of a resolved config (or the group itself), with the level of `fitting.confidence`."""
    options = dict(config.get("figures") or config)
    fitting = config.get("fitting")
    if options.get("confidence") is None:
        level = fitting.get("confidence") if isinstance(fitting, Mapping) else None
        options["confidence"] = 0.95 if level is None else float(level)
    return options


def figure_names(config: Mapping[str, Any], only: Sequence[str] | None = None) -> list[str]:
    """The figures to draw: `only`, else `figures.only`, else all; FigureError names one that does not exist."""
    chosen = list(only if only is not None else figure_config(config).get("only") or FIGURES)
    unknown = [name for name in chosen if name not in FIGURES]
    if unknown:
        raise FigureError(f"no figure {', '.join(map(repr, unknown))}; there are: {', '.join(FIGURES)}")
    return chosen


def drawable_names(config: Mapping[str, Any], inference: bool = True) -> list[str]:
    """The figures of a study: those of the config, without those of inference where there are no measurements, and
    without those that evaluate a model where the runs are published ones. Experiments draw theirs themselves."""
    published = (config.get("runs") or {}).get("source") == "published"
    left_out = (ON_DEMAND, "Length") if published else (ON_DEMAND,)
    names = [name for name in figure_names(config) if FIGURES[name].category not in left_out]
    return names if inference else [name for name in names if FIGURES[name].category != "Inference"]


def figure_outputs(out_dir: Path, config: Mapping[str, Any], only: Sequence[str] | None = None) -> list[Path]:
    """The files `draw_all` will write, without drawing."""
    options = figure_config(config)
    paths = []
    for name in figure_names(config, only):
        paths += [Path(out_dir) / f"{name}.{kind}" for kind in options.get("formats") or FORMATS]
        if FIGURES[name].data_reference is not None:
            paths.append(Path(out_dir) / f"{name}.csv")
    return paths


def captions(folder: Path) -> dict[str, Path]:
    """The report caption of each figure in `folder` (`workflow/report`); FigureError where one is missing."""
    found = {name: Path(folder) / spec.caption for name, spec in FIGURES.items()}
    lacking = [str(path) for path in found.values() if not path.is_file()]
    if lacking:
        raise FigureError(f"captions are missing: {', '.join(lacking)}")
    return found


def require(tables: Tables, names: Sequence[str]) -> None:
    """Raise FigureError naming every missing table of the figures `names`, before anything is drawn."""
    problems = []
    for name in names:
        for table in FIGURES[name].tables:
            try:
                tables[table]
            except FigureError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise FigureError("\n".join(problems))


def _write_csv(frame: pd.DataFrame, path: Path) -> Path:
    with atomic_write(path, "w") as stream:
        frame.to_csv(stream, index=False, lineterminator="\n")
    return path


def draw_all(
    results_dir: Path,
    out_dir: Path,
    config: Mapping[str, Any],
    only: Sequence[str] | None = None,
    progress: bool = True,
) -> list[Path]:
    """Draw figures from the tables in `results_dir` into `out_dir`; returns the files written.

    Each figure is written in every format of `figures.formats`, with the tidy table it was drawn from as CSV where
    that is not an output of another stage. Raises FigureError, before drawing, where a required table is missing.
    """
    from .style import save_figure  # matplotlib loads when figures are drawn

    tables, out_dir, options = Tables(results_dir), Path(out_dir), figure_config(config)
    names = figure_names(config, only)
    require(tables, names)
    out_dir.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    steps = names
    if progress:
        from tqdm import tqdm

        steps = tqdm(names, desc="figures", unit="figure")
    for name in steps:
        spec = FIGURES[name]
        figure = spec.draw(tables, options)
        written += save_figure(
            figure, out_dir / name, options.get("formats") or FORMATS, int(options.get("dpi") or 200)
        )
        if spec.data is not None:
            written.append(_write_csv(spec.data(tables, options), out_dir / f"{name}.csv"))
    return written
