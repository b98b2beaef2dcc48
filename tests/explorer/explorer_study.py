"""A study's folder with known laws, runs and a runtime model in which every term counts; of every architecture."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "planning"))
from planted_laws import BASE, CONFIG, SURFACES, make_tables

from xlstm_scaling.accounting import ARCHITECTURES
from xlstm_scaling.fitting.loss_surface import LossSurface
from xlstm_scaling.fitting.runtime_tables import MODEL_COLUMNS, PARAMETERS

THIRD = {"hybrid": LossSurface(A=3.1e5, B=8.0e6, E=1.7, alpha=0.645, beta=0.69, gamma=0.39)}
ALL_SURFACES = SURFACES | {arch: law for arch, law in THIRD.items() if arch in ARCHITECTURES}
#: of a device like an H100, by term
CONSTANTS = {
    "linear_flops": 4e14, "weight_bytes": 2e12, "mixing_flops": 2e14, "scores": 3e12, "state_bytes": 1.5e12,
    "wait": 90.0, "cache": 5e7, "activation_bytes": 1e12,
    "constant": 2e-4, "block": 3e-5, "batched_block": 8e-6, "sequence": 2e-6,
}  # fmt: skip
DEVICE = "the lab's H100"


def runtime_table(device=DEVICE) -> pd.DataFrame:
    rows = []
    for i, arch in enumerate(ALL_SURFACES):
        for j, quantity in enumerate(("ttft", "step_time")):
            constants = {name: CONSTANTS[term] * (1 + 0.1 * i + 0.05 * j) for term, name in PARAMETERS.items()}
            row = {"arch": arch, "quantity": quantity, "device": device, "dtype": "bfloat16", "prefill_logits": "last"}
            row |= constants | {"norm_p": 4.0, "mape_held_out": 0.05, "status": "ok", "detail": ""}
            row |= {"num_params_min": 1e8, "num_params_max": 7e9, "batch_size_min": 1, "batch_size_max": 64}
            rows.append(row | {"prefill_length_min": 1, "prefill_length_max": 16384})
    return pd.DataFrame(rows).reindex(columns=list(MODEL_COLUMNS))


def runs_table(predictions: pd.DataFrame) -> pd.DataFrame:
    runs = predictions[["run_id", "arch", "context_length", "num_params", "num_tokens", "val_loss"]].copy()
    runs["num_flops"] = 6.0 * runs["num_params"] * runs["num_tokens"]
    runs["learning_rate"], runs["global_batch_size_sequences"] = 1e-3, 512
    runs["experiment_set"], runs["status"] = "isoflop", "ok"
    lost = runs.iloc[[0]].assign(run_id="lost", val_loss=np.nan, status="diverged", learning_rate=np.nan)
    return pd.concat([runs, lost], ignore_index=True)


def write_study(folder: Path, converged: bool = True, runtime: bool = True) -> Path:
    """What the stages `runs`, `fit` and `inference` leave."""
    tables = make_tables(surfaces=ALL_SURFACES)
    if not converged:
        tables["surface"]["status"] = "unidentified"
    (folder / "fits").mkdir(parents=True)
    for name, table in tables.items():
        table.to_parquet(folder / "fits" / f"{name}.parquet")
    (folder / "fits" / "config.yaml").write_text(yaml.safe_dump({"fitting": CONFIG}))
    runs_table(tables["surface_predictions"]).to_parquet(folder / "runs.parquet")
    if runtime:
        (folder / "inference").mkdir()
        runtime_table().to_parquet(folder / "inference" / "runtime_model.parquet")
    return folder


__all__ = ["ALL_SURFACES", "BASE", "DEVICE", "runtime_table", "write_study"]
