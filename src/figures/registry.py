"""Every figure of a study: its name, what draws it, and the tables it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from .context import context, context_data
from .curves import curves_data, training_curves
from .inference import step_time, timing_data, ttft
from .isoflop import isoflop_curves, isoflop_data
from .optimal import compute_optimal
from .overtraining import overtraining, overtraining_data
from .overview import study_overview
from .pareto import loss_vs_flops
from .sensitivity import sensitivity, sensitivity_data
from .surface import loss_surface, surface_data
from .tables import Tables

CATEGORIES = ("Overview", "Training", "Scaling laws", "Inference")

Draw = Callable[[Tables, Mapping[str, Any]], Figure]
Data = Callable[[Tables, Mapping[str, Any]], pd.DataFrame]


@dataclass(frozen=True)
class FigureSpec:
    """One figure. `tables` are required; `data` gives the tidy table drawn where that is not already an output."""

    name: str
    draw: Draw
    title: str
    category: str
    tables: tuple[str, ...]
    data: Data | None = None

    @property
    def caption(self) -> str:
        """File name of the report caption in `workflow/report`."""
        return f"{self.name}.rst"


_POWER = ("fits/power_laws", "fits/power_law_bands")
_TIMES = ("inference/measurements", "inference/runtime_model", "inference/runtime_predictions")

_ALL = (
    FigureSpec(
        "loss_vs_flops",
        loss_vs_flops,
        "Loss against training compute",
        "Overview",
        ("runs", "fits/pareto", "fits/pareto_ratio"),
    ),
    FigureSpec("study_overview", study_overview, "The plan: model sizes and tokens", "Overview", ("runs",)),
    FigureSpec("training_curves", training_curves, "Training curves", "Training", ("curves",), curves_data),
    FigureSpec(
        "isoflop_curves", isoflop_curves, "IsoFLOP curves", "Scaling laws", ("runs", "fits/isoflop"), isoflop_data
    ),
    FigureSpec(
        "compute_optimal",
        compute_optimal,
        "Compute-optimal model size and tokens",
        "Scaling laws",
        ("runs", "fits/isoflop", *_POWER),
    ),
    FigureSpec(
        "loss_surface",
        loss_surface,
        "Fitted loss surface",
        "Scaling laws",
        ("runs", "fits/surface", "fits/surface_predictions"),
        surface_data,
    ),
    FigureSpec(
        "overtraining", overtraining, "Over-training", "Scaling laws", ("runs", "fits/overtraining"), overtraining_data
    ),
    FigureSpec(
        "context",
        context,
        "Effect of the context length",
        "Scaling laws",
        ("runs", "fits/isoflop", *_POWER),
        context_data,
    ),
    FigureSpec(
        "sensitivity",
        sensitivity,
        "Sensitivity of the exponent",
        "Scaling laws",
        ("fits/power_laws", "fits/surface"),
        sensitivity_data,
    ),
    FigureSpec(
        "ttft",
        ttft,
        "Time to first token",
        "Inference",
        _TIMES,
        lambda tables, config: timing_data(tables, "ttft", config),
    ),
    FigureSpec(
        "step_time",
        step_time,
        "Step time",
        "Inference",
        _TIMES,
        lambda tables, config: timing_data(tables, "step_time", config),
    ),
)

FIGURES: dict[str, FigureSpec] = {spec.name: spec for spec in _ALL}
