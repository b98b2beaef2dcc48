"""The loss surface's fit against the field's habit: python benchmarks/fitting.py [--runs runs.csv] [--quick]

Measured in one run: (1) the full grid: 2 architectures x 3 sets x 3 ranges of tokens per parameter x 7 thresholds x
gamma in {1, free}, every start; (2) the bootstrap of every cell with delta = 1e-3; (3) seconds of a core per start
against scipy's L-BFGS-B with finite differences, one start after the other (the options of "xLSTM Scaling Laws"), on
the same cells, in turn, one process each; (4) the gap of each cell's objective to the best that scipy's L-BFGS-B with
gradients finds from starts drawn from the grid and from our end points, without any box, and where a fit has not
converged from five times as many, and then on from the best found, again and again. The last line is JSON.

The runs are the paper's where they are at hand (the folder in XLSTM_SCALING_PAPER, or ../shared/paper beside the
checkout); otherwise they are drawn from two planted surfaces on a grid of the same design.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy.optimize import minimize

from xlstm_scaling.fitting import LossSurface
from xlstm_scaling.fitting.resampling import stratified_counts
from xlstm_scaling.fitting.surface_fit import bootstrap_surface, fit_surface_ladder
from xlstm_scaling.fitting.surface_problem import to_eta, to_theta
from xlstm_scaling.fitting.surface_result import FORMS
from xlstm_scaling.fitting.surface_starts import start_grid

ROOT = Path(__file__).resolve().parents[1]
SETS, RANGES = ("all", "tokenparam", "isoflop"), (100.0, 300.0, 5000.0)
DELTAS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0)


def paper_folder():
    """The folder of the paper's runs, or None."""
    folder = Path(os.environ.get("XLSTM_SCALING_PAPER", ROOT.parent / "shared" / "paper"))
    return folder if (folder / "runs.csv").is_file() else None


def load_runs(path):
    """The runs at the context with most of them, and what they are."""
    folder = paper_folder()
    if path is None and folder is None:
        return planted_runs(), "planted"
    path = path or folder / "runs.csv"
    runs = pd.read_parquet(path) if Path(path).suffix == ".parquet" else pd.read_csv(path)
    if "in_paper_640" in runs:
        runs = runs[runs["in_paper_640"]]
    runs = runs.assign(arch=runs["arch"].replace("llama", "transformer"))
    in_both = runs[runs["experiment_set"] == "tokenparam"]["context_length"].mode()[0]
    return runs[runs["context_length"] == in_both], Path(path).name


def planted_runs(seed=0):
    """Runs of two planted surfaces with 0.3 % noise, on budgets and ratios like those of a scaling study."""
    generator = np.random.default_rng(seed)
    surfaces = {
        "transformer": LossSurface(1.6e5, 6.3e5, 1.0, 0.53, 0.51, 0.29),
        "xlstm": LossSurface(2.6e5, 9.6e5, 1.8, 0.65, 0.63, 0.47),
    }
    rows = []
    for arch, surface in surfaces.items():
        points = [("isoflop", f, n) for f in np.geomspace(6e18, 6e20, 7) for n in np.geomspace(1e8, 4e9, 17)]
        points += [("tokenparam", r, n) for r in (22, 44, 110, 220, 550, 1100) for n in np.geomspace(1.5e8, 3e9, 6)]
        for kind, tag, params in points:
            tokens = tag / 6 / params if kind == "isoflop" else tag * params
            loss = float(surface.predict(params, tokens)) * np.exp(0.003 * generator.standard_normal())
            row = {"arch": arch, "experiment_set": kind, "isoflop_tag": str(tag), "num_params": params}
            rows.append(row | {"num_tokens": tokens, "val_loss": loss})
    return pd.DataFrame(rows)


def cells(runs):
    """(key, data) of the 18 sets of runs."""
    ratio = runs["num_tokens"] / runs["num_params"]
    for arch in ("transformer", "xlstm"):
        for subset in SETS:
            for limit in RANGES:
                chosen = (runs["arch"] == arch) & (ratio <= limit)
                if subset != "all":
                    chosen &= runs["experiment_set"] == subset
                yield (arch, subset, limit), runs[chosen]


def columns(data):
    return [data[name].to_numpy(dtype=float) for name in ("num_params", "num_tokens", "val_loss")]


def fit_cell(task):
    """All thresholds of one set of runs and form, and the bootstrap at delta = 1e-3, with seconds of its core."""
    key, form, data, config, resamples, seed = task
    began = time.process_time()
    fits = fit_surface_ladder(*columns(data), config, form=form, deltas=DELTAS)
    grid_s = time.process_time() - began
    tags = data["experiment_set"].astype(str) + data["isoflop_tag"].astype(str)
    counts = stratified_counts(list(tags), resamples, seed, "benchmark", *key, min_distinct=5 + (form == FORMS[1]))
    began = time.process_time()
    _, survivors = bootstrap_surface(fits[DELTAS.index(1e-3)], counts, config)
    return key, form, fits, grid_s, time.process_time() - began, survivors


def paper_objective(theta, n, d, y, delta):
    """The objective as the field writes it."""
    gamma = theta[5] if len(theta) == 6 else 1.0
    inner = np.logaddexp(theta[0] - theta[3] * n, theta[1] - theta[4] * d)
    size = np.abs(y - np.logaddexp(gamma * inner, theta[2]))
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum()


def raw_starts(data, config, dimension):
    n, d, y = (np.log(values) for values in columns(data))
    grid = start_grid(n, d, y, config, dimension, (0.0, 0.0))
    return grid[: int(np.prod([len(config["init_grid"][k]) for k in list(config["init_grid"])[:dimension]]))]


def per_start(data, config, form, delta, num_scipy, seed):
    """Seconds per start, ours and scipy's in turn, and what they reach."""
    dimension = 5 + (form == FORMS[1])
    n, d, y = (np.log(values) for values in columns(data))
    starts = raw_starts(data, config, dimension)
    chosen = starts[np.random.default_rng(seed).choice(len(starts), num_scipy, replace=False)]
    options = {"ftol": 1e-32, "gtol": 1e-32, "maxls": 200}
    ours, theirs, values = [], [], []
    for block in np.array_split(chosen, 2):
        began = time.process_time()
        fit = fit_surface_ladder(*columns(data), config, form=form, deltas=[delta])[0]
        ours.append((time.process_time() - began) / fit.num_starts)
        began = time.process_time()
        for start in block:
            with np.errstate(all="ignore"):
                found = minimize(paper_objective, start, (n, d, y, delta), method="L-BFGS-B", options=options)
            values.append(found.fun)
        theirs.append((time.process_time() - began) / len(block))
    best = min(np.nanmin(values), fit.objective)
    reach = np.mean(np.array(values) <= best * (1 + 1e-3))
    return {
        "form": form, "runs": len(y), "delta": delta,
        "ours_s": float(np.mean(ours)), "scipy_s": float(np.mean(theirs)),
        "ratio": float(np.mean(theirs) / np.mean(ours)),
        "ours_agree_1e-6": fit.num_starts_agree / fit.num_starts,
        "scipy_within_1e-3": float(reach), "scipy_best_over_ours": float(np.nanmin(values) / fit.objective),
    }  # fmt: skip


def gap(task):
    """(objective - best known) / best known of every threshold, the best known from scipy, without a box."""
    key, form, fits, data, config, num_starts, seed = task
    dimension = 5 + (form == FORMS[1])
    starts = raw_starts(data, config, dimension)
    starts = starts[np.random.default_rng(seed).permutation(len(starts))[: 5 * num_starts]]
    rows = []
    for fit in fits:
        if fit.surface is None:
            continue
        problem, centre = fit.problem, fit.centre

        def objective(theta, problem=problem, delta=fit.huber_delta):
            eta = to_eta(theta)
            value, slope, _, _ = problem.derivatives(eta[:, None], delta)
            slope = slope[:, 0].copy()
            if dimension == 6:  # chain rule from eta to theta
                slope[5] += slope[0] * theta[0] + slope[1] * theta[1] + slope[3] * theta[3] + slope[4] * theta[4]
                slope[[0, 1, 3, 4]] *= theta[5]
            return float(value[0]), slope

        hard = fit.status.value != "converged"
        best, place = np.inf, None
        own = [to_theta(eta) for eta in fit.ends[: 6 if hard else 2]]
        shifted = starts[: len(starts) if hard else num_starts].copy()
        shifted[:, 0] -= shifted[:, 3] * centre[0]
        shifted[:, 1] -= shifted[:, 4] * centre[1]
        options = {"ftol": 1e-16, "gtol": 1e-14, "maxiter": 600, "maxls": 50}
        for start in (*own, *shifted, *[None] * (20 if hard else 0)):
            with np.errstate(all="ignore"):
                origin = place if start is None else start
                found = minimize(objective, origin, jac=True, method="L-BFGS-B", options=options)
            if np.isfinite(found.fun) and found.fun < best:
                best, place = float(found.fun), found.x
        rows.append((*key, form, fit.huber_delta, fit.status.value, fit.objective, (fit.objective - best) / best))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="table of runs (.csv or .parquet)")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scipy-starts", type=int, default=6, help="starts of L-BFGS-B with finite differences a cell")
    parser.add_argument("--check-starts", type=int, default=2, help="starts a cell that look for a better objective")
    parser.add_argument("--quick", action="store_true", help="one set of runs of each architecture, 50 resamples")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = yaml.safe_load((ROOT / "conf" / "fitting" / "default.yaml").read_text())["surface"]
    runs, source = load_runs(args.runs)
    sets = list(cells(runs))
    if args.quick:
        sets = [(key, data) for key, data in sets if key[1:] == ("tokenparam", 5000.0)]
    resamples = 50 if args.quick else args.resamples
    largest = sorted(sets, key=lambda item: -len(item[1]))
    tasks = [(key, form, data, config, resamples, args.seed) for form in FORMS[::-1] for key, data in largest]
    by_key = dict(sets)
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(abs, range(args.processes)))
        began = time.perf_counter()
        results = []
        for key, form, found, seconds, boot, survivors in pool.map(fit_cell, tasks):
            results.append((key, form, found, seconds, boot, survivors))
            states = ",".join(fit.status.value for fit in found)
            print(f"{key} {form}: {seconds:.1f} core s, bootstrap {boot:.1f} ({survivors}), {states}", flush=True)
        wall = time.perf_counter() - began
        grid_s, bootstrap_s = (sum(row[k] for row in results) for k in (3, 4))
        fits = [fit for row in results for fit in row[2]]
        starts = sum(fit.num_starts for fit in fits)
        share = grid_s / (grid_s + bootstrap_s)
        print(f"grid {wall * share:.1f} s, bootstrap {wall * (1 - share):.1f} s of wall time", flush=True)
        checks = [(*row[:3], by_key[row[0]], config, args.check_starts, args.seed) for row in results]
        gaps = [line for rows in pool.map(gap, checks) for line in rows]
    for line in sorted(gaps, key=lambda line: -line[-1])[:12]:
        print("gap", line, flush=True)
    pairs = []
    for arch in ("transformer", "xlstm"):
        for form in FORMS:
            subset = "tokenparam" if args.quick or arch == "transformer" else "all"
            pairs.append(per_start(by_key[(arch, subset, 5000.0)], config, form, 1e-3, args.scipy_starts, args.seed))
            print(pairs[-1], flush=True)
    states = pd.Series([fit.status.value for fit in fits]).value_counts().to_dict()
    summary = {
        "runs": source, "cells": len(fits), "starts": starts, "processes": args.processes, "states": states,
        "grid_s": wall * share, "grid_core_s": grid_s, "us_per_start_core": 1e6 * grid_s / max(starts, 1),
        "bootstrap_s": wall * (1 - share), "bootstrap_core_s": bootstrap_s, "resamples": resamples,
        "resamples_converged": sum(row[5] for row in results) / (resamples * len(results)),
        "ratio_per_start": {"smallest": min(p["ratio"] for p in pairs), "pairs": pairs},
        "worst_relative_gap": max(line[-1] for line in gaps),
        "agree_share": sum(fit.num_starts_agree for fit in fits) / max(starts, 1),
    }  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    if "OPENBLAS_NUM_THREADS" not in os.environ:  # read when numpy is loaded; the products are small
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    main()
