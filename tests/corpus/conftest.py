import random
from pathlib import Path

import pytest

from xlstm_scaling.corpus.build import build_tokens

SENTENCE = "the state of this union is strong — our people’s work, naïve café 東京 🚀 1,024 don't we'll\n\n"
WORDS = SENTENCE.split(" ")


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct small documents in several scripts."""
    rng = random.Random(seed)
    return [f"Document {i}. " + " ".join(rng.choices(WORDS, k=rng.randint(5, 120))) for i in range(count)]


def write_txt(folder: Path, texts: list[str]) -> Path:
    """One .txt a document."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(60)


@pytest.fixture(scope="session")
def txt_folder(tmp_path_factory, texts) -> Path:
    return write_txt(tmp_path_factory.mktemp("text"), texts)


@pytest.fixture(scope="session")
def corpus_cfg(txt_folder) -> dict:
    return {"name": "tiny", "path": str(txt_folder), "validation_fraction": 0.1}


@pytest.fixture(scope="session")
def tokenizer_cfg() -> dict:
    return {"name": "bpe", "vocab_size": 300}


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory, corpus_cfg, tokenizer_cfg) -> Path:
    """Tokens of the tiny corpus in many shards, so that documents cross their borders. Do not modify."""
    folder = tmp_path_factory.mktemp("tokens")
    build_tokens({**corpus_cfg, "shard_tokens": 1000}, tokenizer_cfg, folder, progress=False)
    return folder
