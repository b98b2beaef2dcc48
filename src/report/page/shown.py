"""What a figure shows, in numbers: how many runs or measurements, of which N, H and context."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from xlstm_scaling.figures.style import flops, si
from xlstm_scaling.figures.tables import FigureError, Tables, base_context, good_runs


def shown(name: str, tables: Tables, options: Mapping[str, Any]) -> str:
    """One line below a figure's caption; "" where its tables are not at hand."""
    tell = _FIGURES.get(name)
    try:
        return "" if tell is None else tell(tables, options)
    except FigureError:
        return ""


def span(values: pd.Series, form: Callable[[float], str], unit: str = "") -> str:
    """From the least to the largest."""
    known = pd.to_numeric(values, errors="coerce").dropna()
    if known.empty:
        return "unknown"
    low, high = form(float(known.min())), form(float(known.max()))
    return (low if low == high else f"{low} to {high}") + unit


def of_runs(rows: pd.DataFrame, noun: str = "runs") -> str:
    """Number, N, D, H and contexts of runs."""
    parts = [f"{len(rows):,} {noun}"]
    for symbol, column, form, unit in (
        ("N", "num_params", si, " parameters"),
        ("D", "num_tokens", si, " tokens"),
        ("H", "num_flops", flops, " FLOPs"),
    ):
        if column in rows:
            parts.append(f"{symbol} = {span(rows[column], form, unit)}")
    return "; ".join([*parts, _contexts(rows["context_length"])])


def _contexts(values: pd.Series) -> str:
    known = sorted({int(v) for v in values.dropna()})
    return ("context " if len(known) == 1 else "contexts ") + ", ".join(f"{v:,}" for v in known) + " tokens"


def _base(tables: Tables, options: Mapping[str, Any]) -> pd.DataFrame:
    runs = good_runs(tables)
    return runs[runs["context_length"] == base_context(tables, options.get("base_context"))]


def _all_runs(tables: Tables, options: Mapping[str, Any]) -> str:
    return of_runs(good_runs(tables))


def _base_runs(tables: Tables, options: Mapping[str, Any]) -> str:
    return of_runs(_base(tables, options))


def _base_isoflop(tables: Tables, options: Mapping[str, Any]) -> str:
    rows = _base(tables, options)
    return of_runs(rows[rows["isoflop_tag"].notna()], "IsoFLOP runs")


def _isoflop(tables: Tables, options: Mapping[str, Any]) -> str:
    rows = good_runs(tables)
    return of_runs(rows[rows["isoflop_tag"].notna()], "IsoFLOP runs")


def _planned(tables: Tables, options: Mapping[str, Any]) -> str:
    return of_runs(tables["runs"], "runs planned")


def _ratios(tables: Tables, options: Mapping[str, Any]) -> str:
    rows = good_runs(tables)
    return of_runs(rows[rows["ratio_tag"].notna()], "runs at fixed tokens per parameter")


def _curves(tables: Tables, options: Mapping[str, Any]) -> str:
    curves = tables["curves"]
    rows = tables["runs"] if "runs" in tables else curves.drop_duplicates("run_id")
    return of_runs(rows[rows["run_id"].isin(set(curves["run_id"]))], "training curves")


def _sensitivity(tables: Tables, options: Mapping[str, Any]) -> str:
    surface = tables["fits/surface"]
    fits = f"{(surface['status'] == 'converged').sum()} of {len(surface)} loss surfaces converged"
    return f"{fits}; {_base_runs(tables, options)}" if "runs" in tables else fits


def _forecasts(tables: Tables, options: Mapping[str, Any]) -> str:
    rows = tables["fits/forecasts"]
    parts = [f"{len(rows)} forecasts", f"H = {span(rows['flops_mean'], flops, ' FLOPs')}"]
    return "; ".join([*parts, _contexts(rows["context_length"])])


def _length(tables: Tables, options: Mapping[str, Any]) -> str:
    rows = tables["evaluation/length"]
    if rows.empty:
        return "no held-out document is long enough"
    runs = rows.drop_duplicates("run_id")
    return f"{of_runs(runs, 'models')}; positions to {rows['position_max'].max():,}"


def _times(tables: Tables, options: Mapping[str, Any]) -> str:
    rows = tables["inference/measurements"]
    ok = rows[rows["status"] == "ok"]
    parts = [f"{len(ok):,} of {len(rows):,} cells measured", f"N = {span(ok['num_params'], si, ' parameters')}"]
    parts.append(f"prompts of {span(ok['prefill_length'], lambda v: f'{v:,.0f}', ' tokens')}")
    parts.append(f"batch {span(ok['batch_size'], lambda v: f'{v:,.0f}')}")
    devices = ", ".join(sorted(ok["device"].dropna().astype(str).unique())) if "device" in ok else ""
    return "; ".join([*parts, devices] if devices else parts)


def _choice(tables: Tables, options: Mapping[str, Any]) -> str:
    rows = tables["fits/surface"]
    ok = rows[rows["status"] == "converged"]
    context = pd.to_numeric(ok["context_length"], errors="coerce").dropna()
    where = (
        f"; laws at context {context.iloc[0]:,.0f} tokens" if len(context) and math.isfinite(context.iloc[0]) else ""
    )
    runs = f"laws of {of_runs(good_runs(tables))}" if "runs" in tables else ""
    return f"{runs}{where}".lstrip("; ")


_FIGURES: dict[str, Callable[[Tables, Mapping[str, Any]], str]] = {
    "loss_vs_flops": _base_runs,
    "study_overview": _planned,
    "loss_map": _all_runs,
    "training_curves": _curves,
    "isoflop_curves": _base_isoflop,
    "isoflop_contexts": _isoflop,
    "compute_optimal": _base_isoflop,
    "power_laws": _isoflop,
    "loss_surface": _base_runs,
    "surface_ratio": _base_runs,
    "overtraining": _ratios,
    "context": _isoflop,
    "sensitivity": _sensitivity,
    "forecasts": _forecasts,
    "length": _length,
    "ttft": _times,
    "step_time": _times,
    "runtime_residuals": _times,
    "roofline": _times,
    "choice": _choice,
}
