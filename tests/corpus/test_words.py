import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from xlstm_scaling.corpus import words
from xlstm_scaling.corpus.settings import TokenizerSettings
from xlstm_scaling.corpus.tokenizer import parse_tokenizer, train_tokenizer
from xlstm_scaling.corpus.words import is_word_wise

SETTINGS = TokenizerSettings.of({"vocab_size": 320})
PIECES = [
    *"abIs'\x00\x1c\x0b\x7f.,09_é東\u0301\u3000\x85\u200b² \n\t",
    *("  ", "\r\n", "'ll", "n't", "<|endoftext|>"),
]


@pytest.fixture(scope="module", params=["trained", "spaces", "added"])
def bpe(request, texts):
    """A trained tokenizer; with runs of spaces and NFC, as GPT-NeoX's; with other added tokens."""
    trained = train_tokenizer(texts, SETTINGS)
    if request.param == "trained":
        return trained
    tokenizer = Tokenizer.from_buffer(trained.content)
    if request.param == "spaces":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 25)])
        state = json.loads(tokenizer.to_str())
        state["normalizer"] = {"type": "NFC"}
        return parse_tokenizer(json.dumps(state).encode(), SETTINGS, "it")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("ab", "aba", "\n\n", "é.", "_b")])
    return parse_tokenizer(tokenizer.to_str().encode(), SETTINGS, "it")


def whole(bpe, text):
    return [*bpe._tokenizer.encode(text, add_special_tokens=False).ids, bpe.eod_id]


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=40), max_size=5))
@settings(max_examples=80, deadline=None)
def test_word_by_word_gives_the_tokens_of_the_whole(bpe, some):
    assert bpe._words is not None
    assert [tokens.tolist() for tokens in bpe.encode(some)] == [whole(bpe, text) for text in some]


def test_every_pair_of_ascii_characters(bpe):
    letters = [chr(code) for code in range(128)]
    some = ["".join(itertools.chain.from_iterable((a, b, "x") for b in letters)) for a in letters]
    some += [f"{a}{b}" for a in letters for b in " \n'a"] + [f"a {a} {a}{a}  {a}" for a in letters]
    for text, tokens in zip(some, bpe.encode(some)):
        np.testing.assert_array_equal(tokens, whole(bpe, text))


def test_words_are_forgotten_when_they_are_too_many(bpe, texts, monkeypatch):
    expected = [tokens.tolist() for tokens in bpe.encode(texts)]
    for name in ("MAX_WORDS", "MAX_TOKENS"):
        monkeypatch.setattr(words, name, 3)
        assert [tokens.tolist() for text in texts for tokens in bpe.encode([text])] == expected
        assert len(bpe._words._words) < 500
        monkeypatch.undo()


def test_tokenizers_of_other_kinds_are_left_to_the_library(texts):
    trained = train_tokenizer(texts, SETTINGS)
    state = json.loads(trained.content)
    assert is_word_wise(state)
    model = state["model"]
    token = {"id": 320, "content": "ab", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    plain, special = token | {"special": False}, token | {"special": True}
    for change in (
        {"model": {**model, "dropout": 0.1}},
        {"model": {**model, "type": "WordPiece"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {**state["pre_tokenizer"], "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [plain | {"single_word": True}]},
        {"added_tokens": [plain | {"rstrip": True}]},
        {"added_tokens": [plain, special | {"content": "<ab>"}]},
        {"added_tokens": [plain, plain | {"content": "cd", "normalized": False}]},
    ):
        assert not is_word_wise({**state, **change}), change
    tokenizer = Tokenizer.from_buffer(trained.content)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    other = parse_tokenizer(tokenizer.to_str().encode(), SETTINGS, "it")
    assert other._words is None
    assert [tokens.tolist() for tokens in other.encode(texts)] == [whole(other, text) for text in texts]
