"""Tables of a study whose laws are known: surfaces, factors of contexts, and the minima that follow from both."""

from dataclasses import astuple, replace

import numpy as np
import pandas as pd

from xlstm_scaling.fitting.loss_surface import SURFACE_FIELDS, LossSurface
from xlstm_scaling.fitting.tables import make_table

SURFACES = {
    "transformer": LossSurface(A=4.3e5, B=2.6e7, E=1.55, alpha=0.64, beta=0.73, gamma=0.343),
    "xlstm": LossSurface(A=2.6e5, B=9.6e5, E=1.82, alpha=0.65, beta=0.626, gamma=0.468),
}
FACTORS = {2048: 0.985, 8192: 1.0, 16384: 1.012}
BASE, BUDGETS, RESAMPLES = 8192, (6e18, 3e19, 1e20), 40
CONFIG = {"seed": 0, "confidence": 0.95, "power_law": {"flops_range": [None, None], "min_points": 2}}


def make_tables(spread: float = 0.004, surfaces=SURFACES, factors=FACTORS) -> dict[str, pd.DataFrame]:
    """The tables of `planning.laws.TABLES`; resamples move E by ``spread`` (relative), all else is exact."""
    rng = np.random.default_rng(3)
    surface, draws, minima, resamples, seen = [], [], [], [], []
    starts = {"num_starts": 1, "num_starts_agree": 1}
    for arch, law in surfaces.items():
        key = {"arch": arch, "context_length": BASE, "subset": "all", "form": "gamma_free", "huber_delta": 1e-3}
        row = dict(zip(SURFACE_FIELDS, astuple(law)))
        surface.append(key | row | {"status": "converged", "rmse_log": 0.005, "num_runs": 90} | starts)
        for r in range(RESAMPLES):
            moved = replace(law, E=law.E * (1 + spread * rng.normal()))
            draws.append(key | {"resample": r} | dict(zip(SURFACE_FIELDS, astuple(moved))))
        for i, size in enumerate(np.geomspace(8e7, 7e9, 30)):
            tokens = size * (5, 20, 80)[i % 3]
            run = {"run_id": f"{arch}-{i}", "num_params": size, "num_tokens": tokens}
            losses = {"val_loss": float(law.predict(size, tokens)), "predicted_loss": float(law.predict(size, tokens))}
            seen.append({name: key[name] for name in ("arch", "context_length", "subset", "form")} | run | losses)
        for context, factor in factors.items():
            for budget in BUDGETS:
                size, tokens = (float(value) for value in law.compute_optimal(budget))
                loss = factor * float(law.predict(size, tokens))
                for variable, optimum in (("num_params", size), ("num_tokens", tokens)):
                    cell = {"arch": arch, "context_length": context, "isoflop_tag": budget, "flops_mean": budget}
                    cell |= {"variable": variable}
                    counts = {"num_runs": 8, "resamples_ok": RESAMPLES}
                    minima.append(cell | {"x_opt": optimum, "loss_opt": loss, "status": "ok"} | counts)
                    for r in range(RESAMPLES):
                        resamples.append(cell | {"resample": r, "x_opt": optimum, "loss_opt": loss})
    labels = pd.DataFrame({"isoflop_tag": [1.0], "ratio_tag": [1.0]})
    parts = {"surface": surface, "surface_resamples": draws, "isoflop": minima, "isoflop_resamples": resamples}
    return {name: make_table(name, rows, labels) for name, rows in (parts | {"surface_predictions": seen}).items()}


def write_fits(folder) -> None:
    """The tables as the stage `fit` leaves them."""
    import yaml

    folder.mkdir(parents=True)
    for name, table in make_tables().items():
        table.to_parquet(folder / f"{name}.parquet")
    (folder / "config.yaml").write_text(yaml.safe_dump({"fitting": CONFIG}))
