"""Nothing is fetched: all models and tokenizers are made here."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


@pytest.fixture(autouse=True)
def one_thread():
    """Small models, and tests that run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
