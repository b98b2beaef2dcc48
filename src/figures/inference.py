"""Time to first token and step time against the prefill length, measured and modelled."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sheet import Sheet, empty_sheet, log_axis, mark, thin, whiskers
from .style import SOFT, ArchStyle, arch_styles, count, nested, seconds, si, themed
from .tables import Tables, one_device, order_archs, points_text, reasons, select

NAMES = {"ttft": "time to first token", "ttft_raw": "time to first token (second version)", "step_time": "step time"}
TITLES = {"ttft": "Time to first token against prefill", "step_time": "Step time of generation against prefill"}


def size_groups(models: pd.DataFrame) -> dict[float, float]:
    """Each model size → the reference size of its panel (the sizes of the architecture with the most models)."""
    sizes = models.drop_duplicates(["arch", "num_params"])
    reference = sizes.groupby("arch")["num_params"].apply(list)
    main = sorted(max(reference, key=len))
    return {
        float(size): float(main[int(np.argmin(np.abs(np.log(np.array(main) / size))))]) for size in sizes["num_params"]
    }


def timing_data(tables: Tables, quantity: str, config: Mapping[str, Any]) -> pd.DataFrame:
    """Measurements on one device and at one batch size (the wanted ones, else the most measured, the smallest)."""
    value = f"{quantity}_s"
    rows = tables.table(
        "inference/measurements", "arch", "num_params", "batch_size", "prefill_length", "device", "status", value
    )
    if rows.empty:
        return rows
    rows = one_device(rows, config)
    batch = config.get("batch_size") or rows["batch_size"].min()
    return rows[rows["batch_size"] == batch]


def _points(ax: Axes, rows: pd.DataFrame, quantity: str, style: ArchStyle, arch: str, area: float) -> None:
    value = f"{quantity}_s"
    fine = rows[(rows["status"] == "ok") & (rows[value] > 0) & (rows["prefill_length"] > 0)]
    for row in fine.itertuples():
        quartiles = (getattr(row, f"{value}_lo"), getattr(row, f"{value}_hi"))
        whiskers(ax, row.prefill_length, getattr(row, value), y_range=quartiles, colour=style.colour, width=1.0)
    points = ax.scatter(
        fine["prefill_length"],
        fine[value],
        s=area,
        marker=style.marker,
        color=style.colour,
        edgecolors="white",
        lw=0.5,
        zorder=5,
    )
    points.set_gid(f"measured-{arch}")


def _model_line(ax: Axes, rows: pd.DataFrame, style: ArchStyle, arch: str) -> bool:
    held_out = False
    rows = rows[(rows["prefill_length"] > 0) & np.isfinite(rows["predicted_s"].astype(float))]
    for _, line in rows.groupby(["model", "num_params", "held_out"]):
        line = line.sort_values("prefill_length")
        unseen = bool(line["held_out"].astype(bool).all())
        held_out |= unseen
        dashes = (0, (2, 1.5)) if unseen else "-"
        ax.plot(
            line["prefill_length"], line["predicted_s"], color=style.colour, ls=dashes, lw=1.4, alpha=0.8, zorder=2
        )[0].set_gid(f"model-{arch}")
    return held_out


def _lost(ax: Axes, rows: pd.DataFrame, style: ArchStyle) -> list[str]:
    gone = rows[(rows["status"] != "ok") & (rows["prefill_length"] > 0)]
    if len(gone):
        crosses = ax.scatter(
            gone["prefill_length"],
            [0.04] * len(gone),
            marker="x",
            s=30,
            color=style.colour,
            lw=1.4,
            transform=ax.get_xaxis_transform(),
            zorder=6,
            clip_on=False,
        )
        crosses.set_gid("not-measured")
    return sorted(set(gone["status"].astype(str).str.replace("_", " ")))


def _error(models: pd.DataFrame) -> str:
    """How well the runtime model of one architecture fits, or why there is none."""
    if models.empty or models.iloc[0]["status"] != "ok":
        return f"no fit of the runtime model: {reasons(models)}"
    fit = models.iloc[0]
    unseen = fit.get("mape_held_out", np.nan)
    text = f"mean absolute error of the runtime model {100 * fit['mape_fit']:.0f} % on its fit"
    return text + (f", {100 * unseen:.0f} % on held-out sizes" if np.isfinite(unseen) else "")


def _draw(tables: Tables, quantity: str, config: Mapping[str, Any]) -> Figure:
    data = timing_data(tables, quantity, config)
    models = tables.table("inference/runtime_model", "arch", "quantity", "status")
    predicted = tables.table("inference/runtime_predictions", "arch", "quantity", "predicted_s", "held_out")
    title, name, value = TITLES[quantity], NAMES[quantity], f"{quantity}_s"
    if data.empty or not ((data["status"] == "ok") & (data[value] > 0)).any():
        return empty_sheet(title, f"no measurement: {reasons(data)}")
    batch, device = data["batch_size"].iloc[0], str(data["device"].iloc[0])
    predicted = select(predicted, quantity=quantity, batch_size=batch)
    models = select(models, quantity=quantity)
    if "device" in models and (models["device"] == device).any():
        models = select(models, device=device)
    if "device" in predicted:
        predicted = select(predicted, device=device)
    archs, styles = order_archs(data["arch"]), arch_styles(tables.archs)
    group = size_groups(data)
    panels = sorted(set(group.values()))
    ncols = min(len(panels), 3)
    nrows = -(-len(panels) // ncols)
    sheet = Sheet(
        title,
        f"One panel a model size, batch {batch:g}, on {device}. {points_text(data, value)}; lines: the fitted runtime "
        "model.",
        nrows=nrows,
        ncols=ncols,
        width=max(7.0, 3.4 * ncols),
        row_height=2.7,
        sharex=True,
        sharey=True,
    )
    held_out, lost = False, []
    for ax, size in zip(sheet.axes.flat, panels):
        for k, arch in enumerate(archs):
            rows = data[(data["arch"] == arch) & (data["num_params"].map(lambda n: group[float(n)]) == size)]
            _points(ax, rows, quantity, styles[arch], arch, nested(k, 40))
            lines = predicted[(predicted["arch"] == arch) & predicted["num_params"].isin(rows["num_params"])]
            held_out |= _model_line(ax, lines, styles[arch], arch)
            lost += _lost(ax, rows, styles[arch])
        ax.set_title(f"about {si(size)} parameters")
    lengths = [length for length in data["prefill_length"].unique() if length > 0]
    for i, ax in enumerate(sheet.axes.flat):
        if i >= len(panels):
            ax.set_visible(False)
            continue
        log_axis(ax, "x", count, thin(lengths, 5))
        log_axis(ax, "y", seconds)
        if i % ncols == 0:
            ax.set_ylabel(f"{name} [s]")
        if i + ncols >= len(panels):
            ax.set_xlabel("prefill length [tokens]")
            ax.tick_params(labelbottom=True)
    sheet.handles = [mark(f"{styles[a].name}, measured", styles[a].colour, styles[a].marker) for a in archs]
    sheet.handles.append(mark("runtime model", "#777777", "", line="-"))
    if held_out:
        sheet.handles.append(mark("runtime model, size held out of its fit", "#777777", "", line=(0, (2, 1.5))))
    if lost:
        sheet.handles.append(mark(f"not measured ({', '.join(dict.fromkeys(lost))})", SOFT, "x"))
    for arch in archs:
        sheet.note(f"{styles[arch].name}: {_error(select(models, arch=arch))}.")
    return sheet.finish()


@themed
def ttft(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Time to first token against prefill length, per model size."""
    return _draw(tables, "ttft", config)


@themed
def step_time(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Time of one generation step against prefill length, per model size."""
    return _draw(tables, "step_time", config)


def ttft_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """The measurements and model lines of `ttft`."""
    return timing_data(tables, "ttft", config)


def step_time_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """The measurements and model lines of `step_time`."""
    return timing_data(tables, "step_time", config)
