"""Every figure of a study: its name, what draws it, and the tables it needs.

The drawing code is imported when a figure is drawn, so that the workflow can ask for names without matplotlib.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .tables import Tables

    Draw = Callable[[Tables, Mapping[str, Any]], Figure]
    Data = Callable[[Tables, Mapping[str, Any]], pd.DataFrame]

CATEGORIES = ("Overview", "Training", "Scaling laws", "Length", "Inference", "Choice", "Experiments")
#: drawn by targets of their own, from the tables of their folders (``experiments.EXPERIMENTS``)
ON_DEMAND = "Experiments"


def _load(reference: str) -> Callable:
    """``module:function`` of this package."""
    module, name = reference.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


@dataclass(frozen=True)
class FigureSpec:
    """One figure. `tables` are required; `data` gives the tidy table drawn where that is not already an output."""

    name: str
    draw_reference: str
    title: str
    category: str
    tables: tuple[str, ...]
    data_reference: str | None = None

    @property
    def draw(self) -> Draw:
        """(tables, options) -> Figure."""
        return _load(self.draw_reference)

    @property
    def data(self) -> Data | None:
        """(tables, options) -> the tidy table drawn, or None."""
        return None if self.data_reference is None else _load(self.data_reference)

    @property
    def caption(self) -> str:
        """File name of the report caption in `workflow/report`."""
        return f"{self.name}.rst"


_POWER = ("fits/power_laws", "fits/power_law_bands")
_TIMES = ("inference/measurements", "inference/runtime_model", "inference/runtime_predictions")

_LAWS = tuple(f"fits/{name}" for name in ("surface", "surface_resamples", "surface_predictions", "isoflop"))

_ALL = (
    FigureSpec(
        "loss_vs_flops",
        "pareto:loss_vs_flops",
        "Loss against training compute",
        "Overview",
        ("runs", "fits/pareto", "fits/pareto_ratio"),
    ),
    FigureSpec("study_overview", "overview:study_overview", "The plan: model sizes and tokens", "Overview", ("runs",)),
    FigureSpec(
        "loss_map", "grid:loss_map", "Loss by model size and tokens", "Training", ("runs",), "grid:loss_map_data"
    ),
    FigureSpec(
        "training_curves", "curves:training_curves", "Training curves", "Training", ("curves",), "curves:curves_data"
    ),
    FigureSpec(
        "isoflop_curves",
        "isoflop:isoflop_curves",
        "IsoFLOP curves",
        "Scaling laws",
        ("runs", "fits/isoflop"),
        "isoflop:isoflop_data",
    ),
    FigureSpec(
        "isoflop_contexts",
        "grid:isoflop_contexts",
        "IsoFLOP curves at every context",
        "Scaling laws",
        ("runs", "fits/isoflop"),
    ),
    FigureSpec(
        "compute_optimal",
        "optimal:compute_optimal",
        "Compute-optimal model size and tokens",
        "Scaling laws",
        ("runs", "fits/isoflop", *_POWER),
    ),
    FigureSpec(
        "power_laws",
        "grid:power_laws",
        "Power laws at every context",
        "Scaling laws",
        ("fits/isoflop", *_POWER),
    ),
    FigureSpec(
        "loss_surface",
        "surface:loss_surface",
        "Fitted loss surface",
        "Scaling laws",
        ("runs", "fits/surface", "fits/surface_predictions"),
        "surface:surface_data",
    ),
    FigureSpec(
        "surface_ratio",
        "ratios:surface_ratio",
        "Loss surface by tokens per parameter",
        "Scaling laws",
        ("runs", "fits/surface"),
        "ratios:surface_ratio_data",
    ),
    FigureSpec(
        "overtraining",
        "overtraining:overtraining",
        "Over-training",
        "Scaling laws",
        ("runs", "fits/overtraining"),
        "overtraining:overtraining_data",
    ),
    FigureSpec(
        "context",
        "context:context",
        "Effect of the context length",
        "Scaling laws",
        ("runs", "fits/isoflop", *_POWER),
        "context:context_data",
    ),
    FigureSpec(
        "sensitivity",
        "sensitivity:sensitivity",
        "Sensitivity of the exponent",
        "Scaling laws",
        ("fits/power_laws", "fits/surface"),
        "sensitivity:sensitivity_data",
    ),
    FigureSpec(
        "forecasts",
        "forecasts:forecasts",
        "Laws judged on budgets they have not seen",
        "Scaling laws",
        ("fits/forecasts",),
        "forecasts:forecasts_data",
    ),
    FigureSpec(
        "length",
        "length:length",
        "Loss beyond the training context",
        "Length",
        ("evaluation/length",),
    ),
    FigureSpec(
        "ttft",
        "inference:ttft",
        "Time to first token",
        "Inference",
        _TIMES,
        "inference:ttft_data",
    ),
    FigureSpec(
        "step_time",
        "inference:step_time",
        "Step time",
        "Inference",
        _TIMES,
        "inference:step_time_data",
    ),
    FigureSpec(
        "runtime_residuals",
        "residuals:runtime_residuals",
        "Residuals of the runtime model",
        "Inference",
        _TIMES,
        "residuals:runtime_residuals_data",
    ),
    FigureSpec(
        "roofline",
        "roofline:roofline",
        "Roofline of inference",
        "Inference",
        ("inference/roofline", "inference/crossings", "inference/device"),
        "roofline:roofline_data",
    ),
    FigureSpec(
        "choice",
        "choice:choice",
        "The best model for a budget, a context and a limit",
        "Choice",
        ("runs", *_LAWS, "fits/isoflop_resamples"),
        "choice:choice_data",
    ),
    FigureSpec(
        "latency_profile",
        "latency_profile:latency_profile",
        "Latency profile",
        ON_DEMAND,
        ("inference/measurements",),
        "latency_profile:latency_profile_data",
    ),
    FigureSpec(
        "context_scaling",
        "context_scaling:context_scaling",
        "Context scaling",
        ON_DEMAND,
        ("context_scaling",),
    ),
)

FIGURES: dict[str, FigureSpec] = {spec.name: spec for spec in _ALL}
