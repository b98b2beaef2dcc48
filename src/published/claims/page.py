"""The claims ledger as a page: Markdown, and HTML that needs no other file."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .ledger import Verdict

HEADERS = ("claim", "published", "ours", "interval", "without duplicates", "verdict", "why")
_TINTS = {
    Verdict.REPRODUCED: "#dff0e0", Verdict.WITHIN: "#e6eefb", Verdict.NOT_REPRODUCED: "#fbe3df",
    Verdict.FAULT: "#fdf0d0", Verdict.UNANSWERABLE: "#eeeeee",
}  # fmt: skip
_SIGN = {"equals": "", "above": "> ", "below": "< "}
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;width:100%;margin:.6em 0 1.6em;font-size:13px}"
    "th,td{border:1px solid #ddd;padding:.3em .5em;text-align:left;vertical-align:top}"
    "th{background:#f5f5f5}td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}"
    "code{font-size:12px;color:#555}small{color:#666}"
)


def summary_counts(ledger: pd.DataFrame) -> pd.DataFrame:
    """Verdicts (columns) by topic (rows), with a row and a column of sums."""
    counts = pd.crosstab(ledger["topic"].astype(object), ledger["verdict"].astype(object))
    counts = counts.reindex(index=list(dict.fromkeys(ledger["topic"])), columns=[str(v) for v in Verdict], fill_value=0)
    counts["claims"] = counts.sum(axis=1)
    counts.loc["all"] = counts.sum()
    return counts


def number(value: float, digits: int = 6) -> str:
    """A number for the page; nothing for NaN."""
    if not math.isfinite(value):
        return "" if math.isnan(value) else str(value)
    return f"{value:,.0f}" if value == round(value) and 1e3 <= abs(value) < 1e6 else f"{value:.{digits}g}"


def published_text(row: Mapping[str, Any]) -> str:
    """The published number of a row of the ledger, with its relation and unit."""
    unit = "" if row["unit"] == "1" else f" {row['unit']}"
    return f"{_SIGN[row['relation']]}{number(row['published'])}{unit}"


def value_text(row: Mapping[str, Any]) -> str:
    """Our number, and the right one where the authors' fault was repeated."""
    right = f" (right: {number(row['right_value'])})" if math.isfinite(row["right_value"]) else ""
    return number(row["value"]) + right


def interval_text(row: Mapping[str, Any]) -> str:
    """Our interval; nothing where there is none."""
    return f"{number(row['low'], 4)} to {number(row['high'], 4)}" if math.isfinite(row["low"]) else ""


def _cells(row: pd.Series) -> list[str]:
    without = number(row["value_without_duplicates"])
    shown = [published_text(row), value_text(row), interval_text(row), without]
    return [row["statement"], *shown, row["verdict"], row["why"]]


def _intro(ledger: pd.DataFrame, about: str) -> list[str]:
    circular = ledger[~ledger["independent"]]
    return [
        f"{len(ledger)} claims. {about}",
        "Reproduced: within the tolerance; within interval: our interval contains the published number; authors' "
        "error: repeating the fault gives the published number, the right one is beside it. Intervals are percentile "
        "bootstraps over runs. Where the authors count some runs twice, the value without these duplicates is beside "
        "it. The tables claims.csv and claims.parquet hold tolerances with their reasons, numbers of runs, and the "
        "command of each row.",
        f"{len(circular)} claims rest, in part, on losses that were read off figures so that they agree with the "
        "printed parabolas (`independent` is false; their `why` says so): that these come out is no independent check.",
    ]  # fmt: skip


def markdown_page(ledger: pd.DataFrame, titles: Mapping[str, str], about: str = "") -> str:
    """Return the ledger as Markdown."""
    lines = ["# Claims of the paper", "", *[part + "\n" for part in _intro(ledger, about)]]
    counts = summary_counts(ledger)
    lines += _markdown_table(
        ["topic", *counts.columns], [[name, *map(str, row)] for name, row in zip(counts.index, counts.to_numpy())]
    )
    for topic, rows in ledger.groupby("topic", sort=False):
        lines += ["", f"## {titles.get(str(topic), str(topic))}", ""]
        body = []
        for _, row in rows.iterrows():
            cells = _cells(row)
            cells[0] += f" (`{row['id']}`; {row['source']})"
            body.append(cells)
        lines += _markdown_table(HEADERS, body)
    return "\n".join(lines) + "\n"


def _markdown_table(headers: object, body: list[list[str]]) -> list[str]:
    def line(cells: object) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(headers), line(["---"] * len(list(headers))), *(line(row) for row in body)]


def html_page(ledger: pd.DataFrame, titles: Mapping[str, str], about: str = "") -> str:
    """Return the ledger as one HTML file."""
    counts = summary_counts(ledger)
    parts = [
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8"><title>Claims of the paper</title>',
        f"<style>{_STYLE}</style></head><body>", "<h1>Claims of the paper</h1>",
    ]  # fmt: skip
    parts += [f"<p>{html.escape(part)}</p>" for part in _intro(ledger, about)]
    rows = [[name, *row] for name, row in zip(counts.index, counts.to_numpy())]
    parts.append(_html_table(["topic", *counts.columns], [_html_row(row, numeric=range(1, 9)) for row in rows]))
    for topic, group in ledger.groupby("topic", sort=False):
        parts.append(f'<h2 id="{html.escape(str(topic))}">{html.escape(titles.get(str(topic), str(topic)))}</h2>')
        body = []
        for _, row in group.iterrows():
            tint = _TINTS[Verdict(row["verdict"])]
            extra = f"<br><small>{html.escape(row['source'])}</small><br><code>{html.escape(row['id'])}</code>"
            body.append(_html_row(_cells(row), numeric=range(1, 5), extra=extra, tint=tint))
        parts.append(_html_table(HEADERS, body))
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _html_row(cells: list, numeric: range, extra: str = "", tint: str = "") -> str:
    shown = []
    for place, cell in enumerate(cells):
        mark = ' class="n"' if place in numeric else ""
        shown.append(f"<td{mark}>{html.escape(str(cell))}{extra if place == 0 else ''}</td>")
    style = f' style="background:{tint}"' if tint else ""
    return f"<tr{style}>{''.join(shown)}</tr>"


def _html_table(headers: object, rows: list[str]) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in headers)
    return f"<table><tr>{head}</tr>\n" + "\n".join(rows) + "</table>"
