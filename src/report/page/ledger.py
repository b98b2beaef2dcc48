"""The ledger of claims as the page shows it: counts, rows, and why some were not reproduced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from xlstm_scaling.published.claims import Verdict
from xlstm_scaling.published.claims_page import number

#: verdict -> (class of its badge, sign beside its name)
TONES = {
    Verdict.REPRODUCED: ("good", "✓"),
    Verdict.WITHIN: ("near", "≈"),
    Verdict.NOT_REPRODUCED: ("bad", "✗"),
    Verdict.FAULT: ("fault", "!"),
    Verdict.UNANSWERABLE: ("none", "?"),
}
_SIGN = {"equals": "", "above": "> ", "below": "< "}
#: verdicts whose reasons are told
TOLD = (Verdict.NOT_REPRODUCED, Verdict.UNANSWERABLE, Verdict.FAULT)


@dataclass(frozen=True)
class Claim:
    """One row of the ledger, in words."""

    key: str
    topic: str
    statement: str
    published: str
    ours: str
    interval: str
    verdict: str
    tone: str
    sign: str
    why: str
    source: str


@dataclass(frozen=True)
class Ledger:
    """counts: verdict -> (class, sign, number); reasons: verdict -> its claims, grouped by reason."""

    claims: list[Claim]
    counts: dict[str, tuple[str, str, int]]
    reasons: dict[str, list[tuple[str, list[Claim]]]]
    topics: list[str]
    dependent: int


def ledger(table: pd.DataFrame) -> Ledger:
    """The table ``claims/claims`` for the page."""
    claims = [_claim(row) for row in table.to_dict("records")]
    counts = {str(v): (*TONES[v], sum(c.verdict == str(v) for c in claims)) for v in Verdict}
    reasons = {}
    for verdict in TOLD:
        groups: dict[str, list[Claim]] = {}
        for claim in claims:
            if claim.verdict == str(verdict):
                groups.setdefault(claim.why or "no reason is known", []).append(claim)
        if groups:
            reasons[str(verdict)] = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return Ledger(
        claims, counts, reasons, list(dict.fromkeys(c.topic for c in claims)), int((~table.independent).sum())
    )


def _claim(row: dict[str, Any]) -> Claim:
    tone, sign = TONES[Verdict(row["verdict"])]
    unit = "" if row["unit"] == "1" else f" {row['unit']}"
    ours = number(row["value"])
    if math.isfinite(row["right_value"]):
        ours += f" (right: {number(row['right_value'])})"
    return Claim(
        key=row["id"],
        topic=row["topic"],
        statement=row["statement"],
        published=f"{_SIGN[row['relation']]}{number(row['published'])}{unit}",
        ours=ours,
        interval=f"{number(row['low'], 4)} to {number(row['high'], 4)}" if math.isfinite(row["low"]) else "",
        verdict=row["verdict"],
        tone=tone,
        sign=sign,
        why=row["why"] if isinstance(row["why"], str) else "",
        source=row["source"],
    )
