"""Folders that hold a model: finished runs (``spec.json``) and imported ones (``model.json``), with ``final.ckpt``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.interop.errors import InteropError
from xlstm_scaling.models import LanguageModel, build_model
from xlstm_scaling.study.files import read_json, write_json_atomic
from xlstm_scaling.training.checkpoint import load_file, save_file

IMPORTED, TRAINED, WEIGHTS, TOKENIZER = "model.json", "spec.json", "final.ckpt", "tokenizer.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelDescription:
    """All that is needed to build a model and to hand it on.

    ``options``: of ``build_model``. ``context_length``: that it was trained at [tokens]. ``eos_token``: ends a
    document. ``tokens_id``: of the tokens a run was trained on. ``source``: where it came from, for people.
    """

    shape: ModelShape
    options: dict[str, Any]
    compute_dtype: str = "float32"
    context_length: int | None = None
    eos_token: str | None = None
    eos_token_id: int | None = None
    tokens_id: str | None = None
    source: dict[str, Any] = field(default_factory=dict)


def describe(folder: Path) -> ModelDescription:
    """The model of a run's or an imported folder. FileNotFoundError or InteropError say what the folder lacks."""
    folder = Path(folder)
    if (folder / IMPORTED).is_file():
        content = read_json(folder / IMPORTED)
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise InteropError(
                f"{folder / IMPORTED} has format {version}, this program reads {FORMAT_VERSION}: import the model again"
            )
        return ModelDescription(**content | {"shape": ModelShape(**content["shape"])})
    if not (folder / TRAINED).is_file():
        raise FileNotFoundError(f"{folder} holds neither a run ({TRAINED}) nor an imported model ({IMPORTED})")
    spec = read_json(folder / TRAINED)
    return ModelDescription(
        shape=ModelShape(**spec["shape"]),
        options=spec["model_options"],
        compute_dtype=spec["compute_dtype"],
        context_length=spec["context_length"],
        eos_token=spec["tokens"]["tokenizer"]["eod_token"],
        tokens_id=spec["tokens_id"],
        source={"run_id": folder.name},
    )


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The parameters of a folder by their name in our models, as stored. FileNotFoundError or CheckpointError."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: let the run finish, or import the model again")
    return load_file(path)["model"]


def build_described(description: ModelDescription, compute_dtype: str | None = None) -> LanguageModel:
    """The model of a description on the meta device: no memory, no initialisation."""
    dtype = getattr(torch, compute_dtype or description.compute_dtype)
    with torch.device("meta"):
        return build_model(description.shape, compute_dtype=dtype, **description.options)


def load_model(folder: Path, compute_dtype: str | None = None, device: str = "cpu") -> LanguageModel:
    """The model of a run's or an imported folder with its weights, in fp32, ready for evaluation.

    ``compute_dtype``: of activations, e.g. ``bfloat16``; None takes what the folder says.
    """
    model = build_described(describe(folder), compute_dtype).to_empty(device=device)
    model.load_state_dict(load_weights(folder))
    return model.eval()


def save_model(folder: Path, description: ModelDescription, weights: dict[str, Tensor]) -> None:
    """Write an imported model that ``load_model`` reads; ``model.json`` last, as it makes the folder one."""
    save_file(Path(folder) / WEIGHTS, {"model": weights})
    write_json_atomic(Path(folder) / IMPORTED, {"format_version": FORMAT_VERSION} | asdict(description))


def find_model(name: str, results: Path) -> Path:
    """The folder ``name``, or the run under ``results/runs`` with this id or the only one whose id contains it."""
    folder = Path(name)
    if (folder / TRAINED).is_file() or (folder / IMPORTED).is_file():
        return folder
    runs = sorted(path.parent for path in (Path(results) / "runs").glob(f"*/{TRAINED}"))
    exact = [run for run in runs if run.name == name]
    found = exact or [run for run in runs if run.name.startswith(name)] or [run for run in runs if name in run.name]
    if len(found) == 1:
        return found[0]
    if found:
        raise InteropError(f"{len(found)} runs match {name!r}: " + ", ".join(run.name for run in found[:10]))
    raise FileNotFoundError(f"no folder with a model and no run under {results} matches {name!r} ({len(runs)} runs)")
