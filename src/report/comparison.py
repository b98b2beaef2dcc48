"""Two or more studies side by side: which exponents, slopes and rankings of architectures carry over?

Losses of different texts and vocabularies cannot be compared, nor sizes of different budgets. What has no unit can:
exponents of the power laws, exponents of the loss surface, and the ratio of FLOPs for equal loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xlstm_scaling.figures.tables import Tables
from xlstm_scaling.study.files import write_table, write_text_atomic

COLUMNS = (
    *("quantity", "arch", "study", "context_length", "value", "lo", "hi", "num_points"),
    *("difference", "difference_lo", "difference_hi", "verdict", "ranking", "source"),
)
#: variables of the power laws in sentences
VARIABLES = {"num_params": "N*", "num_tokens": "D*", "loss": "the least loss"}
#: what a value is compared with where it ranks the architectures: no difference, equal FLOPs
NEUTRAL = {"exponent": 0.0, "ratio": 1.0}
VERDICTS = {
    "reference": "",
    "agree": "agree",
    "differ": "differ",
    "not told": "not told: no interval",
    "absent": "only one study has it",
}
FLOP_RATIO = "FLOPs for equal loss"


def _value(quantity: str, arch: str, row: pd.Series, column: str, points: Any, source: str) -> dict[str, Any]:
    bounds = {name: float(row[f"{column}{end}"]) for name, end in (("value", ""), ("lo", "_lo"), ("hi", "_hi"))}
    context = float(row.get("context_length", math.nan))
    return {"quantity": quantity, "arch": arch, "context_length": context, "num_points": points} | bounds | {
        "source": source
    }  # fmt: skip


def most_points(laws: pd.DataFrame, key: str) -> float:
    """The context, or the budget, whose laws rest on the most minima; the middle one of equals."""
    points = laws.groupby(key)["num_points"].sum().sort_index()
    best = points[points == points.max()].index
    return float(best[(len(best) - 1) // 2])


def _laws(tables: Tables) -> Iterator[dict[str, Any]]:
    laws = tables["fits/power_laws"]
    laws = laws[(laws["status"] == "ok") & laws["exponent"].notna()]
    for predictor, key, symbol in (("flops", "context_length", "H"), ("context_length", "isoflop_tag", "context")):
        rows = laws[laws["predictor"] == predictor]
        if rows.empty:
            continue
        tags = pd.to_numeric(rows[key], errors="coerce")
        rows = rows[tags == most_points(rows.assign(**{key: tags}), key)]
        for row in rows.to_dict("records"):
            quantity = f"exponent of {VARIABLES[row['variable']]} in {symbol}"
            yield _value(quantity, row["arch"], pd.Series(row), "exponent", row["num_points"], "fits/power_laws")


def _surfaces(tables: Tables) -> Iterator[dict[str, Any]]:
    if "fits/surface" not in tables:
        return
    surface = tables["fits/surface"]
    surface = surface[(surface["status"] == "converged") & surface["exponent_params_lo"].notna()]
    order = {"all": 0, "tokenparam": 1, "isoflop": 2}
    for (arch, form), rows in surface.groupby(["arch", "form"], sort=True):
        rank = rows["subset"].map(order).fillna(len(order)) * 1e9 - rows["num_runs"]
        row = rows.loc[rank.idxmin()]
        name = "γ = 1" if form == "gamma_fixed" else "γ free"
        quantity = f"β / (α + β) of the loss surface, {name}"
        yield _value(quantity, str(arch), row, "exponent_params", row["num_runs"], "fits/surface")


def _ratio(tables: Tables) -> Iterator[dict[str, Any]]:
    if "fits/pareto_ratio" not in tables:
        return
    ratio = tables["fits/pareto_ratio"]
    ratio = ratio[ratio["flop_ratio_lo"].notna() & ratio["flop_ratio_hi"].notna()].sort_values("val_loss")
    for (arch, other), rows in ratio.groupby(["arch", "other"], sort=False):
        contexts = rows["context_length"].value_counts().sort_index()
        rows = rows[rows["context_length"] == contexts.idxmax()]
        row = rows.iloc[len(rows) // 2]  # the middle of the losses that both reach
        yield _value(FLOP_RATIO, f"{other} / {arch}", row, "flop_ratio", len(rows), "fits/pareto_ratio")


def comparable(tables: Tables) -> Iterator[dict[str, Any]]:
    """What of one study has no unit: quantity, arch, context_length, value, lo, hi, num_points, source."""
    for part in (_laws, _surfaces, _ratio):
        yield from part(tables)


def _ranking(row: Any) -> str:
    """Which architecture the value puts ahead, by sign or ratio; "" where it does not rank or its interval is open."""
    if row.quantity == FLOP_RATIO:
        first, neutral = row.arch.split(" / ")[1], NEUTRAL["ratio"]
    elif " - " in row.arch:
        first, neutral = row.arch.split(" - ")[0], NEUTRAL["exponent"]
    else:
        return ""
    if not (math.isfinite(row.lo) and math.isfinite(row.hi)):
        return "not told"
    if row.lo > neutral:
        return f"{first} larger" if row.quantity != FLOP_RATIO else f"{first} ahead"
    if row.hi < neutral:
        return f"{first} smaller" if row.quantity != FLOP_RATIO else f"{first} behind"
    return "not told"


def _compare(row: Any, base: Any | None) -> dict[str, Any]:
    """The difference to the reference study; the studies are independent, so half-widths add in squares."""
    nothing = {"difference": math.nan, "difference_lo": math.nan, "difference_hi": math.nan}
    if base is None:
        return nothing | {"verdict": "absent"}
    if row.study == base.study:
        return nothing | {"verdict": "reference"}
    difference = row.value - base.value
    below = math.hypot(row.value - row.lo, base.hi - base.value)
    above = math.hypot(row.hi - row.value, base.value - base.lo)
    if not (math.isfinite(below) and math.isfinite(above)):
        return {**nothing, "difference": difference, "verdict": "not told"}
    lo, hi = difference - below, difference + above
    verdict = "agree" if lo <= 0 <= hi else "differ"
    return {"difference": difference, "difference_lo": lo, "difference_hi": hi, "verdict": verdict}


def compare_studies(folders: Sequence[Path]) -> pd.DataFrame:
    """What is free of units in each study, and whether it agrees with the first study.

    Of several contexts (budgets) the one whose laws rest on the most minima stands for the study.

    Args:
        folders: results folders of studies (``results/laptop``), the reference first; at least two.

    Returns:
        The table ``comparison`` of docs/tables.md.

    Raises:
        ValueError: fewer than two studies, or two of one name.
        FigureError: a study without fits; names the stage to run.
    """
    names = [Path(folder).name for folder in folders]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"a comparison takes at least two studies of different names, got {', '.join(names) or 'none'}"
        )
    rows = []
    for name, folder in zip(names, folders):
        rows += [{"study": name, **row} for row in comparable(Tables(Path(folder)))]
    if not rows:
        raise ValueError(f"none of the studies has a law with a usable fit: {', '.join(names)}")
    table = pd.DataFrame(rows)
    reference = {(r.quantity, r.arch): r for r in table[table["study"] == names[0]].itertuples()}
    parts = []
    for row in table.itertuples():
        parts.append(_compare(row, reference.get((row.quantity, row.arch))) | {"ranking": _ranking(row)})
    table = pd.concat([table, pd.DataFrame(parts)], axis=1)
    lonely = table.groupby(["quantity", "arch"])["study"].transform("nunique") == 1
    table.loc[lonely, "verdict"] = "absent"
    order = {quantity: index for index, quantity in enumerate(dict.fromkeys(table["quantity"]))}
    table = table.assign(_q=table["quantity"].map(order), _s=table["study"].map(names.index))
    table = table.sort_values(["_q", "arch", "_s"], kind="stable").reset_index(drop=True)
    return table[list(COLUMNS)].astype({"num_points": np.int64})


def _interval(row: Any) -> str:
    if math.isfinite(row.lo) and math.isfinite(row.hi):
        return f"{row.value:.3f} ({row.lo:.3f} to {row.hi:.3f})"
    return f"{row.value:.3f}"


def comparison_text(table: pd.DataFrame) -> str:
    """The comparison as Markdown: a row a quantity and architecture, a column a study."""
    studies = list(dict.fromkeys(table["study"]))
    # the reference study may lack a quantity
    lines = ["# " + " against ".join([", ".join(studies[1:]), studies[0]]), ""]
    others = table[table["verdict"].isin(["agree", "differ"])]
    agree = int((others["verdict"] == "agree").sum())
    lines += [f"{agree} of {len(others)} quantities that have intervals in both agree with {studies[0]}.", ""]
    lines += ["| quantity | of | " + " | ".join(studies) + " | |", "|---" * (len(studies) + 3) + "|"]
    for (quantity, arch), rows in table.groupby(["quantity", "arch"], sort=False):
        cells = {row.study: _interval(row) for row in rows.itertuples()}
        verdict = "; ".join(dict.fromkeys(VERDICTS[v] for v in rows["verdict"] if VERDICTS[v]))
        words = [cells.get(study, "–") for study in studies]
        lines.append("| " + " | ".join([quantity, str(arch), *words, verdict]) + " |")
    ranks = table[table["ranking"] != ""]
    if len(ranks):
        lines += ["", "Ranking of the architectures:", ""]
        for (quantity, arch), rows in ranks.groupby(["quantity", "arch"], sort=False):
            said = ", ".join(f"{row.study}: {row.ranking}" for row in rows.itertuples())
            lines.append(f"- {quantity} ({arch}): {said}")
    return "\n".join([*lines, ""])


def write_comparison(table: pd.DataFrame, out: Path, formats: Sequence[str] = ("svg", "png"), dpi: int = 200) -> None:
    """``comparison.csv``, ``.parquet``, ``.md`` and the figure, in a folder."""
    from xlstm_scaling.figures.comparison import comparison
    from xlstm_scaling.figures.style import save_figure

    write_table(table, Path(out) / "comparison")
    write_text_atomic(Path(out) / "comparison.md", comparison_text(table))
    save_figure(comparison(table), Path(out) / "comparison", formats, dpi)
