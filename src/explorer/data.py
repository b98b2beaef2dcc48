"""What the page knows of a study: laws and their resamples, shapes, runtime models, runs; as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import dtype_bytes
from xlstm_scaling.accounting.hardware import DEVICES
from xlstm_scaling.explorer.costs import pack, shape_costs
from xlstm_scaling.figures.style import ArchStyle, arch_styles
from xlstm_scaling.fitting.loss_surface import SURFACE_FIELDS
from xlstm_scaling.fitting.runtime_solver import TERMS
from xlstm_scaling.fitting.runtime_tables import costs_of
from xlstm_scaling.planning.choose import SMOOTHING
from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.laws import ArchLaw, Laws, SurfaceLaw, load_laws
from xlstm_scaling.planning.maps import swept_budget
from xlstm_scaling.planning.notes import forecast_note
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.recommend import candidates_of, countable, with_memory_limit
from xlstm_scaling.planning.runtime import (
    ROOFLINE_BANDWIDTH,
    ROOFLINE_COMPUTE,
    FittedRuntime,
    Roofline,
    Runtime,
    runtime_of_table,
    same_device,
)
from xlstm_scaling.study.files import finite

#: Bokeh's names of matplotlib's markers
MARKERS = {"o": "circle", "s": "square", "^": "triangle", "D": "diamond", "v": "inverted_triangle", "P": "hex"}
RUN_COLUMNS = ("num_params", "num_tokens", "num_flops", "context_length", "val_loss", "learning_rate")
#: digits of the runs' numbers, which are drawn and read only
DIGITS = 7
#: the data sheet that stands first where nothing was measured, as in the figure `choice`
USUAL_SHEET = "H100"
SHAPE_FIELDS = ("embedding_dim", "num_blocks", "num_heads", "head_dim_qk", "head_dim_v")


def page_data(
    laws: Laws | None, runs: pd.DataFrame, runtimes: Iterable[Runtime], about: Mapping[str, Any], reason: str = ""
) -> dict[str, Any]:
    """All that the page needs.

    Args:
        laws: of the study; None where there are none, and ``reason`` says why.
        runs: the table of runs.
        runtimes: to choose from, the first is taken.
        about: ``name``, ``title``, ``laws`` (as `xlstm-scaling recommend` finds them), ``budget`` [FLOPs] to begin with
            (None: the largest of the runs that all laws have).
    """
    laws = None if laws is None else countable(laws)
    runtimes = list(runtimes)
    known = [] if laws is None else list(laws.archs)
    styles = arch_styles({*known, *runs["arch"].dropna().astype(str)})
    widths = sorted({dtype_bytes(runtime.dtype) for runtime in runtimes} or {dtype_bytes("bfloat16")})
    data = {
        "study": dict(about),
        "reason": reason,
        "confidence": None if laws is None else laws.confidence,
        "smoothing": SMOOTHING,
        "fields": list(SURFACE_FIELDS),
        "terms": list(TERMS),
        "notes": [] if laws is None else [*laws.notes, *_forecasts(laws, styles)],
        "archs": [_arch(laws, arch, styles[arch], widths) for arch in styles if arch in known],
        "styles": {arch: _style(style) for arch, style in styles.items()},
        "runtimes": [runtime_data(runtime) for runtime in runtimes],
        "runs": runs_data(runs),
    }
    return finite(data)


def study_runtimes(table: pd.DataFrame | None, source: str) -> list[Runtime]:
    """The fitted runtime models of a study's devices, then rooflines of the data sheets of other devices."""
    fitted: list[FittedRuntime] = []
    if table is not None and "dtype" in table:
        usable = table[table["status"] == "ok"]
        for device in sorted(usable["device"].unique()):
            found = runtime_of_table(usable[usable["device"] == device], None, source)
            fitted += [found] if found is not None else []
    sheets = [s for s in DEVICES.values() if not any(same_device(s.name, one.device) for one in fitted)]
    return [*fitted, *(Roofline(sheet) for sheet in sorted(sheets, key=lambda sheet: sheet.name != USUAL_SHEET))]


def _style(style: ArchStyle) -> dict[str, str]:
    return {"name": style.name, "colour": style.colour, "marker": MARKERS.get(style.marker, "star")}


def _forecasts(laws: Laws, styles: Mapping[str, ArchStyle]) -> list[str]:
    return [
        forecast_note(styles[arch].name, law.forecast_error)
        for arch, law in laws.archs.items()
        if math.isfinite(law.forecast_error)
    ]


def _arch(laws: Laws, arch: str, style: ArchStyle, widths: list[int]) -> dict[str, Any]:
    """One architecture: its law with resamples, and the shapes that are searched."""
    law = laws.archs[arch]
    shapes = candidates_of(law, laws, Question(law.base_context, flops=1.0), None).shapes
    fields = {name: [getattr(shape, name) for shape in shapes] for name in SHAPE_FIELDS}
    return {
        "id": arch,
        **_style(style),
        "subset": law.subset,
        "form": law.form,
        "base_context": law.base_context,
        "surface": surface_data(law.surface),
        "alternatives": [surface_data(other) for other in law.alternatives.values()],
        "ranges": {name: list(ends) for name, ends in law.ranges.items()},
        "lines": _lines(law),
        "shapes": fields,
        "costs": shape_costs(shapes, widths),
    }


def surface_data(surface: SurfaceLaw) -> dict[str, Any]:
    """(1 + R, 6) parameters and (1 + R, m) log factors of contexts."""
    factors = {"contexts": list(surface.contexts), "log_factors": pack(surface.log_factors)}
    return {"params": pack(surface.params), **factors}


def _lines(law: ArchLaw) -> list[dict[str, Any]]:
    return [
        {"context": context, **{variable: pack(lines) for variable, lines in law.lines[context].items()}}
        for context in sorted(law.lines)
    ]


def runtime_data(runtime: Runtime) -> dict[str, Any]:
    """A runtime model: costs of `TERMS` by architecture and quantity, or the rates of a roofline."""
    timed = with_memory_limit(Question(1, flops=1.0, max_ttft_s=1.0), runtime)
    data = {
        "device": runtime.device,
        "about": runtime.about,
        "assumed": runtime.assumed,
        "width": dtype_bytes(runtime.dtype),
        "ranges": {name: list(ends) for name, ends in runtime.ranges.items()},
        "memory_limit_bytes": timed.max_serving_bytes,
    }
    if isinstance(runtime, Roofline):
        return data | {
            "kind": "roofline",
            "flops_per_s": ROOFLINE_COMPUTE * runtime.sheet.flops_per_s(runtime.dtype),
            "bytes_per_s": ROOFLINE_BANDWIDTH * runtime.sheet.bytes_per_s,
        }
    rows: dict[str, dict[str, Any]] = {}
    for (arch, quantity), row in runtime.rows.items():
        if quantity in ("ttft", "step_time"):
            found = {"costs": costs_of(row).tolist(), "norm_p": float(row["norm_p"])}
            rows.setdefault(arch, {})[quantity] = found | {"error": runtime.errors[arch, quantity]}
    return data | {"kind": "fitted", "rows": rows}


def runs_data(runs: pd.DataFrame) -> dict[str, list[Any]]:
    """What hovering over a run shows; numbers to `DIGITS` digits."""
    found: dict[str, list[Any]] = {name: _numbers(runs, name) for name in RUN_COLUMNS}
    batch = _numbers(runs, "global_batch_size_sequences")
    for name in ("run_id", "arch", "experiment_set", "status"):
        values = runs[name] if name in runs else pd.Series("", index=runs.index)
        found[name] = ["" if pd.isna(value) else str(value) for value in values]
    return found | {"batch": batch}


def _numbers(runs: pd.DataFrame, name: str) -> list[float | None]:
    if name not in runs:
        return [None] * len(runs)
    values = runs[name].to_numpy(dtype=np.float64, na_value=np.nan)
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values]


def study_data(folder: Path, title: str) -> dict[str, Any]:
    """`page_data` of a study's folder; where it has no law, its runs and the reason.

    Raises PlanningError where it has no table of runs or no fits yet.
    """
    if not (folder / "runs.parquet").is_file() or not (folder / "fits" / "surface.parquet").is_file():
        raise PlanningError(f"{folder} has no runs and fits yet: run the stages `runs` and `fit` of this study first")
    runs = pd.read_parquet(folder / "runs.parquet")
    path = folder / "inference" / "runtime_model.parquet"
    source = f"{folder.parent.name}/{folder.name}/inference"
    runtimes = study_runtimes(pd.read_parquet(path) if path.is_file() else None, source)
    about = {"name": folder.name, "title": title, "laws": f"{folder.parent.name}/{folder.name}/fits"}
    try:
        laws = countable(load_laws(folder / "fits"))
    except PlanningError as error:
        return page_data(None, runs, runtimes, about, str(error))
    budget = swept_budget(laws, pd.read_parquet(folder / "fits" / "isoflop.parquet"))
    return page_data(laws, runs, runtimes, about | {"budget": budget})
