"""The page's figures, empty: its scripts fill their sources. Names of models are what the scripts find them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    CustomJSTickFormatter,
    DataRange1d,
    HoverTool,
    LinearColorMapper,
    LogTicker,
    PanTool,
    Range1d,
    Span,
    WheelZoomTool,
)
from bokeh.plotting import figure

#: pixels of the coloured surface
GRID = (120, 160)
SURFACE_HEIGHT, PANEL_HEIGHT = 520, 300
RUN_TOOLTIP = """<div class="run"><b>@run_id</b><br>@arch_name, context @context, @set @status<br>
N @N, D @D, H @H<br>loss @loss nat/token<br>learning rate @rate, batch @batch sequences</div>"""
RUN_FIELDS = (
    *("N_params", "D_tokens", "H_flops", "val_loss", "alpha"),
    *("run_id", "arch_name", "context", "set", "status", "N", "D", "H", "loss", "rate", "batch"),
)
AXES = {
    "params": ("parameters N", "si"),
    "tokens": ("training tokens D", "si"),
    "flops": ("training compute H [FLOPs]", "flops"),
    "prompt": ("prompt [tokens]", "si"),
    "position": ("tokens before the step", "si"),
    "loss": ("loss [nat/token]", "loss"),
    "ttft": ("time to first token", "tickSeconds"),
    "step": ("step time", "tickSeconds"),
}


def build_plots(styles: Mapping[str, Mapping[str, str]], ranges: Mapping[str, Sequence[float]]) -> dict[str, figure]:
    """The figures by the id of the element that they go into.

    Args:
        styles: architecture -> name, colour and marker.
        ranges: ``num_params``, ``num_tokens``: what the surface shows at first.
    """
    return {
        "surface": _surface(styles, ranges),
        "curve": _curve(styles),
        "ttft": _times("ttft", "prompt", styles),
        "step": _times("step", "position", styles),
    }


def _figure(name: str, x: str, y: str, label: str, height: int, y_type: str = "log", **options: Any) -> figure:
    fig = figure(
        name=name,
        height=height,
        sizing_mode="stretch_width",
        x_axis_type="log",
        y_axis_type=y_type,
        tools="box_zoom,reset,save",
        toolbar_location="above" if name == "surface" else "below",
        output_backend="canvas",
        **options,
    )
    # the wheel alone scrolls the page
    fig.add_tools(PanTool(), WheelZoomTool(modifiers="shift"))
    fig.toolbar.logo = None
    fig.toolbar.active_drag = fig.select_one(PanTool)
    for axis, quantity in ((fig.xaxis[0], x), (fig.yaxis[0], y)):
        text, form = AXES[quantity]
        axis.axis_label = text
        axis.formatter = CustomJSTickFormatter(code=f"return Explorer.{form}(tick)")
    fig.xaxis[0].ticker = LogTicker(desired_num_ticks=6)
    for save in (tool for tool in fig.toolbar.tools if type(tool).__name__ == "SaveTool"):
        save.filename = f"explorer-{name}"
    fig.frame_width = None
    fig.min_border_right = 14
    fig.title.text = label
    return fig


def _source(name: str, *columns: str) -> ColumnDataSource:
    return ColumnDataSource({column: [] for column in columns}, name=name)


def _runs(fig: figure, styles: Mapping[str, Mapping[str, str]], x: str, y: str, size: int) -> None:
    """Points of the runs of every architecture, with their configuration on hover."""
    drawn = []
    for arch, style in styles.items():
        source = _source(f"runs {arch}", *RUN_FIELDS)
        drawn.append(
            fig.scatter(
                x, y, source=source, marker=style["marker"], size=size, color=style["colour"], name=f"runs:{arch}",
                fill_alpha="alpha", line_alpha="alpha", hover_line_color="black", hover_fill_alpha=1.0,
            )
        )  # fmt: skip
    fig.add_tools(HoverTool(renderers=drawn, tooltips=RUN_TOOLTIP, point_policy="snap_to_data"))


def _surface(styles: Mapping[str, Mapping[str, str]], ranges: Mapping[str, Sequence[float]]) -> figure:
    """Loss over N and D: coloured for one architecture, curves of equal loss, IsoFLOP lines, runs, best models."""
    fig = _figure(
        "surface", "params", "tokens", "Loss over parameters and tokens", SURFACE_HEIGHT,
        x_range=Range1d(*ranges["num_params"]), y_range=Range1d(*ranges["num_tokens"]),
    )  # fmt: skip
    image = {"image": [np.zeros(GRID, dtype=np.float32)]}
    image |= {"x": [1.0], "y": [1.0], "dw": [1.0], "dh": [1.0]}
    mapper = LinearColorMapper(palette=["#ffffff"], low=0.0, high=1.0, name="palette")
    fig.image(source=ColumnDataSource(image, name="losses"), color_mapper=mapper, name="image", level="image")
    for arch, style in styles.items():
        colour = style["colour"]
        contours = _source(f"contours {arch}", "xs", "ys")
        fig.multi_line("xs", "ys", source=contours, color=colour, line_width=1.1, name=f"contours:{arch}")
    labels = _source("labels", "x", "y", "text")
    fig.text("x", "y", "text", source=labels, text_font_size="11px", text_align="right", name="text")
    _runs(fig, styles, "N_params", "D_tokens", 7)
    for arch, style in styles.items():
        colour = style["colour"]
        lines = _source(f"isoflop {arch}", "x", "y", "kept")
        fig.line("x", "y", source=lines, color=colour, line_dash=[4, 4], line_width=1.5, name=f"isoflop:{arch}")
        fig.line("x", "kept", source=lines, color=colour, line_width=2.5, name=f"kept:{arch}")
        interval = _source(f"interval {arch}", "x", "y")
        fig.line("x", "y", source=interval, color=colour, line_width=11, line_alpha=0.4, line_cap="round",
                 name=f"interval:{arch}")  # fmt: skip
    for arch, style in styles.items():
        at = _source(f"best {arch}", "x", "y")
        fig.scatter("x", "y", source=at, marker="diamond", size=15, color=style["colour"], line_color="white",
                    line_width=1.5, name=f"best:{arch}")  # fmt: skip
        chosen = _source(f"chosen {arch}", "x", "y")
        fig.scatter("x", "y", source=chosen, marker="circle", size=22, fill_alpha=0.0, color=style["colour"],
                    line_width=3, name=f"chosen:{arch}")  # fmt: skip
    return fig


def _curve(styles: Mapping[str, Mapping[str, str]]) -> figure:
    """Loss of the best model against the budget."""
    fig = _figure(
        "curve", "flops", "loss", "Loss of the best model", PANEL_HEIGHT, y_type="linear",
        x_range=DataRange1d(only_visible=True), y_range=DataRange1d(only_visible=True),
    )  # fmt: skip
    for arch, style in styles.items():
        source = _source(f"curve {arch}", "x", "y", "lo", "hi")
        colour = style["colour"]
        fig.varea("x", "lo", "hi", source=source, fill_color=colour, fill_alpha=0.22, name=f"band:{arch}")
        fig.line("x", "y", source=source, color=colour, line_width=2, name=f"curve:{arch}")
    _runs(fig, styles, "H_flops", "val_loss", 5)
    _chosen(fig, styles)
    fig.add_layout(Span(dimension="height", location=1.0, line_dash=[2, 3], line_width=1.5, name="budget"))
    return fig


def _times(name: str, x: str, styles: Mapping[str, Mapping[str, str]]) -> figure:
    """A time of the chosen models against the length of the prompt."""
    fig = _figure(
        name, x, name, {"ttft": "Time to first token", "step": "Step time"}[name], PANEL_HEIGHT,
        x_range=Range1d(1, 10), y_range=Range1d(1, 10),
    )  # fmt: skip
    for arch, style in styles.items():
        source = _source(f"{name} {arch}", "x", "y")
        fig.line("x", "y", source=source, color=style["colour"], line_width=2, name=f"{name}:{arch}")
    _chosen(fig, styles)
    limit = _source(f"limit {name}", "x", "y")
    fig.line("x", "y", source=limit, line_dash=[6, 4], line_width=1.5, name=f"limit:{name}")
    return fig


def _chosen(fig: figure, styles: Mapping[str, Mapping[str, str]]) -> None:
    for arch, style in styles.items():
        source = _source(f"{fig.name} chosen {arch}", "x", "y")
        fig.scatter("x", "y", source=source, marker=style["marker"], size=12, color=style["colour"],
                    line_color="white", line_width=1.5, name=f"chosen:{arch}")  # fmt: skip
