"""The loss of the same training at several contexts, at the same token budget."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sheet import Sheet, arch_marks, empty_sheet, hollow_mark, log_axis, mark
from .style import FAILED, ArchStyle, arch_styles, count, sequential, si, themed
from .tables import Tables, order_archs, reasons, select

TITLE = "Context scaling: the same tokens, read in longer contexts"
COLUMNS = (
    *("arch", "num_params", "context_length", "run_id", "num_tokens", "val_loss", "reference_context"),
    *("reference_loss", "loss_difference", "params_ratio", "tokens_ratio", "source", "status"),
)


#: source of a run in the table -> what the note calls it
SOURCES = {"study": "runs of the study", "extra": "trained besides", "stands in": "published runs that stand in"}


def _groups(sizes: pd.Series) -> pd.Series:
    """Sizes of both architectures that are within a tenth of each other, as the smallest of them."""
    groups: dict[float, float] = {}
    for size in sorted(sizes.unique()):
        last = max(groups.values(), default=None)
        groups[size] = last if last is not None and size <= 1.1 * last else size
    return sizes.map(groups)


def _lines(ax: Axes, rows: pd.DataFrame, sizes: Mapping[float, Any], marker: str, gid: str) -> None:
    """Loss against the training context, a line a model."""
    for _, line in rows.groupby(["reference_context", "reference_loss"], sort=False):
        line = line.sort_values("context_length")
        style = {"color": sizes[line["size_group"].iloc[0]], "marker": marker}
        ax.plot(line["context_length"], line["val_loss"], **style, lw=1.4, mec="white")[0].set_gid(gid)


def _differences(ax: Axes, rows: pd.DataFrame, longest: int, style: ArchStyle, arch: str) -> None:
    """Difference of the loss to the reference against the size; hollow at contexts below the longest."""
    for context, points in rows[rows["context_length"] != rows["reference_context"]].groupby("context_length"):
        ax.scatter(
            points["num_params"], points["loss_difference"], s=34, marker=style.marker,
            color=style.colour if context == longest else "none", edgecolors=style.colour, zorder=4,
        ).set_gid(f"difference-{arch}-{context}")  # fmt: skip


def _twins(rows: pd.DataFrame) -> str:
    """Where the runs beside the references come from, and how much they differ from them; nothing without any."""
    twins = rows[rows["context_length"] != rows["reference_context"]]
    if twins.empty:
        return ""
    spread = [f"{100 * (twins[name] - 1).abs().max():.2g} %" for name in ("tokens_ratio", "params_ratio")]
    found = twins["source"].value_counts().items()
    sources = ", ".join(f"{number} {SOURCES.get(name, name)}" for name, number in found)
    return f"Twins: {sources}. Their tokens differ by at most {spread[0]}, their parameters by {spread[1]}."


@themed
def context_scaling(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Loss against the training context, a line a size; and its difference to the shortest context against the size."""
    rows = tables.table("context_scaling", *COLUMNS)
    fine = rows[rows["status"] == "ok"]
    if fine["context_length"].nunique() < 2:
        return empty_sheet(TITLE, f"no measurement: {reasons(rows)}")
    archs, styles = order_archs(fine["arch"]), arch_styles([*tables.archs, *fine["arch"]])
    fine = fine.assign(size_group=_groups(fine["num_params"]))
    sizes = sequential(fine["size_group"])
    contexts = sorted(fine["context_length"].unique())
    made = not (fine["source"] == "stands in").any()
    sheet = Sheet(
        TITLE,
        f"Left: one line a model, trained on {'the same' if made else 'about the same'} number of tokens"
        f"{' with the same recipe' if made else ''}. Right: the loss "
        f"minus that at a context of {', '.join(count(c) for c in sorted(fine['reference_context'].unique()))}.",
        ncols=len(archs) + 1,
        width=3.6 * (len(archs) + 1),
        row_height=3.4,
    )
    limits = (fine["val_loss"].min(), fine["val_loss"].max())
    margin = 0.08 * max(limits[1] - limits[0], 0.01)
    for ax, arch in zip(sheet.axes[0], archs):
        _lines(ax, select(fine, arch=arch), sizes, styles[arch].marker, f"context-{arch}")
        ax.set_title(styles[arch].name, color=styles[arch].colour)
        ax.set_xlabel("training context T [tokens]")
        ax.set_ylim(limits[0] - margin, limits[1] + margin)
        log_axis(ax, "x", count, contexts)
        ax.set_xlim(contexts[0] / 1.2, contexts[-1] * 1.2)
    sheet.axes[0, 0].set_ylabel("validation loss [nat/token]")
    last = sheet.axes[0, -1]
    last.axhline(0.0, color=FAILED, lw=0.9, zorder=1)
    for arch in archs:
        _differences(last, select(fine, arch=arch), contexts[-1], styles[arch], arch)
    last.set_title("Difference by model size")
    last.set_xlabel("model size N [parameters]")
    last.set_ylabel("difference of the loss [nat/token]")
    log_axis(last, "x", si)
    sheet.handles = arch_marks(styles, archs)
    if len(contexts) > 2:
        sheet.handles.append(hollow_mark(f"contexts below {count(contexts[-1])}"))
    named = list(sizes.items()) if len(sizes) <= 6 else list(sizes.items())[:: len(sizes) - 1]  # all, or both ends
    sheet.handles += [mark(f"N about {si(size)}", colour, "", line="-", lw=3) for size, colour in named]
    sheet.note(_twins(fine))
    if not made:
        sheet.note("Published runs were not made for this: batches, learning rates and steps differ between twins too.")
    sheet.note("Losses are taken on windows of the training context: a longer one gives every prediction more to read.")
    if len(rows) > len(fine):
        sheet.note(f"{len(rows) - len(fine)} rows are left out: {reasons(rows)}.")
    return sheet.finish()
