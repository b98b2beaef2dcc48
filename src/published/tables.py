"""A table of runs that somebody published (CSV or Parquet) -> columns of the table of runs, by a mapping with units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from xlstm_scaling.accounting import ARCHITECTURES
from xlstm_scaling.accounting.shapes import DIMENSIONS
from xlstm_scaling.study.runs import SCHEMA_PATH

#: factors of the units that a mapping may name; a plain number does as well
UNITS = {
    "thousand": 1e3,
    "million": 1e6,
    "billion": 1e9,
    "trillion": 1e12,
    "exaflop": 1e18,
    "zettaflop": 1e21,
    "petaflop_s_day": 8.64e19,  # 1e15 FLOP/s over 86,400 s
    "bit": math.log(2),  # loss in bits/token -> nat/token
}
#: what a table must give; D may follow from FLOPs and N
REQUIRED = ("arch", "context_length", "num_params", "num_tokens", "val_loss")
DEFAULTS = {"source": "published", "experiment_set": "other"}
SHAPE = ("arch", *DIMENSIONS, "chunk_size")


class MappingError(ValueError):
    """A table or its mapping does not fit the table of runs; the message says which column, and what to do."""


@dataclass(frozen=True)
class TableMapping:
    """How a published table becomes a table of runs.

    Attributes:
        columns: column here -> column there; columns of the same name need no entry.
        units: column here -> factor from the unit there to the SI unit here (a number or a name of `UNITS`).
        constants: column here -> value of all rows.
        replace: column here -> {value there: value here}.
        when: columns there by which a table of this kind is recognised; empty: never by itself.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    replace: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    when: tuple[str, ...] = ()

    def merged(self, other: TableMapping) -> TableMapping:
        """This mapping with the entries of ``other`` on top."""
        parts = ("columns", "units", "constants", "replace")
        both = {part: {**getattr(self, part), **getattr(other, part)} for part in parts}
        return TableMapping(**both, when=other.when or self.when)


@cache
def schema_columns() -> dict[str, dict[str, Any]]:
    """Column -> its entry in ``workflow/schemas/runs.schema.yaml`` (dtype, checks, …)."""
    return yaml.safe_load(SCHEMA_PATH.read_text())["columns"]


def load_mapping(path: Path) -> TableMapping:
    """A mapping from YAML: the keys columns, units, constants, replace, when (docs/published.md).

    Raises:
        FileNotFoundError. MappingError: no such key, or no such column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no mapping {path}: give a YAML file as docs/published.md describes it")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise MappingError(f"{path} is no valid YAML: {error}") from None
    known = TableMapping.__dataclass_fields__
    if not isinstance(content, dict) or set(content) - set(known):
        odd = sorted(set(content) - set(known)) if isinstance(content, dict) else type(content).__name__
        raise MappingError(f"{path}: {odd} is none of the keys of a mapping: {', '.join(known)}")
    for key, part in content.items():
        if not isinstance(part, list if key == "when" else dict):
            raise MappingError(f"{path}: {key} must be a {'list' if key == 'when' else 'mapping'}")
    mapping = TableMapping(**{key: tuple(part) if key == "when" else part for key, part in content.items()})
    check_mapping(mapping)
    return mapping


def parse_pairs(pairs: Iterable[str] | None, option: str) -> dict[str, str]:
    """``['a=b', …]`` -> {a: b}; MappingError names the option and the pair that is none."""
    parsed = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise MappingError(f"{option} {pair!r}: write NAME=VALUE, e.g. num_params='Model Size'")
        parsed[name.strip()] = value.strip()
    return parsed


def check_mapping(mapping: TableMapping) -> None:
    """MappingError where a mapping names a column that the table of runs does not have, or an unknown unit."""
    for part in ("columns", "units", "constants", "replace"):
        unknown = sorted(set(getattr(mapping, part)) - set(schema_columns()))
        if unknown:
            known = ", ".join(schema_columns())
            raise MappingError(f"{part}: {', '.join(unknown)} is no column of the table of runs; there are: {known}")
    for column in mapping.units:
        if not _is_number(column):
            raise MappingError(f"units: {column} is a text and has no unit")
        factor(mapping.units[column])


def factor(unit: Any) -> float:
    """The factor of a unit: a positive number, or a name of `UNITS`; MappingError names the known ones."""
    value = UNITS.get(unit) if isinstance(unit, str) else None
    if value is None:
        try:
            value = float(unit)
        except (TypeError, ValueError):
            value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise MappingError(f"unit {unit!r} is neither a positive number nor one of {', '.join(UNITS)}")
    return value


def read_frame(content: bytes, suffix: str, label: str) -> pd.DataFrame:
    """A CSV (all cells as text, empty ones missing) or Parquet file as a frame; MappingError where it is none."""
    try:
        if suffix == ".parquet":
            return pd.read_parquet(BytesIO(content))
        return pd.read_csv(BytesIO(content), dtype=str, skipinitialspace=True)
    except (ValueError, OSError) as error:
        raise MappingError(f"{label} cannot be read as {suffix.lstrip('.').upper()}: {error}") from None


def choose_mapping(frame: pd.DataFrame, known: Iterable[TableMapping]) -> TableMapping | None:
    """The known mapping whose ``when`` columns the frame all has, or None."""
    return next((m for m in known if m.when and set(m.when) <= set(frame.columns)), None)


def read_table(frame: pd.DataFrame, mapping: TableMapping, label: str) -> tuple[pd.DataFrame, list[str]]:
    """Rows of a published table as rows of the table of runs, and the columns that were left behind.

    Args:
        frame: one run a row, as `read_frame` gives it.
        mapping: see `TableMapping`.
        label: of the file, for errors.

    Returns:
        The mapped columns, converted: lengths and counts as Int64, numbers as float64 in SI units, text as it is;
        missing ones stay missing. `status`: ok, `failed` where N, D or the loss is missing, `diverged` where the
        loss is infinite; a status that the table has counts. Without `num_tokens`, D = FLOPs / (6 N), and
        `flops_convention` is 6nd.

    Raises:
        MappingError: a column is absent or unknown, or a value of it is no number, negative or no whole number; names
        the rows (counted from 1, without the header).
    """
    check_mapping(mapping)
    columns = {name: name for name in schema_columns() if name in frame.columns} | dict(mapping.columns)
    absent = sorted(set(columns.values()) - set(frame.columns))
    if absent:
        raise MappingError(f"{label} has no column {', '.join(map(repr, absent))}; it has: {_listed(frame.columns)}")
    given = {*columns, *mapping.constants} | ({"num_tokens"} if "num_flops" in columns else set())
    lacking = [name for name in REQUIRED if name not in given]
    if lacking:
        raise MappingError(
            f"{label}: nothing gives {', '.join(lacking)}; it has the columns {_listed(frame.columns)}. Say which with "
            f"--columns {lacking[0]}='…', or give one value for all rows with --set {lacking[0]}=…"
        )
    table = pd.DataFrame(index=range(len(frame)))
    for name, there in columns.items():
        cells = frame[there].tolist()
        if name in mapping.replace:
            cells = _replaced(cells, mapping.replace[name])
        table[name] = _converted(name, cells, f"{label}, column {there!r}", mapping.units.get(name, 1.0))
    for name, value in {**DEFAULTS, **mapping.constants}.items():
        if name not in table or (name in mapping.constants and name not in columns):
            table[name] = _converted(name, [value] * len(table), f"{label}, constant {name}", 1.0)
    if "num_tokens" not in table:
        tokens = table["num_flops"] / (6 * table["num_params"].astype("float64"))
        table["num_tokens"], table["flops_convention"] = tokens.round().astype("Int64"), "6nd"
    unknown = sorted(set(table["arch"].dropna()) - set(ARCHITECTURES))
    if unknown or table["arch"].isna().any():
        names = ", ".join(map(repr, unknown)) or "a missing value"
        raise MappingError(
            f"{label}: arch is {names}; known: {', '.join(ARCHITECTURES)}. Say in a YAML replace: {{arch: {{…: …}}}}"
        )
    if "status" not in table:
        table["status"], table["detail"] = _statuses(table)
    return table, sorted(map(str, set(frame.columns) - set(columns.values())))


def _statuses(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    unstarted = table["num_params"].isna() | table["num_tokens"].isna()
    lossless, infinite = table["val_loss"].isna(), table["val_loss"] == math.inf
    status = pd.Series("ok", index=table.index, dtype=object)
    detail = pd.Series(None, index=table.index, dtype=object)
    for mask, kind, reason in (
        (infinite, "diverged", "validation loss inf"),
        (lossless, "failed", "no validation loss published"),
        (unstarted, "failed", "no N or D published"),
    ):
        status[mask], detail[mask] = kind, reason
    return status, detail


def _is_number(column: str) -> bool:
    return schema_columns()[column]["dtype"] not in ("str", "boolean")


def _replaced(cells: list[Any], values: Mapping[Any, Any]) -> list[Any]:
    texts = {str(there): here for there, here in values.items()}
    return [texts.get(str(cell), cell) if cell is not None else None for cell in cells]


def _converted(name: str, cells: list[Any], where: str, unit: Any) -> pd.Series:
    """The cells as the schema's type; MappingError names the first rows that are not."""
    entry = schema_columns()[name]
    dtype = entry["dtype"]
    if dtype == "str":
        return pd.Series([None if _missing(cell) else str(cell) for cell in cells], dtype="str")
    if dtype == "boolean":
        return pd.Series([_boolean(cell, where, row) for row, cell in enumerate(cells, 1)], dtype="boolean")
    scale, numbers = factor(unit), []
    for row, cell in enumerate(cells, 1):
        try:
            number = math.nan if _missing(cell) else float(cell)
        except (TypeError, ValueError):
            raise MappingError(f"{where}, row {row}: {cell!r} is no number") from None
        numbers.append(number * scale if scale != 1.0 else number)
    checks = entry.get("checks") or {}
    zero_is_fine = checks.get("greater_than_or_equal_to") == 0
    low = [(row, x) for row, x in enumerate(numbers, 1) if checks and (x < 0 or (x == 0 and not zero_is_fine))]
    if low:
        row, value = low[0]
        raise MappingError(f"{where}, row {row}: {value:g} is not positive ({len(low)} such rows): mend the table")
    if dtype.lower() != "int64":
        return pd.Series(numbers, dtype="float64")
    if any(x == math.inf for x in numbers):
        raise MappingError(
            f"{where}, row {numbers.index(math.inf) + 1}: infinite; leave the cell empty where it is unknown"
        )
    rounded = [None if math.isnan(x) else round(x) for x in numbers]
    for row, (number, whole) in enumerate(zip(numbers, rounded, strict=True), 1):
        if whole is not None and number < 1e6 and number != whole:
            raise MappingError(
                f"{where}, row {row}: {number:g} is no whole number; is its unit right? (--units {name}=…)"
            )
    return pd.Series(rounded, dtype="Int64")


def _missing(cell: Any) -> bool:
    return cell is None or cell is pd.NA or (isinstance(cell, float) and math.isnan(cell)) or str(cell).strip() == ""


def _boolean(cell: Any, where: str, row: int) -> bool | None:
    if _missing(cell):
        return None
    known = {"true": True, "1": True, "false": False, "0": False}
    if (value := known.get(str(cell).strip().lower())) is None:
        raise MappingError(f"{where}, row {row}: {cell!r} is neither true nor false")
    return value


def _listed(columns: Iterable[Any]) -> str:
    names = [repr(str(name)) for name in columns]
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
