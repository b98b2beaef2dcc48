"""A sheet: title and subtitle above the axes, legend and notes below, placed in inches so that nothing overlaps."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .style import FAILED, INK, SOFT, WIDTH, ArchStyle, nice_ticks

TITLE_IN, SUBTITLE_IN, NOTE_IN, LEGEND_IN = 0.31, 0.2, 0.155, 0.195


class Sheet:
    """Axes `axes[row, column]`, gathered legend handles and notes; `finish` lays everything out."""

    def __init__(
        self,
        title: str,
        subtitle: str = "",
        *,
        nrows: int = 1,
        ncols: int = 1,
        width: float = WIDTH,
        row_height: float = 3.1,
        **subplots: Any,
    ) -> None:
        self.fig = Figure(figsize=(width, row_height * nrows))
        self.axes = self.fig.subplots(nrows, ncols, squeeze=False, **subplots)
        self.title, self.subtitle = title, subtitle
        self.width, self.body = width, row_height * nrows
        self.handles: list[Artist] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """A small grey line under the figure; each text once."""
        if text and text not in self.notes:
            self.notes.append(text)

    def finish(self) -> Figure:
        """Set the figure's height, put header and footer, and give the axes the rest."""
        fig, width = self.fig, self.width
        above = textwrap.wrap(self.subtitle, int(width * 13.3))
        below = [line for note in self.notes for line in textwrap.wrap(note, int(width * 15.6))]
        columns, rows = self._legend_grid()
        header = 0.12 + TITLE_IN + SUBTITLE_IN * len(above)
        footer = 0.08 + LEGEND_IN * rows + (0.1 if rows else 0) + NOTE_IN * len(below)
        height = header + self.body + footer
        fig.set_size_inches(width, height)
        left = 0.12 / width
        fig.text(left, 1 - 0.12 / height, self.title, size=14, weight="bold", va="top", color=INK)
        if above:
            y = 1 - (0.12 + TITLE_IN) / height
            fig.text(left, y, "\n".join(above), size=10, va="top", color=SOFT, linespacing=1.3)
        if below:
            fig.text(left, 0.07 / height, "\n".join(below), size=8, va="bottom", color=SOFT, linespacing=1.3)
        if rows:
            y = (0.08 + (NOTE_IN * len(below) + 0.06 if below else 0)) / height
            fig.legend(
                handles=self.handles,
                loc="lower center",
                bbox_to_anchor=(0.5, y),
                ncols=columns,
                borderaxespad=0,
                borderpad=0,
                columnspacing=1.6,
                handletextpad=0.6,
            )
        rect = (0.005, footer / height, 0.99, 1 - (header + footer) / height)
        fig.set_layout_engine(ConstrainedLayoutEngine(rect=rect, w_pad=0.06, h_pad=0.06, wspace=0.02, hspace=0.03))
        self._freeze()
        return fig

    def _freeze(self) -> None:
        """Lay out once and keep it, rounded: the solver's last bits differ from process to process."""
        self.fig.get_layout_engine().execute(self.fig)
        self.fig.set_layout_engine("none")
        for ax in self.fig.axes:
            ax.set_position(
                [round(float(value), 5) for value in ax.get_position(original=True).bounds], which="original"
            )

    def _legend_grid(self) -> tuple[int, int]:
        if not self.handles:
            return 1, 0
        widths = [len(str(handle.get_label())) * 0.068 + 0.62 for handle in self.handles]
        for rows in range(1, len(widths) + 1):
            columns = [max(widths[i : i + rows]) for i in range(0, len(widths), rows)]
            if sum(columns) <= self.width - 0.2:
                return len(columns), rows
        return 1, len(widths)


def log_axis(ax: Axes, which: str, form: Callable[[float], str], ticks: Sequence[float] | None = None) -> None:
    """Logarithmic axis with round, readable ticks; call when the data are on the axes."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    lo, hi = ax.get_xlim() if which == "x" else ax.get_ylim()
    axis.set_major_locator(
        FixedLocator(list(ticks) if ticks is not None else nice_ticks(lo, hi, 3 if which == "x" else 4))
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def thin(values: Sequence[float], most: int = 6) -> list[float]:
    """Values far enough apart on a logarithmic axis for at most `most` labels, the largest among them."""
    ordered = sorted(set(values), reverse=True)
    gap = np.log(ordered[0] / ordered[-1]) / (most - 0.5) if len(ordered) > 1 else 0.0
    kept = ordered[:1]
    for value in ordered[1:]:
        if np.log(kept[-1] / value) >= gap:
            kept.append(value)
    return kept[::-1]


def whiskers(
    ax: Axes,
    x: float,
    y: float,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    colour: Any = INK,
    width: float = 1.4,
    gid: str | None = None,
) -> None:
    """Thin bars over an interval in x, in y or in both; ranges that hold NaN are left out."""
    for values, horizontal in ((x_range, True), (y_range, False)):
        if values is None or not np.all(np.isfinite(values)):
            continue
        xs, ys = (values, (y, y)) if horizontal else ((x, x), values)
        cap = "|" if horizontal else "_"
        line = Line2D(xs, ys, color=colour, lw=width, marker=cap, ms=5, mew=width, zorder=4, solid_capstyle="butt")
        line.set_gid(gid)
        ax.add_line(line)
    ax.autoscale_view()


def say(ax: Axes, text: str, *, blank: bool = True) -> None:
    """A plain sentence in the axes (in a corner, beside data) for a fit not made; `blank` takes the ticks away."""
    room = max(18, int(ax.get_position().width * ax.figure.get_figwidth() * 9))
    corner = not blank and ax.has_data()  # the corner leaves the points to be seen
    x, y, side, base = (0.03, 0.03, "left", "bottom") if corner else (0.5, 0.5, "center", "center")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 3}
    ax.text(
        x,
        y,
        textwrap.fill(text, room),
        transform=ax.transAxes,
        ha=side,
        va=base,
        size=9.5,
        color=SOFT,
        zorder=10,
        bbox=box,
    )
    if blank:
        ax.grid(False)
        if not ax.has_data():
            ax.set_xticks([])
            ax.set_yticks([])


def empty_sheet(title: str, text: str) -> Figure:
    """A figure that only says why there is nothing to draw."""
    sheet = Sheet(title, width=max(7.0, 0.125 * len(title) + 0.4), row_height=2.0)
    say(sheet.axes[0, 0], text)
    return sheet.finish()


def mark(label: str, colour: Any, marker: str = "o", *, line: str = "", hollow: bool = False, **extra: Any) -> Line2D:
    """A legend entry."""
    face = "none" if hollow else colour
    options = {"marker": marker, "ls": line or "none", "mfc": face, "mec": colour, "mew": 1.1, "ms": 6} | extra
    return Line2D([], [], color=colour, label=label, **options)


def arch_marks(styles: Mapping[str, ArchStyle], archs: Sequence[str], line: str = "") -> list[Line2D]:
    """The legend entries of architectures."""
    return [mark(styles[arch].name, styles[arch].colour, styles[arch].marker, line=line) for arch in archs]


def hollow_mark(label: str = "cell without a usable fit") -> Line2D:
    """The legend entry of failed cells."""
    return mark(label, FAILED, hollow=True)
