"""Whether the parameters and FLOPs that somebody published are those of the shapes they published."""

from __future__ import annotations

import math

import pandas as pd

from xlstm_scaling.accounting import ModelShape, count_params, training_flops
from xlstm_scaling.published.tables import SHAPE


def check_accounting(runs: pd.DataFrame) -> list[str]:
    """Sentences on runs whose N or FLOPs (convention paper) are not those of their shape.

    Runs without a shape are passed over. N must agree exactly, FLOPs to a relative 1e-12; FLOPs counted otherwise
    (`flops_convention`) are not compared.
    """
    wrong = []
    for _, row in runs.iterrows():
        if (shape := shape_of_run(row)) is None or pd.isna(row["num_params"]):
            continue
        counted = count_params(shape)
        if counted != row["num_params"]:
            wrong.append(f"{row['run_id']}: N = {int(row['num_params']):,}, its shape has {counted:,}")
        recipe = row[["global_batch_size_sequences", "num_train_steps", "num_flops"]]
        if recipe.isna().any() or row["flops_convention"] not in ("paper", "as published"):
            continue
        flops = training_flops(shape, int(row["context_length"]), int(recipe.iloc[0]), int(recipe.iloc[1]))
        if not math.isclose(flops, float(recipe.iloc[2]), rel_tol=1e-12):
            wrong.append(f"{row['run_id']}: {recipe.iloc[2]:.6g} FLOPs, its shape and recipe have {flops:.6g}")
    return wrong


def shape_of_run(row: pd.Series) -> ModelShape | None:
    """The shape of a run of the table; None where a dimension is not published."""
    values = {name: row[name] for name in SHAPE}
    if any(pd.isna(value) for name, value in values.items() if name != "chunk_size"):
        return None
    if values["arch"] == "xlstm" and pd.isna(values["chunk_size"]):
        return None
    numbers = {name: None if pd.isna(value) else int(value) for name, value in values.items() if name != "arch"}
    return ModelShape(arch=values["arch"], **numbers)
