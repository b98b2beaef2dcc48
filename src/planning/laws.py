"""Loss laws of a study as functions, with their resamples: the loss surface at any context, and the IsoFLOP optima.

The surface is fitted at one context, T0. At another context T it is multiplied by a factor read off the IsoFLOP minima
(N_i, D_i, L_i) of the budgets that both contexts have, S the surface:

    ln c(T) = mean_i ln(L_i / S(N_i, D_i)) at T  -  the same at T0

so c(T0) = 1 and a bias of the surface drops out. Between contexts ln c is linear in ln T; beyond them, the nearest's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import ArrayLike, NDArray

from xlstm_scaling.fitting.loss_surface import SURFACE_FIELDS
from xlstm_scaling.fitting.power_law import minima_draws, minima_lines, refilled_draws
from xlstm_scaling.planning.errors import PlanningError

Array = NDArray[np.float64]
#: surfaces in the order in which they are taken: over-training and IsoFLOP runs together, the outer exponent free
PREFERENCE = tuple((s, f) for s in ("all", "isoflop", "tokenparam") for f in ("gamma_free", "gamma_fixed"))
_CELL = ["arch", "context_length", "isoflop_tag"]
TABLES = ("isoflop", "isoflop_resamples", "surface", "surface_resamples", "surface_predictions")


@dataclass(frozen=True)
class SurfaceLaw:
    """L(N, D, T) = c(T) · (E + (A / N^alpha + B / D^beta)^gamma) [nat/token]; row 0 is the fit, the others resamples.

    params: (1 + R, 6), `SURFACE_FIELDS`. contexts: (m,) ascending [tokens]. log_factors: (1 + R, m), ln c.
    """

    params: Array
    contexts: Array
    log_factors: Array

    @property
    def rows(self) -> int:
        """1 + R: the fit and its resamples."""
        return len(self.params)

    def log_factor(self, context_length: float) -> Array:
        """ln c(T), shape (1 + R,)."""
        x, at = np.log(self.contexts), np.log(context_length)
        right = int(np.clip(np.searchsorted(x, at), 1, max(len(x) - 1, 1)))
        if len(x) == 1:
            return self.log_factors[:, 0]
        share = float(np.clip((at - x[right - 1]) / (x[right] - x[right - 1]), 0.0, 1.0))
        return (1 - share) * self.log_factors[:, right - 1] + share * self.log_factors[:, right]

    def predict(
        self, num_params: ArrayLike, num_tokens: ArrayLike, context_length: float, rows: slice = slice(1)
    ) -> Array:
        """Loss [nat/token], shape (rows, K), of N and D of shape (K,) or (rows, K); default the fit alone."""
        A, B, E, alpha, beta, gamma = (column[:, None] for column in self.params[rows].T)
        n, d = np.log(np.asarray(num_params, dtype=np.float64)), np.log(np.asarray(num_tokens, dtype=np.float64))
        with np.errstate(invalid="ignore"):  # resamples that did not converge
            inner = np.logaddexp(np.log(A) - alpha * n, np.log(B) - beta * d)
        return np.exp(self.log_factor(context_length)[rows, None]) * (E + np.exp(gamma * inner))

    def tokens_for_loss(
        self, num_params: ArrayLike, loss: ArrayLike, context_length: float, rows: slice = slice(1)
    ) -> Array:
        """Tokens D with which N parameters reach the loss, shape (rows, K); inf where no D does."""
        A, B, E, alpha, beta, gamma = (column[:, None] for column in self.params[rows].T)
        n = np.log(np.asarray(num_params, dtype=np.float64))
        reducible = np.asarray(loss) * np.exp(-self.log_factor(context_length)[rows, None]) - E
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            room = np.where(reducible > 0, reducible, np.nan) ** (1 / gamma) - A * np.exp(-alpha * n)
            tokens = np.exp((np.log(B) - np.log(np.where(room > 0, room, np.nan))) / beta)
        known = np.isfinite(self.params[rows]).all(axis=1)[:, None]
        return np.where(known, np.where(np.isnan(tokens), np.inf, tokens), np.nan)

    def floor(self, num_params: ArrayLike, context_length: float) -> Array:
        """Loss of N parameters after endlessly many tokens, by the fit; shape (K,)."""
        return self.predict(num_params, np.full(np.shape(num_params), 1e300), context_length)[0]


@dataclass(frozen=True)
class ArchLaw:
    """What a study knows of one architecture's loss.

    ranges: quantity -> (least, largest) of the runs that the surface was fitted to, and of the contexts with minima.
    lines: context -> variable -> (1 + R, 2), intercept and slope of log10 N*, D*, L* over log10 FLOPs.
    alternatives: other converged surfaces, by "subset, form".
    forecast_error: mean relative error of such a surface on the largest budget when it had not seen it; NaN = unknown.
    """

    arch: str
    subset: str
    form: str
    base_context: int
    surface: SurfaceLaw
    ranges: Mapping[str, tuple[float, float]]
    lines: Mapping[int, Mapping[str, Array]] = field(default_factory=dict)
    alternatives: Mapping[str, SurfaceLaw] = field(default_factory=dict)
    forecast_error: float = float("nan")

    def optimum(self, variable: str, context_length: float) -> tuple[Array | None, str]:
        """(intercept, slope) of N*, D* or L* at a context, (1 + R, 2), and how they were found; None without a law."""
        known = sorted(context for context, laws in self.lines.items() if variable in laws)
        if not known:
            return None, "no power law of this study"
        if context_length in known:
            return self.lines[int(context_length)][variable], f"context {int(context_length):,}"
        below = [context for context in known if context < context_length]
        above = [context for context in known if context > context_length]
        if not below or not above:
            nearest = below[-1] if below else above[0]
            return self.lines[nearest][variable], f"the nearest context with a law, {nearest:,}"
        low, high = below[-1], above[0]
        share = np.log(context_length / low) / np.log(high / low)
        lines = (1 - share) * self.lines[low][variable] + share * self.lines[high][variable]
        return lines, f"between contexts {low:,} and {high:,}, linear in log T"


@dataclass(frozen=True)
class Laws:
    """The laws of a study; ``vocab_size`` and ``runs`` where its table of runs lies beside the fits."""

    source: str
    archs: Mapping[str, ArchLaw]
    confidence: float
    runs: pd.DataFrame | None = None
    notes: tuple[str, ...] = ()


def load_laws(folder: Path, subset: str | None = None, form: str | None = None) -> Laws:
    """The laws in a study's ``fits`` folder; ``subset`` and ``form`` name a surface, default `PREFERENCE`.

    Raises PlanningError: tables are missing, or no surface converged.
    """
    folder = Path(folder)
    if not (folder / "surface.parquet").is_file() and (folder / "fits").is_dir():
        folder = folder / "fits"
    missing = [name for name in TABLES if not (folder / f"{name}.parquet").is_file()]
    if missing or not (folder / "config.yaml").is_file():
        what = ", ".join(f"{name}.parquet" for name in missing) or "config.yaml"
        raise PlanningError(
            f"{folder} lacks {what}: give the folder of the stage `fit` (results/STUDY/fits), made anew"
        )
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}
    if (folder / "forecasts.parquet").is_file():
        tables["forecasts"] = pd.read_parquet(folder / "forecasts.parquet")
    config = yaml.safe_load((folder / "config.yaml").read_text())["fitting"]
    beside = folder.parent / "runs.parquet"
    runs = pd.read_parquet(beside) if beside.is_file() else None
    return laws_of_tables(tables, config, runs, str(folder), subset, form)


def laws_of_tables(
    tables: Mapping[str, pd.DataFrame],
    config: Mapping[str, Any],
    runs: pd.DataFrame | None = None,
    source: str = "tables",
    subset: str | None = None,
    form: str | None = None,
) -> Laws:
    """The laws in the tables `TABLES` (docs/tables.md); see `load_laws`.

    Args:
        tables: by name; ``forecasts`` is used where it is there.
        config: the group `fitting`: seed, confidence, power_law.
        runs: the table of runs, for ranges and shapes.
    """
    main = _main_surfaces(tables["surface"], tables["surface_resamples"])
    chosen, notes = _choose(main, subset, form)
    lines = minima_lines(tables["isoflop"], tables["isoflop_resamples"], config)
    minima = _minima(tables["isoflop"], tables["isoflop_resamples"], config["seed"])
    archs = {}
    for arch, row in chosen.items():
        draws = tables["surface_resamples"]
        same = (draws["arch"] == arch) & (draws["subset"] == row["subset"]) & (draws["form"] == row["form"])
        sampled = draws[same].sort_values("resample")[list(SURFACE_FIELDS)].to_numpy(dtype=np.float64)
        law = _at_contexts(np.vstack([_params(row), sampled]), arch, int(row["context_length"]), minima)
        others = main[(main["arch"] == arch) & (main["status"] == "converged")]
        alternatives = {
            f"{other['subset']}, {other['form']}": _at_contexts(
                _params(other)[None], arch, int(other["context_length"]), minima
            )
            for _, other in others.iterrows()
            if (other["subset"], other["form"]) != (row["subset"], row["form"])
        }
        archs[arch] = ArchLaw(
            arch=arch,
            subset=str(row["subset"]),
            form=str(row["form"]),
            base_context=int(row["context_length"]),
            surface=law,
            ranges=_ranges(tables, runs, row, law.contexts),
            lines={context: found for (name, context), found in lines.items() if name == arch},
            alternatives=alternatives,
            forecast_error=_forecast_error(tables.get("forecasts"), arch, str(row["form"])),
        )
        if len(law.contexts) == 1:
            notes.append(f"{arch}: no minima at other contexts than {law.contexts[0]:g}; its surface holds for all")
    return Laws(source, archs, float(config["confidence"]), runs, tuple(notes))


def _main_surfaces(surface: pd.DataFrame, resamples: pd.DataFrame) -> pd.DataFrame:
    """Rows at the threshold that has the resamples, where there are any."""
    if len(resamples):
        return surface[np.isclose(surface["huber_delta"], float(resamples["huber_delta"].iloc[0]), rtol=1e-9)]
    return surface.drop_duplicates(["arch", "subset", "form"])


def _choose(
    surface: pd.DataFrame, subset: str | None, form: str | None
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The surface of each architecture: the same kind for all if one converged for all, else the first of each."""
    wanted = [(s, f) for s, f in PREFERENCE if subset in (None, s) and form in (None, f)]
    good = surface[surface["status"] == "converged"]
    found = {
        arch: {(row["subset"], row["form"]): row for _, row in group.iterrows()} for arch, group in good.groupby("arch")
    }
    archs = sorted(surface["arch"].unique())
    named = f" (subset {subset or 'any'}, form {form or 'any'})" if subset or form else ""
    if not any(kind in kinds for kinds in found.values() for kind in wanted):
        states = surface["status"].value_counts().to_dict()
        raise PlanningError(
            f"no loss surface{named} converged, statuses: {states}; more runs, or another subset or form"
        )
    common = [kind for kind in wanted if all(kind in found.get(arch, {}) for arch in archs)]
    chosen, notes = {}, []
    for arch in archs:
        kinds = [kind for kind in (common or wanted) if kind in found.get(arch, {})]
        if not kinds:
            notes.append(f"{arch}: no loss surface{named} converged, so it is left out")
            continue
        chosen[str(arch)] = found[arch][kinds[0]]
    if not common and len(chosen) > 1:
        kinds = ", ".join(f"{arch} {row['subset']}/{row['form']}" for arch, row in chosen.items())
        notes.append(f"no kind of surface converged for all architectures; they are compared by {kinds}")
    return chosen, notes


def _params(row: Mapping[str, Any]) -> Array:
    return np.array([float(row[name]) for name in SURFACE_FIELDS])


def _minima(isoflop: pd.DataFrame, resamples: pd.DataFrame, seed: int) -> dict[tuple[str, int], dict[Any, Array]]:
    """(arch, context) -> budget -> (1 + R, 3): N*, D*, L* and their resamples."""
    draws = minima_draws(resamples)
    found: dict[tuple[str, int], dict[Any, Array]] = {}
    for (arch, context, tag), group in isoflop[isoflop["status"] == "ok"].groupby(_CELL):
        cells = group.set_index("variable")
        if not {"num_params", "num_tokens"} <= set(cells.index):
            continue
        columns = []
        for variable in ("num_params", "num_tokens"):
            drawn = refilled_draws(draws, seed, arch, context, tag, variable)
            columns.append(np.vstack([cells.loc[variable, ["x_opt", "loss_opt"]].to_numpy(dtype=np.float64), drawn]))
        sizes, tokens = columns
        found.setdefault((str(arch), int(context)), {})[tag] = np.column_stack([sizes[:, 0], tokens[:, 0], sizes[:, 1]])
    return found


def _at_contexts(
    params: Array, arch: str, base: int, minima: Mapping[tuple[str, int], Mapping[Any, Array]]
) -> SurfaceLaw:
    """A surface with its factors at every context that shares budgets with the base."""
    plain = SurfaceLaw(params, np.array([float(base)]), np.zeros((len(params), 1)))
    here = minima.get((arch, base), {})
    factors = {float(base): np.zeros(len(params))}
    for (name, context), there in minima.items():
        common = [tag for tag in there if tag in here]
        if name != arch or context == base or not common:
            continue
        gaps = [_gap(plain, there[tag], base) - _gap(plain, here[tag], base) for tag in common]
        factors[float(context)] = np.mean(gaps, axis=0)
    contexts = np.array(sorted(factors))
    return SurfaceLaw(params, contexts, np.column_stack([factors[context] for context in contexts]))


def _gap(law: SurfaceLaw, minimum: Array, base: int) -> Array:
    """ln L* - ln S(N*, D*) of each resample; a law without resamples takes the minimum itself."""
    rows = min(law.rows, len(minimum))
    predicted = law.predict(minimum[:rows, :1], minimum[:rows, 1:2], base, slice(rows))[:, 0]
    gap = np.full(law.rows, np.nan)
    gap[:rows] = np.log(minimum[:rows, 2]) - np.log(predicted)
    return gap


def _ranges(
    tables: Mapping[str, pd.DataFrame], runs: pd.DataFrame | None, row: Mapping[str, Any], contexts: Array
) -> dict[str, tuple[float, float]]:
    """Least and largest N, D, D/N, FLOPs [FLOPs] and context [tokens] that the law has seen."""
    seen = tables["surface_predictions"]
    for name in ("arch", "subset", "form"):
        seen = seen[seen[name] == row[name]]
    columns = {"num_params": seen["num_params"], "num_tokens": seen["num_tokens"]}
    columns["tokens_per_param"] = seen["num_tokens"] / seen["num_params"]
    if runs is not None:
        columns["num_flops"] = runs.loc[runs["run_id"].isin(seen["run_id"]), "num_flops"]
    else:
        columns["num_flops"] = tables["isoflop"].loc[tables["isoflop"]["arch"] == row["arch"], "flops_mean"]
    ranges = {name: (float(v.min()), float(v.max())) for name, v in columns.items() if v.notna().any()}
    return ranges | {"context_length": (float(contexts.min()), float(contexts.max()))}


def _forecast_error(forecasts: pd.DataFrame | None, arch: str, form: str) -> float:
    if forecasts is None:
        return float("nan")
    rows = forecasts[(forecasts["arch"] == arch) & (forecasts["law"] == f"surface_{form}") & forecasts["error"].notna()]
    return float(rows["error"].iloc[0]) if len(rows) else float("nan")
