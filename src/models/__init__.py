"""The models, by the name that configs and tables use."""

from __future__ import annotations

from typing import Any

from xlstm_scaling.accounting import ModelShape
from xlstm_scaling.models.hybrid import Hybrid
from xlstm_scaling.models.language_model import LanguageModel
from xlstm_scaling.models.transformer import Transformer
from xlstm_scaling.models.xlstm import XLSTM

MODELS: dict[str, type[LanguageModel]] = {"xlstm": XLSTM, "transformer": Transformer, "hybrid": Hybrid}


def build_model(shape: ModelShape, **options: Any) -> LanguageModel:
    """The model of ``shape.arch`` with the options of ``LanguageModel`` and of its blocks.

    Raises ValueError for an architecture that has no model.
    """
    if shape.arch not in MODELS:
        raise ValueError(f"no model for architecture {shape.arch!r}; known: {', '.join(MODELS)}")
    return MODELS[shape.arch](shape, **options)


__all__ = ["MODELS", "LanguageModel", "build_model"]
