"""Power laws through the IsoFLOP minima.

N*(H) = A' H^a, D*(H) = B' H^b and L*(H) = C' H^c per architecture and context, with H the mean FLOPs of a budget, and
N*, D* as powers of the context at a fixed budget: least squares in log space (Hoffmann et al. 2022, section 3.2). The
intervals come from the resamples of the parabolas, carried through.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xlstm_scaling.accounting import ordered

from .resampling import cell_generator, percentile_interval, refill
from .tables import make_table

Array = NDArray[np.float64]
#: variable → the parabola that it is read off (L* of that in log10 N), and the column of `isoflop`
MINIMA = {
    "num_params": ("num_params", "x_opt"),
    "num_tokens": ("num_tokens", "x_opt"),
    "loss": ("num_params", "loss_opt"),
}
_DRAWN = ["x_opt", "loss_opt"]


class PowerLawStatus(StrEnum):
    """How a power law's fit ended."""

    OK = "ok"
    TOO_FEW_POINTS = "too_few_points"


def difference(first: str, second: str) -> str:
    """What stands in the column ``arch`` where a row is the first architecture's exponent minus the second's."""
    return f"{first} - {second}"


def fit_lines(x: Array, y: Array) -> Array:
    """Return (intercept, slope) of the least-squares line of each row.

    Args:
        x: shape (n,), at least two distinct values.
        y: shape (R, n).

    Returns:
        Shape (R, 2); NaN where a row of `y` holds NaN.
    """
    centred = x - x.mean()
    slope = (y @ centred) / (centred @ centred)
    return np.column_stack([y.mean(axis=1) - slope * x.mean(), slope])


def flops_bounds(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the range of budgets [FLOPs] that power laws are fitted over: `power_law.flops_range`, open where None."""
    low, high = config["power_law"]["flops_range"]
    return -np.inf if low is None else float(low), np.inf if high is None else float(high)


def minima_draws(resamples: pd.DataFrame) -> dict[tuple[Any, ...], Array]:
    """(arch, context, tag, variable) → (x_opt, loss_opt) of every resample of a parabola, shape (R, 2), NaN: failed."""
    keys = ["arch", "context_length", "isoflop_tag", "variable"]
    return {key: group.sort_values("resample")[_DRAWN].to_numpy() for key, group in resamples.groupby(keys)}


def refilled_draws(
    draws: Mapping[tuple[Any, ...], Array], seed: int, arch: str, context: int, tag: Any, variable: str
) -> Array:
    """The resamples of one parabola, (R, 2), the failed ones drawn again; N* and D* of a cell get the same draws."""
    return refill(draws[arch, context, tag, variable], cell_generator(seed, "refill", arch, context, tag))


def fit_power_laws(
    isoflop: pd.DataFrame, resamples: pd.DataFrame, config: Mapping[str, Any], runs: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit all power laws, their differences between the architectures, and their bands.

    Args:
        isoflop, resamples: the tables of `isoflop.fit_isoflop`.
        config: the group `fitting`.
        runs: the table of runs, for the type of the tags.

    Returns:
        The tables `power_laws` and `power_law_bands` of docs/tables.md. Rows of `difference(a, b)`, one for every pair
        of architectures, hold the difference of the exponents only (one of coefficients has no meaning at H = 1).
    """
    draws = minima_draws(resamples)
    fits: list[tuple[dict[str, Any], Array]] = []
    bands: list[pd.DataFrame] = []
    for key, points in _groups(isoflop, config):
        row, lines, grid = _fit_points(key, points, draws, config)
        fits.append((key | row, lines))
        if grid is not None:
            bands.append(_band(key, row, lines, grid, config["confidence"]))
    rows = [row for row, _ in fits] + _differences(fits, config["confidence"])
    stacked = pd.concat(bands, ignore_index=True) if bands else []
    return make_table("power_laws", rows, runs), make_table("power_law_bands", stacked, runs)


def minima_lines(
    isoflop: pd.DataFrame,
    resamples: pd.DataFrame,
    config: Mapping[str, Any],
    variables: Sequence[str] = tuple(MINIMA),
) -> dict[tuple[str, int], dict[str, Array]]:
    """N*(H), D*(H) and L*(H) of every architecture and context, with their resamples, from the tables alone.

    Args:
        isoflop, resamples: the tables of `isoflop.fit_isoflop`.
        config: the group `fitting`: seed, power_law.flops_range and min_points.
        variables: which of num_params, num_tokens, loss.

    Returns:
        (arch, context) → variable (num_params, num_tokens, loss) → (intercept, slope) in log10, shape (1 + R, 2): the
        fit, then its resamples. An architecture and context with too few minima of a variable lacks it.
    """
    cells = isoflop[(isoflop["status"] == "ok") & isoflop["flops_mean"].between(*flops_bounds(config))]
    draws = minima_draws(resamples)
    least = max(2, int(config["power_law"]["min_points"]))
    found: dict[tuple[str, int], dict[str, Array]] = {}
    for variable in variables:
        parabola, value = MINIMA[variable]
        for (arch, context), group in cells[cells["variable"] == parabola].groupby(["arch", "context_length"]):
            group = group.sort_values("flops_mean")
            if group["flops_mean"].nunique() < least:
                continue
            x, y = (np.log10(group[name].to_numpy(dtype=np.float64)) for name in ("flops_mean", value))
            places = [(arch, context, tag) for tag in group["isoflop_tag"]]
            lines = fit_lines(x, np.vstack([y, _sampled(draws, places, variable, config["seed"])]))
            found.setdefault((str(arch), int(context)), {})[variable] = lines
    return found


def _sampled(
    draws: Mapping[tuple[Any, ...], Array], places: Iterable[tuple[str, int, Any]], variable: str, seed: int
) -> Array:
    """Return log10 of the resampled minima of k cells (arch, context, tag), shape (R, k)."""
    parabola, value = MINIMA[variable]
    column = _DRAWN.index(value)
    return np.column_stack([np.log10(refilled_draws(draws, seed, *place, parabola)[:, column]) for place in places])


def _groups(isoflop: pd.DataFrame, config: Mapping[str, Any]) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Return the key of every law and the IsoFLOP cells (also failed ones) that belong to it."""
    in_range = isoflop[isoflop["flops_mean"].between(*flops_bounds(config))]
    groups = []
    for variable, (parabola, value) in MINIMA.items():
        cells = in_range[in_range["variable"] == parabola].assign(value=lambda frame, v=value: frame[v])
        for (arch, context), group in cells.groupby(["arch", "context_length"], sort=True):
            key = {"arch": arch, "context_length": context, "variable": variable, "predictor": "flops"}
            groups.append((key | {"isoflop_tag": np.nan}, group.assign(predictor_value=group["flops_mean"])))
        if variable == "loss":
            continue
        for (arch, tag), group in cells.groupby(["arch", "isoflop_tag"], sort=True):
            if group["context_length"].nunique() < 2:
                continue
            key = {"arch": arch, "context_length": np.nan, "variable": variable, "predictor": "context_length"}
            groups.append((key | {"isoflop_tag": tag}, group.assign(predictor_value=group["context_length"])))
    return groups


def _fit_points(
    key: Mapping[str, Any],
    points: pd.DataFrame,
    draws: Mapping[tuple[Any, ...], Array],
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], Array, Array | None]:
    """Return the row, the (intercept, slope) of the point fit and of each resample, and the grid of the band."""
    good = points[points["status"] == "ok"].sort_values("predictor_value")
    row: dict[str, Any] = {"num_points": len(good)}
    failed = len(points) - len(good)
    note = f" {failed} cell(s) without a minimum left out." if failed else ""
    if len(good) < max(2, int(config["power_law"]["min_points"])) or good["predictor_value"].nunique() < 2:
        detail = f"{len(good)} minima, needs {config['power_law']['min_points']}.{note}"
        return row | {"status": PowerLawStatus.TOO_FEW_POINTS, "detail": detail}, np.full((1, 2), np.nan), None

    x = np.log10(good["predictor_value"].to_numpy(dtype=np.float64))
    places = good[["arch", "context_length", "isoflop_tag"]].itertuples(index=False, name=None)
    y = np.log10(good["value"].to_numpy(dtype=np.float64))
    lines = fit_lines(x, np.vstack([y, _sampled(draws, places, key["variable"], config["seed"])]))
    row |= {"predictor_min": 10 ** x.min(), "predictor_max": 10 ** x.max()}
    for name, index in (("log10_coefficient", 0), ("exponent", 1)):
        row[name] = lines[0, index]
        row[f"{name}_lo"], row[f"{name}_hi"] = percentile_interval(lines[1:, index], config["confidence"])
    detail = f"{len(good)} minima.{note}"
    if len(good) == 2:
        detail += " The line goes through both points; nothing tests the power law."
    if np.isnan(row["exponent_lo"]):
        detail += " A cell has too few valid resamples: no interval."
    stretch = np.log10(float(config["power_law"]["band_extrapolation"]))
    grid = np.linspace(x.min(), x.max() + stretch * (key["predictor"] == "flops"), config["power_law"]["band_points"])
    return row | {"status": PowerLawStatus.OK, "detail": detail}, lines, grid


def _band(key: dict[str, Any], row: dict[str, Any], lines: Array, grid: Array, confidence: float) -> pd.DataFrame:
    values = 10 ** (lines[:, :1] + lines[:, 1:] * grid)  # [1 + R, points]
    band = pd.DataFrame({"predictor_value": 10**grid, "value": values[0]})
    intervals = np.array([percentile_interval(column, confidence) for column in values[1:].T])
    band["value_lo"], band["value_hi"] = intervals[:, 0], intervals[:, 1]
    return band.assign(**key)


def _differences(fits: Sequence[tuple[dict[str, Any], Array]], confidence: float) -> list[dict[str, Any]]:
    """Return the rows of one architecture's exponent minus another's, where both exist, for every pair in order."""
    names = ("context_length", "variable", "predictor", "isoflop_tag")
    table = {(row["arch"], *(str(row[name]) for name in names)): (row, lines) for row, lines in fits}
    rows = []
    archs = ordered(arch for arch, *_ in table)
    for (arch, *rest), (row, lines) in table.items():
        for second in archs[archs.index(arch) + 1 :]:
            other = table.get((second, *rest))
            if other is None or len(lines) == 1 or len(other[1]) == 1:
                continue
            lo, hi = percentile_interval(lines[1:, 1] - other[1][1:, 1], confidence)
            gap = {name: row[name] for name in names} | {"arch": difference(arch, second), "status": PowerLawStatus.OK}
            gap |= {"exponent": lines[0, 1] - other[1][0, 1], "exponent_lo": lo, "exponent_hi": hi}
            gap["num_points"] = min(row["num_points"], other[0]["num_points"])
            gap["predictor_min"] = max(row["predictor_min"], other[0]["predictor_min"])
            gap["predictor_max"] = min(row["predictor_max"], other[0]["predictor_max"])
            gap["detail"] = "Difference of the exponents; the architectures are resampled independently."
            if np.isnan(lo):
                gap["detail"] += " One of them has no interval."
            rows.append(gap)
    return rows
