"""The loss of the same training at several contexts, at the same token budget."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from .optimal import select
from .sheet import Sheet, empty_sheet, hollow_mark, log_axis, mark
from .style import arch_styles, count, sequential, si, themed
from .tables import Tables, order_archs, reasons

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
        twins = select(fine, arch=arch)
        keys = ["reference_context", "reference_loss"]
        for _, line in twins.groupby(keys, sort=False):
            line = line.sort_values("context_length")
            colour = sizes[line["size_group"].iloc[0]]
            ax.plot(
                line["context_length"], line["val_loss"], color=colour, marker=styles[arch].marker, lw=1.4, mec="white"
            )[0].set_gid(f"context-{arch}")
        ax.set_title(styles[arch].name, color=styles[arch].colour)
        ax.set_xlabel("training context T [tokens]")
        ax.set_ylim(limits[0] - margin, limits[1] + margin)
        log_axis(ax, "x", count, contexts)
        ax.set_xlim(contexts[0] / 1.2, contexts[-1] * 1.2)
    sheet.axes[0, 0].set_ylabel("validation loss [nat/token]")
    last = sheet.axes[0, -1]
    last.axhline(0.0, color="#9aa0a6", lw=0.9, zorder=1)
    for arch in archs:
        gaps = select(fine, arch=arch)
        gaps = gaps[gaps["context_length"] != gaps["reference_context"]]
        for context, points in gaps.groupby("context_length"):
            filled = context == contexts[-1]
            last.scatter(
                points["num_params"], points["loss_difference"], s=34, marker=styles[arch].marker,
                color=styles[arch].colour if filled else "none", edgecolors=styles[arch].colour, zorder=4,
            ).set_gid(f"difference-{arch}-{context}")  # fmt: skip
    last.set_title("Difference by model size")
    last.set_xlabel("model size N [parameters]")
    last.set_ylabel("difference of the loss [nat/token]")
    log_axis(last, "x", si)
    sheet.handles = [mark(styles[arch].name, styles[arch].colour, styles[arch].marker) for arch in archs]
    if len(contexts) > 2:
        sheet.handles.append(hollow_mark(f"contexts below {count(contexts[-1])}"))
    if len(sizes) <= 6:
        sheet.handles += [mark(f"N about {si(size)}", colour, "", line="-", lw=3) for size, colour in sizes.items()]
    else:
        ends = list(sizes.items())[:: len(sizes) - 1]
        sheet.handles += [mark(f"N about {si(size)}", colour, "", line="-", lw=3) for size, colour in ends]
    twins = fine[fine["context_length"] != fine["reference_context"]]
    if len(twins):
        spread = [f"{100 * (twins[name] - 1).abs().max():.2g} %" for name in ("tokens_ratio", "params_ratio")]
        found = twins["source"].value_counts().items()
        sources = ", ".join(f"{number} {SOURCES.get(name, name)}" for name, number in found)
        sheet.note(f"Twins: {sources}. Their tokens differ by at most {spread[0]}, their parameters by {spread[1]}.")
    if not made:
        sheet.note("Published runs were not made for this: batches, learning rates and steps differ between twins too.")
    sheet.note("Losses are taken on windows of the training context: a longer one gives every prediction more to read.")
    if len(rows) > len(fine):
        sheet.note(f"{len(rows) - len(fine)} rows are left out: {reasons(rows)}.")
    return sheet.finish()
