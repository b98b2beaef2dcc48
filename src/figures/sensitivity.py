"""How much the compute-optimal exponent depends on how it is estimated."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sheet import Sheet, arch_marks, empty_sheet, hollow_mark, mark
from .style import FAILED, INK, SOFT, ArchStyle, arch_styles, count, interval, themed
from .tables import Tables, base_context, interval_percent, order_archs, reasons
from .tables import fine as fine_status

TITLE = "One question, many estimates: the exponent $a$ of $N^* \\propto H^a$"
COLUMNS = [
    "approach",
    "estimate",
    "arch",
    "context_length",
    "huber_delta",
    "main",
    "exponent",
    "exponent_lo",
    "exponent_hi",
    "status",
]
GROUPS = {
    1: "Approach 1: envelope of the training curves",
    2: "Approach 2: minima of the IsoFLOP curves",
    3: "Approach 3: fitted loss surface L(N, D)",
}
#: other countings (fitting/sensitivity.py); `tfla` differs from the paper's convention in the sixth digit
VARIANTS = {
    "flops_6nd": "H = 6 N D",
    "flops_chinchilla": "attention without mask",
    "duplicates": "runs counted twice",
}
SUBSETS = {"all": "all runs", "tokenparam": "token/param runs", "isoflop": "IsoFLOP runs"}


def sensitivity_data(tables: Tables, config: Mapping[str, Any]) -> pd.DataFrame:
    """Every estimate of the exponent of N*(H): one row an approach, variant and architecture."""
    parts = []
    laws = tables.table("fits/power_laws", "variable", "predictor", "exponent", "exponent_lo", "exponent_hi", "status")
    laws = laws[(laws["variable"] == "num_params") & (laws["predictor"] == "flops")]
    parts.append(
        laws.assign(approach=2, main=True, estimate="context " + laws["context_length"].map(count).astype(str))
    )
    surface = tables.table("fits/surface", "subset", "form", "huber_delta", "exponent_params", "status")
    bounds = {f"exponent_params{end}": f"exponent{end}" for end in ("", "_lo", "_hi")}
    form = np.where(surface["form"] == "gamma_fixed", "γ = 1", "γ free")
    label = [f"{form_name}, {SUBSETS.get(subset, subset)}" for form_name, subset in zip(form, surface["subset"])]
    if len(set(surface["context_length"])) > 1:
        label = [f"{text}, context {count(length)}" for text, length in zip(label, surface["context_length"])]
    wanted = float(dict(config.get("surface") or {}).get("huber_delta") or 1e-3)
    distance = np.abs(np.log(surface["huber_delta"].astype(float) / wanted))
    main = distance == distance.groupby(
        [surface[key] for key in ("arch", "context_length", "subset", "form")]
    ).transform("min")
    parts.append(surface.rename(columns=bounds).assign(approach=3, estimate=label, main=main))
    if "fits/envelope" in tables:
        envelope = tables["fits/envelope"]
        envelope = envelope[envelope["variable"] == "num_params"]
        parts.append(
            envelope.assign(
                approach=1, main=True, estimate="context " + envelope["context_length"].map(count).astype(str)
            )
        )
    if "fits/sensitivity" in tables:
        other = tables["fits/sensitivity"]
        other = other[(other["variable"] == "num_params") & other["variant"].isin(VARIANTS)]
        context = base_context(tables, config.get("base_context"))
        other = other[other["context_length"] == context]
        label = f"context {count(context)}, " + other["variant"].map(VARIANTS)
        parts.append(other.assign(approach=2, main=True, estimate=label))
    parts = [part.reindex(columns=[*COLUMNS, "detail"]) for part in parts if len(part)]
    if not parts:
        return pd.DataFrame(columns=[*COLUMNS, "detail"])
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[~rows["arch"].astype(str).str.contains(" - ")]
    return rows.sort_values(["approach"], kind="stable").reset_index(drop=True)


def _estimate(ax: Axes, row: Any, place: float, style: ArchStyle, arch: str) -> bool:
    """Point, bar and number of one estimate; grey and hollow, and False, where its fit was not accepted."""
    fine = row.status in ("ok", "converged")
    tint = style.colour if fine else FAILED
    ax.hlines(place, row.exponent_lo, row.exponent_hi, color=tint, lw=1.6, zorder=2)
    point = ax.scatter(
        [row.exponent],
        [place],
        s=34,
        marker=style.marker,
        facecolors=tint if fine else "none",
        edgecolors="white" if fine else FAILED,
        lw=0.6 if fine else 1.2,
        zorder=4,
    )
    point.set_gid(f"estimate-{arch}-{'ok' if fine else 'failed'}")
    value = interval(row.exponent, row.exponent_lo, row.exponent_hi)
    ax.text(1.015, place, value, transform=ax.get_yaxis_transform(), va="center", size=7.5, color=tint)
    return fine


def _statuses(rows: pd.DataFrame) -> str:
    """How many estimates ended how: '7 bound hit'."""
    counts = rows.loc[~fine_status(rows["status"]), "status"].value_counts()
    return ", ".join(f"{number} {str(status).replace('_', ' ')}" for status, number in counts.items())


def _others(ax: Axes, rows: pd.DataFrame, place: float, style: ArchStyle) -> bool:
    """Ticks for the same fit with another Huber δ; grey where it was not accepted."""
    tints = [style.colour if good else FAILED for good in fine_status(rows["status"])]
    ax.scatter(rows["exponent"], [place] * len(rows), marker="|", s=60, c=tints, lw=1.3, alpha=0.75, zorder=3)
    return len(rows) > 0


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Range of the axis: all bars, as far as they do not squeeze the others, and an exponent of a half."""
    bounds = rows[["exponent", "exponent_lo", "exponent_hi"]].astype(float)
    lo, hi = (float(f(bounds)) for f in (np.nanmin, np.nanmax))
    lo, hi = max(lo, bounds["exponent"].min() - 0.4), min(hi, bounds["exponent"].max() + 0.4)
    margin = 0.06 * max(hi - lo, 0.05)
    return min(lo - margin, 0.48), max(hi + margin, 0.52)


@themed
def sensitivity(tables: Tables, config: Mapping[str, Any]) -> Figure:
    """Forest plot: the exponent under each approach, form, subset and δ, with intervals."""
    rows = sensitivity_data(tables, config)
    drawable = rows[np.isfinite(rows["exponent"].astype(float))]
    if drawable.empty:
        return empty_sheet(TITLE, f"no fit: {reasons(rows)}")
    archs, styles = order_archs(drawable["arch"]), arch_styles(tables.archs)
    level = interval_percent(config)
    lines: list[tuple[int, str]] = []
    for approach, group in drawable.groupby("approach", sort=True):
        lines.append((approach, ""))
        lines += [(approach, estimate) for estimate in dict.fromkeys(group["estimate"])]
    sheet = Sheet(
        TITLE,
        f"Each row is one way to estimate it; bars are {level:g} % intervals. Where rows disagree by more than their "
        "bars, the choice of method moves the answer more than the data do.",
        row_height=0.75 + (0.1 + 0.13 * len(archs)) * len(lines),
        width=9.0,
    )
    ax = sheet.axes[0, 0]
    failed, ticks = False, False
    for y, (approach, estimate) in enumerate(lines):
        if not estimate:
            ax.text(
                -0.015,
                y,
                GROUPS.get(approach, f"Approach {approach}"),
                transform=ax.get_yaxis_transform(),
                ha="right",
                va="center",
                size=9,
                weight="bold",
                color=INK,
            )
            continue
        here = drawable[(drawable["approach"] == approach) & (drawable["estimate"] == estimate)]
        for k, arch in enumerate(archs):
            place = y + 0.8 / max(len(archs), 2) * (k - (len(archs) - 1) / 2)
            mine = here[here["arch"] == arch]
            ticks |= _others(ax, mine[~mine["main"].astype(bool)], place, styles[arch])
            for row in mine[mine["main"].astype(bool)].itertuples():
                failed |= not _estimate(ax, row, place, styles[arch], arch)
    ax.set_yticks(
        [i for i, (_, estimate) in enumerate(lines) if estimate], [estimate for _, estimate in lines if estimate]
    )
    ax.axvline(0.5, color=SOFT, lw=1.1, ls=(0, (4, 3)), zorder=1)
    ax.set_ylim(len(lines) - 0.4, -0.7)
    ax.set_xlim(*_limits(drawable))
    ax.grid(False, axis="y")
    ax.set_xlabel("exponent a of the compute-optimal model size, $N^* \\propto H^a$ [1]")
    sheet.handles = arch_marks(styles, archs, line="-")
    sheet.handles.append(mark("a = 0.5: size and tokens grow alike", SOFT, "", line=(0, (4, 3))))
    if ticks:
        sheet.handles.append(mark("the same with another Huber δ", SOFT, "|", ms=8, mew=1.3))
    if failed:
        sheet.handles.append(hollow_mark("fit not accepted"))
        sheet.note(f"Hollow and grey: estimates whose fit was not accepted ({_statuses(drawable)}).")
    missing = len(rows) - len(drawable)
    if missing:
        sheet.note(f"{missing} estimates could not be made: {reasons(rows[~rows.index.isin(drawable.index)])}.")
    return sheet.finish()
