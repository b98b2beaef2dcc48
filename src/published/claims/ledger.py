"""The claims ledger: what the paper reports, joined with what we compute from its runs.

A claim (conf/claims/*.yaml) holds a published number, its unit and source, a tolerance with a reason, and the answer
function that computes it (`answers`). Verdicts, the first that holds:

1. not answerable: the data for it are missing; `why` names them.
2. authors' error (only rows with `fault`): repeating the fault gives the published number; the right one is beside.
3. reproduced: |value - published| <= tolerance; for `relation: above` or `below`, the value and its whole interval lie
   on the claimed side of the published bound, up to the tolerance.
4. within interval: our interval contains the published number (or the bound).
5. not reproduced.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

NAN = float("nan")
RELATIONS = ("equals", "above", "below")
COLUMNS = (
    *("id", "topic", "statement", "relation", "published", "unit", "value", "low", "high"),
    *("value_without_duplicates", "right_value", "deviation", "tolerance", "tolerance_reason", "verdict", "why"),
    *("source", "n_runs", "independent", "command"),
)
_TEXT = ("id", "topic", "statement", "relation", "unit", "tolerance_reason", "verdict", "why", "source", "command")
_GROUP_KEYS = {"statement", "unit", "source", "tolerance", "answer", "relation", "fault", "explain", "claims"}
_CLAIM_KEYS = (_GROUP_KEYS - {"claims"}) | {"id", "published", "with"}
#: arguments as statements show them
_NAMES = {
    "xlstm": "xLSTM", "transformer": "Transformer", "num_params": "N*", "num_tokens": "D*", "isoflop": "IsoFLOP",
    "tokenparam": "token/param", "gamma_fixed": "gamma = 1", "gamma_free": "gamma free", "min": "least",
    "max": "largest", "exponent_params": "exponent of N*",
}  # fmt: skip
_TOLERANCE_KEYS = {"relative", "absolute", "reason"}


class Verdict(StrEnum):
    """What became of a claim; see the module for the rules."""

    REPRODUCED = "reproduced"
    WITHIN = "within interval"
    NOT_REPRODUCED = "not reproduced"
    FAULT = "authors' error"
    UNANSWERABLE = "not answerable"


class ClaimError(ValueError):
    """A file of claims is not as it should be; the message names the file and the claim."""


class NotAnswerable(Exception):
    """The data that a claim needs are not there; the message says what is missing."""


@dataclass(frozen=True)
class Answer:
    """What an answer function returns.

    Attributes:
        value: the reproduced number, in the claim's unit; for a claim with a fault, with the fault repeated.
        low, high: bootstrap interval; NaN without one.
        n_runs: how many runs (or measurements) entered.
        note: a sentence for the reader.
        without_duplicates: the value with every run counted once, where the authors count some twice.
        right: for a claim with a fault, the value without the fault.
        demonstrated: overrides the test whether the fault is shown, where the value cannot be compared.
        independent: False where losses enter that were recovered with the help of the printed numbers.
    """

    value: float
    low: float = NAN
    high: float = NAN
    n_runs: int = 0
    note: str = ""
    without_duplicates: float = NAN
    right: float = NAN
    demonstrated: bool | None = None
    independent: bool = True


@dataclass(frozen=True)
class Claim:
    """One published number; `relative`, `absolute` are tolerances of which the larger counts."""

    id: str
    topic: str
    statement: str
    published: float
    unit: str
    source: str
    relative: float
    absolute: float
    reason: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    relation: str = "equals"
    fault: str = ""
    explain: str = ""

    @property
    def tolerance(self) -> float:
        """The tolerance in the claim's unit."""
        return max(self.relative * abs(self.published), self.absolute)


AnswerFunction = Callable[..., Answer]


def load_claims(folder: Path, functions: Mapping[str, AnswerFunction]) -> tuple[list[Claim], dict[str, str]]:
    """Read all claims of a folder, by file name.

    Returns:
        The claims, and topic -> title.

    Raises:
        ClaimError: no file, an unknown key, a wrong type, an id that appears twice, an unknown answer or argument.
    """
    files = sorted(Path(folder).glob("*.yaml"))
    if not files:
        raise ClaimError(f"{folder}: no claims (*.yaml) here")
    claims: list[Claim] = []
    titles: dict[str, str] = {}
    for path in files:
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ClaimError(f"{path.name} is not valid YAML: {error}") from None
        topic, title, found = parse_claims(content, path.name, functions)
        if topic in titles:
            raise ClaimError(f"{path.name}: the topic {topic!r} has another file already")
        titles[topic] = title
        claims += found
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise ClaimError(f"two claims have the id {claim.id!r}")
        seen.add(claim.id)
    return claims, titles


def parse_claims(content: Any, where: str, functions: Mapping[str, AnswerFunction]) -> tuple[str, str, list[Claim]]:
    """Return (topic, title, claims) of one file's content; errors as `load_claims`."""
    _known(content, {"topic", "title", "groups"}, where)
    topic, title = _text(content, "topic", where), _text(content, "title", where)
    groups = content.get("groups")
    if not isinstance(groups, list) or not groups:
        raise ClaimError(f"{where}: groups must be a list of groups of claims")
    claims = []
    for number, group in enumerate(groups, start=1):
        place = f"{where}, group {number}"
        _known(group, _GROUP_KEYS, place)
        rows = group.get("claims")
        if not isinstance(rows, list) or not rows:
            raise ClaimError(f"{place}: claims must be a list")
        claims += [_claim(row, group, topic, place, functions) for row in rows]
    return topic, title, claims


def _claim(
    row: Any, group: Mapping[str, Any], topic: str, place: str, functions: Mapping[str, AnswerFunction]
) -> Claim:
    _known(row, _CLAIM_KEYS, place)
    where = f"{place}, claim {_text(row, 'id', place)}"
    merged = {key: value for key, value in group.items() if key != "claims"} | {
        key: value for key, value in row.items() if key != "with"
    }
    answer = merged.get("answer")
    if not isinstance(answer, dict) or len(answer) != 1:
        raise ClaimError(f"{where}: answer must be one function with its arguments, e.g. {{run_count: {{}}}}")
    ((function, shared),) = answer.items()
    own = row.get("with", {})
    if not isinstance(shared or {}, dict) or not isinstance(own, dict):
        raise ClaimError(f"{where}: the arguments of {function} must be a mapping")
    arguments = {**(shared or {}), **own}
    _check_arguments(function, arguments, functions, where)
    tolerance = merged.get("tolerance")
    _known(tolerance, _TOLERANCE_KEYS, f"{where}: tolerance")
    bounds = {key: _number(tolerance, key, where) if key in tolerance else 0.0 for key in ("relative", "absolute")}
    if min(bounds.values()) < 0 or not (set(tolerance) - {"reason"}):
        raise ClaimError(f"{where}: tolerance needs relative or absolute, a number that is not negative")
    relation = merged.get("relation", "equals")
    if relation not in RELATIONS:
        raise ClaimError(f"{where}: relation must be one of {', '.join(RELATIONS)}, not {relation!r}")
    statement = _text(merged, "statement", where)
    try:
        statement = statement.format(**{key: _show(value) for key, value in arguments.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise ClaimError(f"{where}: the statement names {error}, which is no argument of the answer") from None
    optional = {key: _text(merged, key, where) for key in ("fault", "explain") if key in merged}
    return Claim(
        id=row["id"], topic=topic, statement=statement, published=_number(merged, "published", where),
        unit=_text(merged, "unit", where), source=_text(merged, "source", where),
        reason=_text(tolerance, "reason", f"{where}: tolerance"), function=function, arguments=arguments,
        relation=relation, **bounds, **optional,
    )  # fmt: skip


def _check_arguments(function: str, arguments: Mapping[str, Any], functions: Mapping, where: str) -> None:
    if function not in functions:
        raise ClaimError(f"{where}: there is no answer {function!r}; there are {', '.join(sorted(functions))}")
    parameters = dict(list(inspect.signature(functions[function]).parameters.items())[1:])
    for name, value in arguments.items():
        if name not in parameters:
            raise ClaimError(f"{where}: {function} has no argument {name!r}; it takes {', '.join(parameters)}")
        kind = str(parameters[name].annotation).split(" |")[0]
        types = {"float": (int, float), "int": (int,), "str": (str,), "bool": (bool,), "list": (list,)}[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
            hint = " (YAML reads 6e18 as text: write 6.0e+18)" if kind == "float" and isinstance(value, str) else ""
            raise ClaimError(f"{where}: {name} of {function} must be a {kind}, not {value!r}{hint}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            raise ClaimError(f"{where}: {function} needs the argument {name!r}")


def _known(content: Any, keys: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ClaimError(f"{where}: must be a mapping with {', '.join(sorted(keys))}, not {content!r}")
    unknown = sorted(str(key) for key in set(content) - keys)
    if unknown:
        raise ClaimError(f"{where}: unknown key {', '.join(unknown)}; there are {', '.join(sorted(keys))}")


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ClaimError(f"{where}: {key} must be a text that is not empty, not {value!r}")
    return " ".join(value.split())


def _number(content: Mapping[str, Any], key: str, where: str) -> float:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        hint = " (YAML reads 6e18 as text: write 6.0e+18)" if isinstance(value, str) else ""
        raise ClaimError(f"{where}: {key} must be a finite number, not {value!r}{hint}")
    return float(value)


def _show(value: Any) -> str:
    if isinstance(value, str):
        return _NAMES.get(value, value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}".replace("e+", "e") if isinstance(value, float) else str(value)


def judge(claim: Claim, answer: Answer) -> Verdict:
    """Return the verdict of an answer; the rules are in the module's docstring."""
    deviation, tolerance = answer.value - claim.published, claim.tolerance
    close = abs(deviation) <= tolerance  # False where the value is NaN
    bounded = math.isfinite(answer.low) and math.isfinite(answer.high)
    if claim.fault:
        shown = close if answer.demonstrated is None else answer.demonstrated
        return Verdict.FAULT if shown else Verdict.NOT_REPRODUCED
    if claim.relation != "equals":
        sign = 1.0 if claim.relation == "above" else -1.0
        near = (answer.low if sign > 0 else answer.high) if bounded else answer.value
        close = sign * deviation >= -tolerance and sign * (near - claim.published) >= -tolerance
    if close:
        return Verdict.REPRODUCED
    return Verdict.WITHIN if bounded and answer.low <= claim.published <= answer.high else Verdict.NOT_REPRODUCED


def build_ledger(
    claims: Iterable[Claim],
    evidence: Any,
    functions: Mapping[str, AnswerFunction],
    command: str = "xlstm-scaling claims --runs runs.parquet --out claims",
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Answer every claim.

    Args:
        claims: of `load_claims`.
        evidence: the data, `evidence.Evidence`.
        functions: answer functions by name.
        command: what a row's command starts with; its `--only` names the row.
        progress: called with the claim's id before it is answered.

    Returns:
        One row a claim with `COLUMNS` (docs/claims.md). A claim that cannot be answered, for whatever reason, is
        `not answerable` and stops nothing else.
    """
    rows = []
    for claim in claims:
        if progress is not None:
            progress(claim.id)
        try:
            answer = functions[claim.function](evidence, **claim.arguments)
            verdict = judge(claim, answer)
            if not math.isfinite(answer.value) and answer.demonstrated is None:
                raise NotAnswerable(answer.note or "the answer is no number")
        except NotAnswerable as reason:
            answer, verdict = Answer(NAN, note=f"missing: {reason}"), Verdict.UNANSWERABLE
        except Exception as error:  # one answer must not stop the rest
            note = f"the answer failed: {type(error).__name__}: {error}"
            answer, verdict = Answer(NAN, note=note), Verdict.UNANSWERABLE
        rows.append(_row(claim, answer, verdict, command))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    text = pd.StringDtype(na_value=NAN)
    kinds = {name: text if name in _TEXT else "float64" for name in COLUMNS}
    return table.astype(kinds | {"n_runs": "int64", "independent": "bool"})


def _row(claim: Claim, answer: Answer, verdict: Verdict, command: str) -> dict[str, Any]:
    why = [answer.note]
    if verdict is Verdict.FAULT:
        why.insert(0, claim.fault)
    elif verdict in (Verdict.NOT_REPRODUCED, Verdict.WITHIN) and claim.explain:
        why.insert(0, claim.explain)
    return {
        "id": claim.id, "topic": claim.topic, "statement": claim.statement, "relation": claim.relation,
        "published": claim.published, "unit": claim.unit, "value": answer.value, "low": answer.low, "high": answer.high,
        "value_without_duplicates": answer.without_duplicates, "right_value": answer.right,
        "deviation": answer.value - claim.published, "tolerance": claim.tolerance, "tolerance_reason": claim.reason,
        "verdict": verdict.value, "why": " ".join(part for part in why if part), "source": claim.source,
        "n_runs": answer.n_runs, "independent": answer.independent, "command": f"{command} --only {claim.id}",
    }  # fmt: skip


def select_claims(claims: Sequence[Claim], only: Sequence[str] | None) -> list[Claim]:
    """Return the claims whose id or topic is named; all without names.

    Raises:
        ClaimError: a name that is neither.
    """
    if not only:
        return list(claims)
    unknown = [name for name in only if not any(name in (claim.id, claim.topic) for claim in claims)]
    if unknown:
        topics = ", ".join(sorted({claim.topic for claim in claims}))
        raise ClaimError(f"no claim and no topic {', '.join(unknown)}; topics: {topics}")
    return [claim for claim in claims if claim.id in only or claim.topic in only]
