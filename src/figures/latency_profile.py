"""One size over long prompts: time to first token, step time and memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sheet import Sheet, empty_sheet, log_axis, mark, say, thin, whiskers
from .style import SOFT, ArchStyle, arch_styles, count, nested, seconds, si, themed
from .tables import Tables, one_device, order_archs, points_text, reasons

TITLE = "Latency profile: one size over long prompts"
COLUMNS = ("arch", "num_params", "batch_size", "prefill_length", "device", "status", "ttft_s", "step_time_s")


def _size(value: float) -> str:
    """2.5e9 → 2.5 GB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g} B"


#: column of the table -> axis label, number format
PANELS = {
    "ttft_s": ("time to first token [s]", seconds),
    "step_time_s": ("step time [s]", seconds),
    "peak_memory_bytes": ("peak memory [bytes]", _size),
}


def latency_profile_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """The largest size that most architectures were measured at (within a tenth), at the smallest batch."""
    rows = tables.table("inference/measurements", *COLUMNS)
    rows = rows[rows["prefill_length"] > 0]
    if rows.empty:
        return rows
    rows = one_device(rows, config)
    rows = rows[rows["batch_size"] == (config.get("batch_size") or rows["batch_size"].min())]
    near = {size: (rows["num_params"] / size - 1).abs() <= 0.1 for size in rows["num_params"].unique()}
    best = max(near, key=lambda size: (rows.loc[near[size], "arch"].nunique(), size), default=None)
    return rows if best is None else rows[near[best]]


def _curve(ax: Axes, rows: pd.DataFrame, value: str, style: ArchStyle, arch: str, area: float) -> None:
    fine = rows[(rows["status"] == "ok") & (rows[value] > 0)].sort_values("prefill_length")
    (line,) = ax.plot(fine["prefill_length"], fine[value], color=style.colour, lw=1.4, zorder=3)
    line.set_gid(f"profile-{value}-{arch}")
    ax.scatter(
        fine["prefill_length"], fine[value], s=area, marker=style.marker, color=style.colour, edgecolors="white",
        lw=0.5, zorder=5,
    )  # fmt: skip
    if f"{value}_lo" in fine:
        for row in fine.itertuples():
            ends = (getattr(row, f"{value}_lo"), getattr(row, f"{value}_hi"))
            whiskers(ax, row.prefill_length, getattr(row, value), y_range=ends, colour=style.colour, width=1.0)
    gone = rows[rows["status"] != "ok"]
    ax.scatter(
        gone["prefill_length"], [0.04] * len(gone), marker="x", s=30, color=style.colour, lw=1.4, clip_on=False,
        transform=ax.get_xaxis_transform(), zorder=6,
    ).set_gid("not-measured")  # fmt: skip


@themed
def latency_profile(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Time to first token, step time and peak memory against the prefill length, both architectures."""
    data = latency_profile_data(tables, config)
    if data.empty or not ((data["status"] == "ok") & (data["ttft_s"] > 0)).any():
        return empty_sheet(TITLE, f"no measurement: {reasons(data)}")
    panels = {name: label for name, label in PANELS.items() if name in data}
    archs, styles = order_archs(data["arch"]), arch_styles(tables.archs)
    points = points_text(data, "ttft_s", "step_time_s")
    sheet = Sheet(
        TITLE,
        f"Batch {data['batch_size'].iloc[0]:g} on {data['device'].iloc[0]}. {points}.",
        ncols=len(panels),
        width=3.5 * len(panels),
        row_height=3.2,
    )
    for ax, (value, (label, form)) in zip(sheet.axes[0], panels.items()):
        for k, arch in enumerate(archs):
            _curve(ax, data[data["arch"] == arch], value, styles[arch], arch, nested(k, 40))
        ax.set_title(label.split(" [")[0].capitalize())
        ax.set_xlabel("prefill length [tokens]")
        ax.set_ylabel(label)
        shown = data.loc[(data["status"] == "ok") & (data[value] > 0), value]
        if shown.empty:
            say(ax, "not reported", blank=False)
            continue
        ax.set_xscale("log")
        ax.set_xlim(data["prefill_length"].min() / 1.3, data["prefill_length"].max() * 1.3)
        log_axis(ax, "x", count, thin(data["prefill_length"].unique(), 4))
        # room for the marks of what was not measured, and of a curve that is flat
        low, high = np.log10(shown.min()), np.log10(shown.max())
        room = max(0.12 * (high - low), 0.15)
        ax.set_ylim(10 ** (low - 1.6 * room), 10 ** (high + room))
        log_axis(ax, "y", form)
    for arch in archs:
        sizes = sorted(data.loc[data["arch"] == arch, "num_params"].unique())
        label = f"{styles[arch].name}, {', '.join(si(size) for size in sizes)} parameters"
        sheet.handles.append(mark(label, styles[arch].colour, styles[arch].marker, line="-"))
    lost = data[data["status"] != "ok"]
    if len(lost):
        kinds = ", ".join(dict.fromkeys(lost["status"].astype(str).str.replace("_", " ")))
        sheet.handles.append(mark(f"not measured ({kinds})", SOFT, "x"))
        sheet.note(f"Not measured: {reasons(lost)}.")
    for arch in archs:
        rows = data[(data["arch"] == arch) & (data["status"] == "ok")].sort_values("prefill_length")
        if len(rows) > 1:
            first, last = rows.iloc[0], rows.iloc[-1]
            growth = last["step_time_s"] / first["step_time_s"]
            sheet.note(
                f"{styles[arch].name}: the step time after {count(last['prefill_length'])} tokens is {growth:.2f} "
                f"times that after {count(first['prefill_length'])}."
            )
    return sheet.finish()
