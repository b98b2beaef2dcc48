"""``xlstm-scaling fit-surface``: one loss surface from a table of runs, with intervals and its status."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from .surface_result import SurfaceFit

_COLUMNS = ("arch", "experiment_set", "context_length", "num_params", "num_tokens", "val_loss")
_NUMBERS = ("num_params", "num_tokens", "val_loss")


class OptionError(ValueError):
    """An option, a table or a choice of runs that gives no fit; the message says what to change."""


def add_surface_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``xlstm-scaling fit-surface``."""
    add = parser.add_argument
    add("runs", type=Path, metavar="RUNS", help="table of runs, .parquet or .csv")
    add("--arch", required=True, help="architecture, as the table names it")
    add("--set", default="all", metavar="SET", help="experiment set of the table, or all (default)")
    add("--tokens-per-param", default="0,inf", metavar="LO,HI", help="range of D/N (default: all)")
    add("--context-length", type=int, metavar="T", help="context [tokens] (default: the one with most runs)")
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only runs with this value; repeatable")
    add("--weights", metavar="COLUMN", help="how often each run counts, e.g. notebook_multiplicity (default: once)")
    add(
        "--huber", type=float, metavar="DELTA", help="Huber threshold on ln loss (default: fitting.surface.huber_delta)"
    )
    add("--free-gamma", action="store_true", help="fit gamma too, and compare with gamma = 1")
    add("--bootstrap", type=int, default=0, metavar="R", help="resamples for the intervals (default: none)")
    add("--seed", type=int, help="of the resamples (default: fitting.seed)")
    add("--json", action="store_true", help="print JSON")


def run_surface(args: argparse.Namespace) -> int:
    """Fit and print; 1 where the fit is no estimate (its status is not `converged`)."""
    from xlstm_scaling.study.config import compose, to_dict

    settings = to_dict(compose([]).fitting)
    if args.huber is not None and not args.huber > 0:
        raise OptionError(f"--huber must be positive, not {args.huber:g}")
    if args.bootstrap < 0:
        raise OptionError(f"--bootstrap must not be negative, not {args.bootstrap}")
    settings["num_resamples"] = args.bootstrap
    settings["seed"] = settings["seed"] if args.seed is None else args.seed
    data, context = select_runs(read_runs(args.runs), args, settings)
    result = surface_result(data, settings, args, context)
    print(json.dumps(result) if args.json else _text(result))
    return 0 if result["status"] == "converged" else 1


def read_runs(path: Path) -> pd.DataFrame:
    """Return the table of runs of a .parquet or .csv file.

    Raises:
        FileNotFoundError, ValueError: no such table.
        OptionError: a column that the fit needs is absent.
    """
    from xlstm_scaling.study.files import read_table

    runs = read_table(path)
    missing = [name for name in _COLUMNS if name not in runs.columns]
    if missing:
        raise OptionError(f"{path} lacks the columns {', '.join(missing)}")
    return runs


def select_runs(runs: pd.DataFrame, args: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[pd.DataFrame, int]:
    """Return the usable runs that the options choose, in an order of their own, and their context length.

    Raises:
        OptionError: a name that the table does not have, a range that is none, or no run left.
    """
    import numpy as np
    import pandas as pd

    from .surface_tables import base_context

    low, high = _range(args.tokens_per_param)
    for condition in args.where:
        column, _, value = condition.partition("=")
        if column not in runs.columns:
            raise OptionError(f"--where {condition}: the table has no column {column!r}")
        runs = _chosen(runs, column, runs[column].astype(str) == value, value)
    runs = _chosen(runs, "arch", runs["arch"] == args.arch, args.arch)
    if args.set != "all":
        runs = _chosen(runs, "experiment_set", runs["experiment_set"] == args.set, args.set)
    if "status" in runs.columns:
        runs = runs[runs["status"] == "ok"]
    numbers = runs[list(_NUMBERS)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    runs = runs[(np.isfinite(numbers) & (numbers > 0)).all(axis=1)]
    if runs.empty:
        raise OptionError(f"no run of {args.arch} has status 'ok' and a finite positive N, D and validation loss")
    wanted = args.context_length
    wanted = base_context(runs, settings) if wanted is None else wanted
    runs = _chosen(runs, "context_length", runs["context_length"] == wanted, wanted)
    ratio = runs["num_tokens"] / runs["num_params"]
    inside = (ratio >= low) & (ratio <= high)
    if not inside.any():
        span = f"{ratio.min():.3g} to {ratio.max():.3g}"
        raise OptionError(f"no run has {low:g} to {high:g} tokens per parameter; the {len(runs)} runs have {span}")
    runs = runs[inside]
    if args.weights is not None:
        if args.weights not in runs.columns:
            raise OptionError(f"--weights: the table has no column {args.weights!r}")
        weights = pd.to_numeric(runs[args.weights], errors="coerce")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise OptionError(f"--weights: {args.weights} must hold numbers that are not negative")
        runs = runs[weights > 0]
    return runs.sort_values(list(_NUMBERS), kind="stable").reset_index(drop=True), int(wanted)


def surface_result(
    data: pd.DataFrame, settings: Mapping[str, Any], args: argparse.Namespace, context: int
) -> dict[str, Any]:
    """Fit the chosen runs; return what is printed: fit, status, intervals, comparison of forms.

    Raises:
        OptionError: there is no fit at all, e.g. too few runs.
    """
    import numpy as np

    from xlstm_scaling.study.files import finite

    from .surface_fit import fit_surface
    from .surface_result import FORMS, SAMPLED, compare_forms

    config = settings["surface"]
    values = [data[name].to_numpy(dtype=np.float64) for name in _NUMBERS]
    weights = None if args.weights is None else data[args.weights].to_numpy(dtype=np.float64)
    form = FORMS[1] if args.free_gamma else FORMS[0]
    fit = fit_surface(*values, config, form=form, huber_delta=args.huber, weights=weights)
    if fit.surface is None:
        raise OptionError(f"no valid fit ({fit.status.value}): {fit.detail}")
    low, high = _range(args.tokens_per_param)
    result: dict[str, Any] = {
        "arch": args.arch, "set": args.set, "context_length": context, "tokens_per_param": [low, high],
        "num_runs": len(data), "weights": args.weights, "form": form, "huber_delta": fit.huber_delta,
        "status": fit.status.value, "detail": fit.detail,
        "parameters": {name: getattr(fit.surface, name) for name in SAMPLED[:6]},
        "exponent_params": fit.surface.exponent_params, "exponent_tokens": fit.surface.exponent_tokens,
        "objective": fit.objective, "r2_log": fit.r2_log, "rmse_log": fit.rmse_log,
        "log_likelihood": fit.log_likelihood, "aic": fit.aic, "bic": fit.bic,
        "num_starts": fit.num_starts, "num_starts_agree": fit.num_starts_agree,
        "condition_number": fit.condition_number,
    }  # fmt: skip
    if args.free_gamma:
        fixed = fit_surface(*values, config, form=FORMS[0], huber_delta=args.huber, weights=weights)
        result["gamma_test"] = compare_forms(fixed, fit)
    if args.bootstrap:
        result |= _bootstrap(fit, data, settings, args, context)
    return finite(result)


def _bootstrap(
    fit: SurfaceFit, data: pd.DataFrame, settings: Mapping[str, Any], args: argparse.Namespace, context: int
) -> dict[str, Any]:
    from .resampling import percentile_interval
    from .surface_result import SAMPLED
    from .surface_tables import surface_samples

    if "isoflop_tag" not in data.columns:
        data = data.assign(isoflop_tag="")
    samples, survivors = surface_samples(fit, data, settings, args.arch, context, args.set)
    names = SAMPLED if args.free_gamma else [name for name in SAMPLED if name != "gamma"]
    intervals = {name: percentile_interval(samples[:, SAMPLED.index(name)], settings["confidence"]) for name in names}
    return {
        "confidence": settings["confidence"], "num_resamples": args.bootstrap, "resamples_converged": survivors,
        "intervals": {name: list(pair) for name, pair in intervals.items()},
    }  # fmt: skip


def _chosen(runs: pd.DataFrame, column: str, keep: pd.Series, value: object) -> pd.DataFrame:
    if not keep.any():
        known = ", ".join(sorted({str(name) for name in runs[column].dropna().unique()})[:12])
        raise OptionError(f"no run has {column} {value!r}; there are: {known}")
    return runs[keep]


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--tokens-per-param takes two numbers, e.g. 0,5000, not {text!r}") from None
    if not 0 <= low < high:
        raise OptionError(f"--tokens-per-param: {low:g} must be less than {high:g}, and not negative")
    return low, high


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _text(result: Mapping[str, Any]) -> str:
    form = "L = E + (A/N^alpha + B/D^beta)^gamma" if result["form"] == "gamma_free" else "L = E + A/N^alpha + B/D^beta"
    lines = [
        f"{form}, {result['num_runs']} runs of {result['arch']} (set {result['set']}, context"
        f" {result['context_length']}), delta = {result['huber_delta']:g}",
        f"status            {result['status']}",
    ]
    intervals = result.get("intervals", {})
    exponents = {name: result[name] for name in ("exponent_params", "exponent_tokens")}
    for name, value in (result["parameters"] | exponents).items():
        span = intervals.get(name)
        text = "" if span is None else f"   [{_number(span[0])}, {_number(span[1])}]"
        lines.append(f"{name:17s} {_number(value)}{text}")
    for name in ("objective", "r2_log", "rmse_log", "condition_number", "log_likelihood", "aic", "bic"):
        lines.append(f"{name:17s} {_number(result[name])}")
    lines.append(f"starts            {result['num_starts_agree']} of {result['num_starts']} agree")
    if intervals:
        share = f"{result['resamples_converged']} of {result['num_resamples']} resamples converged"
        lines.append(f"intervals         {100 * result['confidence']:g} %, {share}")
    test = result.get("gamma_test")
    if test is not None:
        parts = ("likelihood_ratio", "p_value", "delta_aic", "delta_bic")
        lines.append("gamma = 1?        " + ", ".join(f"{name} {_number(test[name])}" for name in parts))
    return "\n".join([*lines, result["detail"]])
