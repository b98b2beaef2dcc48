"""Synthetic tables of a small study: runs from a known law, fits simple enough to be read here."""

from itertools import pairwise

import numpy as np
import pandas as pd

LAWS = {  # E, A, alpha, B, beta of L = E + A/N^alpha + B/D^beta
    "xlstm": (1.62, 60.0, 0.33, 92.0, 0.30),
    "transformer": (1.62, 63.0, 0.33, 99.0, 0.30),
    "mamba": (1.62, 61.0, 0.33, 95.0, 0.30),
}
BUDGETS, CONTEXTS, RATIOS = (3e11, 1e12, 3e12), (256, 512, 1024), (22, 110, 550)
BASE = 512


def flops_per_token(arch: str, num_params: float, context: int) -> float:
    """6 N and a share that grows with the context, faster for the Transformer."""
    return 6 * num_params * (1 + context / (9000 if arch != "transformer" else 2500))


def loss(arch: str, num_params: float, num_tokens: float, context: int) -> float:
    """The law, a little better with longer context."""
    e, a, alpha, b, beta = LAWS[arch]
    return e + a / num_params**alpha + b / num_tokens**beta - 0.05 * np.log2(context / 512)


def make_runs(archs=("xlstm", "transformer"), noise: float = 0.006, seed: int = 0) -> pd.DataFrame:
    """IsoFLOP runs at three contexts and token/param runs at the base context; one diverged run an architecture."""
    rng, rows = np.random.default_rng(seed), []

    def add(kind, arch, context, size, tokens, isoflop=None, ratio=None):
        value = loss(arch, size, tokens, context) * np.exp(noise * rng.normal())
        tags = {"isoflop_tag": isoflop, "ratio_tag": ratio, "experiment_set": kind, "status": "ok"}
        shape = {"arch": arch, "context_length": context, "num_params": size, "num_tokens": tokens}
        costs = {"num_flops": flops_per_token(arch, size, context) * tokens, "tokens_per_param": tokens / size}
        losses = {"val_loss": value, "train_loss": value * 0.99, "learning_rate": 1e-3, "seed": 0}
        rows.append({"run_id": f"{arch}-{len(rows):03d}", **shape, **costs, **tags, **losses})

    for arch in archs:
        for context in CONTEXTS:
            for budget in BUDGETS if context == BASE else BUDGETS[1:2]:
                middle = 1.1e5 * (budget / 3e11) ** 0.5 * (1 + 0.1 * (arch == "xlstm"))
                for factor in np.geomspace(0.28, 3.6, 8):
                    size = round(middle * factor)
                    tokens = budget / flops_per_token(arch, size, context)
                    add("isoflop", arch, context, size, tokens, isoflop=budget)
        for ratio in RATIOS:
            for size in (3e4, 9e4, 2.7e5, 8e5):
                add("tokenparam", arch, BASE, size, size * ratio, ratio=float(ratio))
        rows[-1] |= {"status": "diverged", "val_loss": np.nan}
    runs = pd.DataFrame(rows).assign(source="trained", vocab_size=512)
    runs["isoflop_tag"] = runs["isoflop_tag"].astype(float)
    runs["ratio_tag"] = runs["ratio_tag"].astype(float)
    return runs


def _parabola(x, y):
    a, b, c = np.polyfit(x, y, 2)
    return a, b, c, -b / (2 * a), c - b**2 / (4 * a)


def fit_isoflop(runs: pd.DataFrame, resamples: int = 60) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`isoflop` and its resamples."""
    rng, rows, draws = np.random.default_rng(1), [], []
    cells = runs[(runs["status"] == "ok") & runs["isoflop_tag"].notna()]
    for (arch, context, tag), cell in cells.groupby(["arch", "context_length", "isoflop_tag"]):
        for variable in ("num_params", "num_tokens"):
            x, y = np.log10(cell[variable].to_numpy()), cell["val_loss"].to_numpy()
            key = {"arch": arch, "context_length": context, "isoflop_tag": tag, "flops_mean": cell["num_flops"].mean()}
            key["variable"] = variable
            row = key | {"num_runs": len(cell), "x_min": 10 ** x.min(), "x_max": 10 ** x.max(), "detail": ""}
            if len(cell) < 4:
                rows.append(row | {"status": "too_few_runs", "detail": f"{len(cell)} runs, 4 needed"})
                continue
            a, b, c, opt, best = _parabola(x, y)
            status = "ok" if a > 0 and x.min() < opt < x.max() else "no_minimum" if a <= 0 else "outside_range"
            picks = [rng.integers(len(x), size=len(x)) for _ in range(resamples)]
            many = np.array([_parabola(x[p], y[p])[3:] for p in picks if len(set(p)) > 3])
            many = many[(many[:, 0] > x.min() - 0.3) & (many[:, 0] < x.max() + 0.3)]
            row |= {"a": a, "b": b, "c": c, "status": status, "r2": 0.9}
            row |= dict(
                zip(("x_opt", "x_opt_lo", "x_opt_hi"), 10 ** np.r_[opt, np.quantile(many[:, 0], [0.025, 0.975])])
            )
            row |= dict(
                zip(("loss_opt", "loss_opt_lo", "loss_opt_hi"), np.r_[best, np.quantile(many[:, 1], [0.025, 0.975])])
            )
            rows.append(row)
            draws += [key | {"resample": i, "x_opt": 10**o, "loss_opt": v} for i, (o, v) in enumerate(many)]
    columns = ["x_opt", "x_opt_lo", "x_opt_hi", "loss_opt", "loss_opt_lo", "loss_opt_hi", "a", "b", "c"]
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*frame.columns, *(c for c in columns if c not in frame)]), pd.DataFrame(draws)


def fit_powers(isoflop: pd.DataFrame, draws: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`power_laws` and `power_law_bands`, of the budget and of the context."""
    laws, bands = [], []
    groups = [("flops", "flops_mean", "context_length"), ("context_length", "context_length", "isoflop_tag")]
    for predictor, column, other in groups:
        for (arch, fixed, variable), cell in isoflop[isoflop["status"] == "ok"].groupby(["arch", other, "variable"]):
            key = {"arch": arch, "variable": variable, "predictor": predictor, "context_length": np.nan}
            key |= {"isoflop_tag": np.nan, other: fixed}
            row = key | {"num_points": len(cell), "status": "too_few_points", "detail": f"{len(cell)} points, 3 needed"}
            if len(cell) >= 3:
                same = draws[(draws["arch"] == arch) & (draws[other] == fixed) & (draws["variable"] == variable)]
                x = np.log10(cell[column].astype(float))
                fits = [np.polyfit(x, np.log10(cell["x_opt"]), 1)]
                for _, draw in same.groupby("resample"):
                    if len(draw) == len(cell):
                        fits.append(np.polyfit(np.log10(draw[column].astype(float)), np.log10(draw["x_opt"]), 1))
                slope, offset = np.array(fits).T
                lo, hi = np.quantile(slope, [0.025, 0.975])
                row |= {"exponent": slope[0], "exponent_lo": lo, "exponent_hi": hi, "status": "ok", "detail": ""}
                row |= {"log10_coefficient": offset[0]}
                for value in np.geomspace(cell[column].min(), cell[column].max(), 30):
                    line = 10 ** (slope * np.log10(value) + offset)
                    ends = np.quantile(line, [0.025, 0.975])
                    bands.append(
                        key | {"predictor_value": value, "value": line[0], "value_lo": ends[0], "value_hi": ends[1]}
                    )
            laws.append(row)
    laws = pd.DataFrame(laws)
    columns = ["exponent", "exponent_lo", "exponent_hi"]
    base = laws[(laws["predictor"] == "flops") & (laws["status"] == "ok")] if len(laws) else laws
    gaps = []
    for (context, variable), pair in base.groupby(["context_length", "variable"]):
        pair = pair.set_index("arch")
        if {"xlstm", "transformer"} <= set(pair.index):
            gap = pair.loc["xlstm", "exponent"] - pair.loc["transformer", "exponent"]
            gaps.append(
                {
                    "arch": "xlstm - transformer",
                    "context_length": context,
                    "variable": variable,
                    "predictor": "flops",
                    "exponent": gap,
                    "exponent_lo": gap - 0.07,
                    "exponent_hi": gap + 0.07,
                    "status": "ok",
                    "detail": "",
                }
            )
    laws = pd.concat([laws, pd.DataFrame(gaps)], ignore_index=True)
    return laws.reindex(columns=list(dict.fromkeys([*laws.columns, *columns]))), pd.DataFrame(bands)


def fit_surface(runs: pd.DataFrame, laws=LAWS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`surface` (the known law, a little different for each subset, form and δ) and its predictions."""
    rng, rows, predictions = np.random.default_rng(2), [], []
    for arch in runs["arch"].unique():
        e, a, alpha, b, beta = laws[arch]
        for subset in ("all", "tokenparam", "isoflop"):
            for form in ("gamma_fixed", "gamma_free"):
                for delta in (1e-3, 1e-1):
                    share = beta / (alpha + beta) + 0.02 * rng.normal() + 0.05 * (form == "gamma_free")
                    row = {"arch": arch, "context_length": BASE, "subset": subset, "form": form, "huber_delta": delta}
                    row |= {"A": a, "B": b, "E": e, "alpha": alpha, "beta": beta, "gamma": 1.0, "num_runs": 36}
                    row |= {
                        f"{k}_{end}": row[k] * f
                        for k in ("E", "alpha", "beta", "gamma")
                        for end, f in (("lo", 0.94), ("hi", 1.07))
                    }
                    row |= {
                        "exponent_params": share,
                        "exponent_params_lo": share - 0.03,
                        "exponent_params_hi": share + 0.03,
                    }
                    bad = arch == "transformer" and subset == "tokenparam" and form == "gamma_free"
                    rows.append(
                        row | {"status": "bound_hit" if bad else "converged", "detail": "E at its bound" if bad else ""}
                    )
                mine = runs[(runs["arch"] == arch) & (runs["status"] == "ok")]
                value = e + a / mine["num_params"] ** alpha + b / mine["num_tokens"] ** beta
                kept = mine[["arch", "context_length", "run_id", "num_params", "num_tokens", "val_loss"]]
                predictions.append(kept.assign(subset=subset, form=form, predicted_loss=value))
    return pd.DataFrame(rows), pd.concat(predictions, ignore_index=True)


def fit_overtraining(runs: pd.DataFrame) -> pd.DataFrame:
    """`overtraining`."""
    rows = []
    keys = ["arch", "context_length", "ratio_tag"]
    for key, cell in runs[(runs["status"] == "ok") & runs["ratio_tag"].notna()].groupby(keys):
        row = dict(zip(keys, key)) | {"num_runs": len(cell), "detail": ""}
        if len(cell) < 3:
            rows.append(row | {"status": "too_few_runs", "detail": f"{len(cell)} runs, 3 needed"})
            continue
        slope, offset = np.polyfit(np.log(cell["num_flops"]), np.log(cell["val_loss"]), 1)
        ends = {"slope_lo": slope - 0.006, "slope_hi": slope + 0.006}
        rows.append(row | {"slope": slope, "intercept": offset, "status": "ok"} | ends)
    columns = [*keys, "slope", "slope_lo", "slope_hi", "intercept", "num_runs", "status", "detail"]
    return pd.DataFrame(rows).reindex(columns=columns)


def fit_pareto(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`pareto` and `pareto_ratio`."""
    fronts, ratios = [], []
    for (_arch, _context), cell in runs[runs["status"] == "ok"].groupby(["arch", "context_length"]):
        cell = cell.sort_values("num_flops")
        fronts.append(cell[cell["val_loss"] == cell["val_loss"].cummin()])
    front = pd.concat(fronts)[["arch", "context_length", "run_id", "num_flops", "num_params", "num_tokens", "val_loss"]]
    for context, both in front.groupby("context_length"):
        sides = {arch: side.sort_values("val_loss") for arch, side in both.groupby("arch")}
        low = max(side["val_loss"].min() for side in sides.values())
        high = min(side["val_loss"].max() for side in sides.values())
        for value in np.linspace(low, high, 25):
            cost = {a: np.exp(np.interp(value, s["val_loss"], np.log(s["num_flops"]))) for a, s in sides.items()}
            ratio = cost.get("transformer", np.nan) / cost.get("xlstm", np.nan)
            ratios.append(
                {
                    "arch": "xlstm",
                    "other": "transformer",
                    "context_length": context,
                    "val_loss": value,
                    "flops": cost.get("xlstm"),
                    "flops_other": cost.get("transformer"),
                    "flop_ratio": ratio,
                    "flop_ratio_lo": ratio / 1.12,
                    "flop_ratio_hi": ratio * 1.13,
                    "status": "ok",
                }
            )
    return front, pd.DataFrame(ratios)


def make_inference(archs=("xlstm", "transformer"), sizes=(1e5, 4e5, 1e6), longest: int = 13, slow: float = 1.0) -> dict:
    """Measurements that follow overhead + FLOPs / speed, the runtime model and its predictions."""
    rng, rows, predictions, models = np.random.default_rng(3), [], [], []
    for arch in archs:
        quadratic = 1.0 if arch == "transformer" else 0.0
        for k, size in enumerate(sizes):
            size = size * (1.06 if arch == "xlstm" else 1.0)
            for length in [0, *(2**i for i in range(6, longest))]:
                ttft = slow * (1e-3 + 2 * size * length * (1 + quadratic * length / 3000) / 4e10)
                step = slow * (8e-4 + size * 4 / 8e9 + quadratic * length * size**0.5 * 8 / 8e9)
                lost = arch == "transformer" and k == len(sizes) - 1 and length == 2 ** (longest - 1)
                for batch in (1, 8):
                    key = {
                        "arch": arch,
                        "model": f"{arch}-{k}",
                        "num_params": size,
                        "batch_size": batch,
                        "prefill_length": length,
                        "device": "cpu",
                        "dtype": "float32",
                        "num_threads": 2,
                    }
                    row = key | {"status": "out_of_memory" if lost else "ok", "detail": "", "repeats": 5}
                    for quantity, value in (("ttft", ttft), ("step_time", step)):
                        seen = np.nan if lost else value * batch**0.8 * np.exp(0.05 * rng.normal())
                        row |= {f"{quantity}_s": seen, f"{quantity}_s_lo": seen * 0.93, f"{quantity}_s_hi": seen * 1.1}
                        predictions.append(
                            key
                            | {
                                "quantity": quantity,
                                "measured_s": seen,
                                "held_out": k == 1,
                                "predicted_s": value * batch**0.8,
                                "flops": 1.0,
                                "bytes": 1.0,
                            }
                        )
                    rows.append(row)
        for quantity in ("ttft", "step_time"):
            models.append(
                {
                    "arch": arch,
                    "quantity": quantity,
                    "device": "cpu",
                    "mape_fit": 0.052,
                    "status": "ok",
                    "mape_held_out": 0.087,
                    "detail": "",
                    "num_measurements": 40,
                }
            )
    return {
        "inference/measurements": pd.DataFrame(rows),
        "inference/runtime_model": pd.DataFrame(models),
        "inference/runtime_predictions": pd.DataFrame(predictions),
    }


def make_curves(runs: pd.DataFrame, start: float = 6.24) -> pd.DataFrame:
    """Loss curves that fall to the final losses."""
    rng, parts = np.random.default_rng(4), []
    for run in runs[runs["status"] == "ok"].itertuples():
        step = np.arange(1, 301)
        part = step / 300
        ease = 1 + (start / run.val_loss - 1) * ((1 + step / 6) ** -0.8 - 51**-0.8)
        loss_curve = np.minimum(start, run.val_loss * ease * np.exp(0.01 * rng.normal(size=300)))
        value = np.where(step == 300, run.val_loss, np.nan)
        parts.append(
            pd.DataFrame(
                {
                    "run_id": run.run_id,
                    "arch": run.arch,
                    "context_length": run.context_length,
                    "num_params": run.num_params,
                    "isoflop_tag": run.isoflop_tag,
                    "step": step,
                    "tokens": part * run.num_tokens,
                    "flops": part * run.num_flops,
                    "train_loss": loss_curve,
                    "val_loss": value,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def make_length(archs=("xlstm", "transformer")) -> pd.DataFrame:
    """`evaluation/length`: the excess falls within the context; beyond it the second architecture fails."""
    rows = []
    for k, arch in enumerate(archs):
        for context in CONTEXTS:
            edges = [context * 2.0**power for power in range(-7, 4)]
            for low, high in pairwise(edges):
                beyond = max(0.0, np.log2(high / context)) * (0.4 if k == 1 else -0.01)
                excess = 0.0 if high > context else np.nan if high == context else 0.1 * (context / high) ** 0.5
                row = {"arch": arch, "run_id": f"{arch}-{context}", "context_length": context, "num_params": 100_000}
                row |= {"position_min": int(low) + 1, "position_max": int(high), "position": (low * high) ** 0.5}
                row |= {"num_targets": int(9 * (high - low)), "num_documents": 9, "confidence": 0.95}
                row |= {"loss": 3.4 + beyond + np.nan_to_num(excess), "excess": excess + beyond}
                for value, reach in (("loss", 0.1), ("excess", 0.005)):
                    row |= {f"{value}_lo": row[value] - reach, f"{value}_hi": row[value] + reach}
                few = row["num_targets"] < 30
                rows.append(row | {"status": "too_few_tokens" if few else "ok", "detail": "few" if few else ""})
    return pd.DataFrame(rows)


def pad_resamples(draws: pd.DataFrame, resamples: int = 60) -> pd.DataFrame:
    """The resamples of every cell, NaN where one has no minimum, as the stage `fit` writes them."""
    if draws.empty:
        return draws
    keys = ["arch", "context_length", "isoflop_tag", "flops_mean", "variable"]
    full = draws[keys].drop_duplicates().merge(pd.DataFrame({"resample": range(resamples)}), how="cross")
    return full.merge(draws, on=[*keys, "resample"], how="left")


def resample_surface(surface: pd.DataFrame, resamples: int = 60) -> pd.DataFrame:
    """The surfaces at the main δ with E moved a little."""
    rng, names = np.random.default_rng(4), ["arch", "context_length", "subset", "form", "huber_delta"]
    main = surface[np.isclose(surface["huber_delta"], 1e-3)]
    drawn = main[[*names, "A", "B", "E", "alpha", "beta", "gamma"]].merge(
        pd.DataFrame({"resample": range(resamples)}), how="cross"
    )
    return drawn.assign(E=drawn["E"] * (1 + 0.005 * rng.normal(size=len(drawn))))


def make_tables(archs=("xlstm", "transformer"), runs: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """Every table of a study."""
    runs = make_runs(archs) if runs is None else runs
    isoflop, draws = fit_isoflop(runs)
    laws, bands = fit_powers(isoflop, draws)
    surface, predictions = fit_surface(runs)
    pareto, ratio = fit_pareto(runs)
    return {
        "runs": runs,
        "curves": make_curves(runs),
        "fits/isoflop": isoflop,
        "fits/isoflop_resamples": pad_resamples(draws),
        "fits/power_laws": laws,
        "fits/power_law_bands": bands,
        "fits/surface": surface,
        "fits/surface_predictions": predictions,
        "fits/surface_resamples": resample_surface(surface),
        "fits/overtraining": fit_overtraining(runs),
        "fits/pareto": pareto,
        "fits/pareto_ratio": ratio,
        "fits/forecasts": make_forecasts(isoflop),
        "fits/sensitivity": make_sensitivity(laws),
        "evaluation/length": make_length(archs),
        **make_inference(archs),
        **make_roofline(archs),
        "context_scaling": make_context_scaling(archs),
    }


def make_roofline(archs=("xlstm", "transformer")) -> dict[str, pd.DataFrame]:
    """Intensities with a ridge of 20 FLOPs per byte, which prefills cross, and generation with a large batch."""
    rows, crossings = [], []
    for arch in archs:
        key = {
            "arch": arch,
            "model": f"{arch}-2",
            "num_params": 1e6,
            "device": "cpu",
            "dtype": "float32",
            "ridge": 20.0,
        }
        for phase, slope in (("prefill", 0.1), ("generation", 0.01)):
            for batch in (1, 8):
                for length in (64, 1024, 16384):
                    place = {"batch_size": batch, "prefill_length": length}
                    for against in ("context", "batch"):
                        value = slope * batch * (length if phase == "prefill" else 1000) ** 0.8
                        rows.append(key | place | {"phase": phase, "against": against, "intensity": value})
                    rates = {"intensity": value, "time_s": 0.1, "flops_per_s": min(1e10, 5e8 * value) / 3}
                    rows.append(key | place | {"phase": phase, "against": "measured"} | rates)
                for against in ("context", "batch"):
                    found = {"phase": phase, "against": against, "batch_size": batch, "prefill_length": 64}
                    found |= {"crossing": 100.0, "intensity_min": 1.0, "intensity_max": 90.0, "status": "rises"}
                    crossings.append(key | found | {"detail": f"{phase} is bound by computing from 100 on"})
    peaks = {"flops_per_s": 1e10, "bytes_per_s": 5e8}
    about = {"device": "cpu", "dtype": "float32", "source": "measured", "method": "a product", "repeats": 5}
    roofline = pd.DataFrame(rows).assign(flops=1.0, bytes=1.0)
    device = pd.DataFrame([about | {"quantity": name, "value": value} for name, value in peaks.items()])
    tables = {"roofline": roofline, "crossings": pd.DataFrame(crossings), "device": device}
    return {f"inference/{name}": table for name, table in tables.items()}


def make_context_scaling(archs=("xlstm", "transformer")) -> pd.DataFrame:
    """The loss of three sizes at two contexts: a little better at the longer one."""
    rows = []
    for k, arch in enumerate(archs):
        for size in (1e5, 3e5, 9e5):
            first = 4.0 - 0.2 * np.log(size / 1e5) + 0.01 * k
            for context in (256, 1024):
                row = {"arch": arch, "size": "", "num_params": size, "context_length": context, "num_tokens": 20 * size}
                row |= {"run_id": f"{arch}-{size:g}-{context}", "num_flops": 120 * size**2}
                gap = 0.0 if context == 256 else -0.03 - 0.02 * k
                row |= {"val_loss": first + gap, "reference_context": 256, "reference_loss": first}
                row |= {"loss_difference": gap, "params_ratio": 1.0, "tokens_ratio": 1.0, "source": "extra"}
                rows.append(row | {"status": "ok", "detail": ""})
    return pd.DataFrame(rows)


def make_forecasts(isoflop: pd.DataFrame) -> pd.DataFrame:
    """Power laws that miss every other budget, and a surface of each form."""
    rows = []
    here = isoflop[isoflop["variable"] == "num_params"].reset_index(drop=True)
    for i, cell in here.iterrows():
        row = {name: cell[name] for name in ("arch", "context_length", "isoflop_tag", "flops_mean")}
        row |= {"law": "power_law", "num_points": 2, "num_held_out": 1, "status": "ok", "detail": "2 smaller budgets."}
        for quantity, size in (("num_params", 1e5), ("num_tokens", 1e7), ("loss", 3.0)):
            shift = 1.2 if i % 2 else 1.01
            ends = {"predicted": shift * size, "predicted_lo": 0.9 * shift * size, "predicted_hi": 1.1 * shift * size}
            rows.append(
                row | ends | {"quantity": quantity, "observed": size, "error": shift - 1, "coverage": 1.0 - i % 2}
            )
        for law in ("surface_gamma_fixed", "surface_gamma_free"):
            surface = row | {"law": law, "quantity": "val_loss", "predicted": 3.1, "observed": 3.0, "num_held_out": 7}
            rows.append(surface | {"predicted_lo": 3.0, "predicted_hi": 3.2, "error": 0.03, "coverage": 0.5})
    return pd.DataFrame(rows)


def make_sensitivity(laws: pd.DataFrame) -> pd.DataFrame:
    """The exponents again, under every other counting."""
    chosen = laws[(laws["predictor"] == "flops") & (laws["variable"] != "loss")]
    names = ["arch", "context_length", "variable", "exponent", "exponent_lo", "exponent_hi", "num_points", "status"]
    variants = ("flops_6nd", "flops_chinchilla", "flops_tfla", "duplicates")
    return pd.concat([chosen[[*names, "detail"]].assign(variant=variant) for variant in variants], ignore_index=True)


def write_tables(tables: dict[str, pd.DataFrame], folder) -> None:
    """Write tables where a study keeps them."""
    for name, frame in tables.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(path)
