"""The ledger of claims as the page shows it: counts, rows, and why some were not reproduced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from xlstm_scaling.published.claims.ledger import Verdict
from xlstm_scaling.published.claims.page import interval_text, published_text, value_text

#: verdict -> (class of its badge, sign beside its name)
TONES = {
    Verdict.REPRODUCED: ("good", "✓"),
    Verdict.WITHIN: ("near", "≈"),
    Verdict.NOT_REPRODUCED: ("bad", "✗"),
    Verdict.FAULT: ("fault", "!"),
    Verdict.UNANSWERABLE: ("none", "?"),
}
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
    return Claim(
        key=row["id"],
        topic=row["topic"],
        statement=row["statement"],
        published=published_text(row),
        ours=value_text(row),
        interval=interval_text(row),
        verdict=row["verdict"],
        tone=tone,
        sign=sign,
        why=row["why"] if isinstance(row["why"], str) else "",
        source=row["source"],
    )
