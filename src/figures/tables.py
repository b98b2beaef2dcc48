"""The tables a figure is drawn from, read on demand from a results folder."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from xlstm_scaling.accounting import ordered

# Which stage writes a table, for the error that names it.
STAGES = {"runs": "runs", "curves": "runs", "fits": "fit", "inference": "inference", "evaluation": "evaluate"}
STAGES |= {"context_scaling": "context_scaling_tables"}


class FigureError(ValueError):
    """A figure cannot be drawn: a table or a column it needs is missing."""


class Tables(Mapping):
    """Tables by name (`runs`, `fits/isoflop`, `inference/measurements`), each read once.

    Either from a results folder (`<folder>/<name>.parquet`) or from frames given in memory.
    """

    def __init__(self, folder: Path | str | None = None, frames: Mapping[str, pd.DataFrame] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._frames: dict[str, pd.DataFrame] = dict(frames or {})

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._frames:
            path = self._path(name)
            if path is None or not path.is_file():
                raise FigureError(self._missing(name))
            self._frames[name] = pd.read_parquet(path)
        return self._frames[name]

    def __contains__(self, name: object) -> bool:
        path = self._path(str(name))
        return name in self._frames or (path is not None and path.is_file())

    def __iter__(self) -> Iterator[str]:
        found = set(self._frames)
        if self.folder is not None:
            for path in self.folder.glob("*.parquet"):
                found.add(path.stem)
            for part in ("fits", "inference", "evaluation"):
                found.update(f"{part}/{path.stem}" for path in (self.folder / part).glob("*.parquet"))
        return iter(sorted(found))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def table(self, name: str, *columns: str) -> pd.DataFrame:
        """The table `name`, checked to have `columns`; FigureError names what is missing and who writes it."""
        frame = self[name]
        lacking = [column for column in columns if column not in frame.columns]
        if lacking:
            raise FigureError(
                f"table {name!r} lacks the columns {', '.join(lacking)}; run stage {self._stage(name)!r} again"
            )
        return frame

    @property
    def archs(self) -> list[str]:
        """Every architecture of the study, in the order figures show them."""
        found: set[str] = set()
        for name in ("runs", "inference/measurements", "evaluation/length"):
            if name in self and "arch" in self[name]:
                found.update(self[name]["arch"].dropna().astype(str))
        return order_archs(found)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.parquet"

    def _stage(self, name: str) -> str:
        return STAGES.get(name.split("/")[0], name)

    def _missing(self, name: str) -> str:
        where = self._path(name) or "the tables given"
        return f"table {name!r} is missing ({where}); run stage {self._stage(name)!r} first"


def order_archs(archs: Iterable[str]) -> list[str]:
    """The order of the accounting; rows that hold differences (`a - b`) are left out."""
    return ordered(arch for arch in archs if " - " not in str(arch))


def numbers(values: pd.Series) -> pd.Series:
    """Labels such as '6e+18', 3e11 or 'extra' as floats; what is no number becomes NaN."""
    return pd.to_numeric(values, errors="coerce").astype(float)


def good_runs(tables: Tables) -> pd.DataFrame:
    """Runs with a loss, `isoflop_tag` and `ratio_tag` as numbers."""
    runs = tables.table(
        "runs", "run_id", "status", "experiment_set", "arch", "context_length", "num_params", "num_tokens", "num_flops"
    )
    runs = runs.assign(isoflop_tag=numbers(runs["isoflop_tag"]), ratio_tag=numbers(runs["ratio_tag"]))
    return runs[(runs["status"] == "ok") & runs["val_loss"].notna()]


def fine(status: pd.Series) -> pd.Series:
    """Whether a fit may be used: `ok`, or `converged` as the loss surface says it."""
    return status.isin(["ok", "converged"])


def tagged(frame: pd.DataFrame, column: str = "isoflop_tag") -> pd.DataFrame:
    """The frame with its label column as numbers."""
    return frame.assign(**{column: numbers(frame[column])})


def select(frame: pd.DataFrame, **keys: Any) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in keys.items():
        frame = frame[frame[column] == value]
    return frame


def pick(fits: pd.DataFrame, **keys: Any) -> pd.Series | None:
    """The one row of a fit table with these values, or None."""
    rows = select(fits, **keys)
    return None if rows.empty else rows.iloc[0]


def one_device(rows: pd.DataFrame, options: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of the wanted device (``figures.device``), else of the one with the most rows."""
    if rows.empty:
        return rows
    return rows[rows["device"] == (options.get("device") or rows["device"].value_counts().index[0])]


def points_text(rows: pd.DataFrame, *times: str) -> str:
    """What the points and whiskers of these columns of measured times are."""
    ends = [f"{name}_{end}" for name in times for end in ("lo", "hi")]
    if set(ends) <= set(rows.columns) and rows[ends].notna().to_numpy().any():
        return "Points: medians, whiskers: quartiles of the repeats"
    return "Points: as published, without a spread"


def interval_percent(options: Mapping[str, Any]) -> float:
    """The level of the study's intervals [%]."""
    return 100 * float(options.get("confidence") or 0.95)


def base_context(tables: Tables, wanted: float | None = None) -> int:
    """The context the IsoFLOP study is made at: `wanted`, or the one with the most budgets, then runs."""
    if wanted:
        return int(wanted)
    runs = tagged(tables.table("runs", "context_length", "isoflop_tag"))
    if runs.empty:
        return 0
    rank = runs.groupby("context_length").agg(budgets=("isoflop_tag", "nunique"), runs=("isoflop_tag", "size"))
    return int(rank.sort_values(["budgets", "runs"]).index[-1])


def reasons(frame: pd.DataFrame, limit: int = 2) -> str:
    """Why the rows of a fit table failed, in a few words; 'the table is empty' for none."""
    if frame.empty:
        return "the table is empty"
    failed = frame[~fine(frame["status"])] if "status" in frame else frame
    texts = []
    for row in failed.itertuples():
        detail = str(getattr(row, "detail", "") or "").strip()
        detail = "" if detail in ("nan", "None") else detail.rstrip(".")
        detail = detail if len(detail) <= 110 else detail[:107].rstrip() + " …"
        texts.append(detail or str(getattr(row, "status", "unknown")).replace("_", " "))
    unique = list(dict.fromkeys(texts))
    more = f" (and {len(unique) - limit} more reasons)" if len(unique) > limit else ""
    return "; ".join(unique[:limit]) + more if unique else "no rows match"
