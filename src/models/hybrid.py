"""The hybrid: mLSTM blocks with one attention block in k; ``accounting/hybrid.py`` says which."""

from __future__ import annotations

from typing import ClassVar

from xlstm_scaling.models.language_model import LanguageModel
from xlstm_scaling.models.transformer import TransformerBlock
from xlstm_scaling.models.xlstm import XLSTMBlock


class Hybrid(LanguageModel):
    """The hybrid language model; options: those of both kinds of block."""

    kinds: ClassVar = {"xlstm": XLSTMBlock, "transformer": TransformerBlock}
