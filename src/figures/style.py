"""One look for all figures: theme, colours, markers, number formats, saving."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from math import ceil, floor, isfinite, log10
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xlstm_scaling.accounting import label
from xlstm_scaling.study.files import atomic_write

from .tables import order_archs

WIDTH = 10.0  # inches
INK, SOFT, FAILED = "#222222", "#5f6368", "#9aa0a6"

# Okabe-Ito: told apart with every common colour blindness.
COLOURS = {"xlstm": "#0072B2", "transformer": "#D55E00", "hybrid": "#009E73"}
MARKERS = {"xlstm": "o", "transformer": "s", "hybrid": "^"}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000")
OTHER_MARKERS = ("D", "v", "P", "X")

RC = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("notebook"),
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#bdc1c6",
    "axes.linewidth": 0.8,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "xtick.bottom": True,
    "xtick.major.size": 3,
    "xtick.major.width": 0.8,
    "svg.hashsalt": "xlstm-scaling",
    "svg.fonttype": "path",
    "path.simplify": True,
}


@dataclass(frozen=True)
class ArchStyle:
    """How one architecture is drawn in every figure."""

    name: str
    colour: str
    marker: str


@contextmanager
def theme() -> Iterator[None]:
    """The style, for as long as a figure is drawn or saved."""
    with mpl.rc_context(RC):
        yield


def themed(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: draw within the theme."""

    @wraps(draw)
    def inner(*args: Any, **kwargs: Any) -> Figure:
        with theme():
            return draw(*args, **kwargs)

    return inner


def arch_styles(archs: Iterable[str]) -> dict[str, ArchStyle]:
    """A fixed colour and marker for the known architectures; those unknown take the next of a cycle."""
    styles, others = {}, 0
    for arch in order_archs(archs):
        if arch in COLOURS:
            styles[arch] = ArchStyle(label(arch), COLOURS[arch], MARKERS[arch])
        else:
            index = others % len(OTHER_COLOURS)
            styles[arch] = ArchStyle(label(arch), OTHER_COLOURS[index], OTHER_MARKERS[index])
            others += 1
    return styles


def sequential(values: Iterable[float]) -> dict[float, tuple[float, ...]]:
    """Light to dark with the value, for budgets, contexts, ratios and sizes."""
    ordered = sorted(set(values))
    spread = [0.82 - 0.77 * i / max(len(ordered) - 1, 1) for i in range(len(ordered))]
    if len(ordered) == 1:
        spread = [0.35]
    return {value: mpl.colormaps["viridis"](at) for value, at in zip(ordered, spread)}


def si(value: float) -> str:
    """300000 → 300k, 1.5e6 → 1.5M, 7e9 → 7B, 2e12 → 2T."""
    if not isfinite(value):
        return "?"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{value / limit:.3g}{suffix}" if abs(value) < 1e15 else flops(value)
    return f"{value:.3g}"


def flops(value: float) -> str:
    """3e11, 1.5e20: mantissa and exponent, no plus sign, no padding."""
    if not isfinite(value) or value <= 0:
        return "?"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def seconds(value: float) -> str:
    """0.003 → 3 ms, 2e-5 → 20 µs, 4 → 4 s."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.1e} s"


def count(value: float) -> str:
    """16384 → 16,384."""
    return f"{value:,.0f}"


def plain(value: float) -> str:
    """Up to three significant digits, no exponent."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(value: float, lo: float, hi: float, digits: int = 2) -> str:
    """0.52 [0.48, 0.57]; without an interval where there is none."""
    if not isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return f"{text} [{lo:.{digits}f}, {hi:.{digits}f}]" if isfinite(lo) and isfinite(hi) else text


def power(base: str, value: float, lo: float, hi: float, digits: int = 2) -> str:
    """The base raised to the value, set as a power, and the interval of the exponent beside it."""
    text = f"${base}^{{{value:.{digits}f}}}$"
    return f"{text} [{lo:.{digits}f}, {hi:.{digits}f}]" if isfinite(lo) and isfinite(hi) else text


def nested(index: int, largest: float = 44.0) -> float:
    """Marker area of the index-th architecture: later ones are smaller, so that points at one place all show."""
    return largest * 0.58**index


def nice_ticks(lo: float, hi: float, wanted: int = 4) -> list[float]:
    """Round values between lo and hi on a logarithmic axis: decades, then 1-3, 1-2-5, finer where the span is short."""
    decades = range(floor(log10(lo)), ceil(log10(hi)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if lo <= step * 10.0**decade <= hi]
        if len(ticks) >= wanted:
            stride = ceil(len(ticks) / 7) if steps == (1,) else 1
            return ticks[::stride]
    linear = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(lo, hi)
    return [tick for tick in linear if lo <= tick <= hi and tick > 0]


def save_figure(fig: Figure, stem: Path, formats: Sequence[str] = ("svg", "png"), dpi: int = 200) -> list[Path]:
    """Write `stem`.<format> for each format, whole or not at all; the same figure, the same bytes."""
    written = []
    for kind in formats:
        target = stem.with_name(f"{stem.name}.{kind}")
        try:
            with atomic_write(target) as stream, theme():
                if kind == "svg":
                    FigureCanvasSVG(fig).print_svg(stream, metadata={"Date": None, "Creator": None})
                elif kind == "png":
                    fig.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
                else:
                    fig.savefig(stream, format=kind)
        finally:
            FigureCanvasAgg(fig)
        written.append(target)
    return written
