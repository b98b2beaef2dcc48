"""Byte-level BPE word by word: every distinct word is encoded once, the rest are looked up.

Text repeats its words: the merges of a word are worth remembering, and arrays of tokens then come out of two index
operations instead of one object a word. The tokens are those of the whole text, since GPT-2's pre-tokenizer never lets
a merge cross a word.
"""

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from tokenizers import Tokenizer

MAX_WORDS = 1 << 19  # kept at most; with their strings about 100 MB
MAX_TOKENS = 1 << 22  # of the words kept

# Between a visible character and white space the GPT-2 pattern of the ByteLevel pre-tokenizer always ends a word, and
# it never looks back: pieces cut here give the tokens of the whole.
SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n\r\t])")

# GPT-2's pattern for ASCII text; `re` has no \p{L}, and its \s has more control characters
_SPACE = r"\t\n\x0b\x0c\r "
_VISIBLE = rf"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^{_SPACE}A-Za-z0-9]+"
_WORD = re.compile(rf"{_VISIBLE}|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+")


def is_cuttable(state: Mapping[str, Any]) -> bool:
    """Whether SAFE_CUT holds: GPT-2's pre-tokenizer, at most NFC before it, no added token across a cut.

    state: the content of a tokenizer.json.
    """
    pre_tokenizer = state["pre_tokenizer"] or {}
    return (
        pre_tokenizer.get("type") == "ByteLevel"
        and not pre_tokenizer["add_prefix_space"]
        and pre_tokenizer.get("use_regex", True)
        and (state["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and not any(
            token["lstrip"] or token["rstrip"] or SAFE_CUT.search(token["content"]) for token in state["added_tokens"]
        )
    )


def is_word_wise(state: Mapping[str, Any]) -> bool:
    """Whether `WordEncoder` gives the tokens of the whole: cuttable, BPE without dropout, plain added tokens.

    Special tokens in the text are ordinary text; they must not overlap with other added tokens.
    """
    special = {letter for token in state["added_tokens"] if token["special"] for letter in token["content"]}
    plain = [token for token in state["added_tokens"] if not token["special"]]
    return (
        is_cuttable(state)
        and state["model"]["type"] == "BPE"
        and not state["model"].get("dropout")
        and len({token["normalized"] for token in plain}) < 2
        and not any(token["single_word"] or special & set(token["content"]) for token in plain)
    )


class WordEncoder:
    """Encodes texts with a tokenizer that `is_word_wise`.

    tokenizer: with `encode_special_tokens`, so that special tokens in the text are ordinary text; state: its content;
    eod_id: ends every text.
    """

    def __init__(self, tokenizer: Tokenizer, state: Mapping[str, Any], eod_id: int) -> None:
        self._tokenizer = tokenizer
        plain = [token["content"] for token in state["added_tokens"] if not token["special"]]
        self._added, self._word = _patterns([content for content in plain if content.isascii()])
        self._eod_id = eod_id
        self._forget()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, int64 (n,), ending with `eod_id`. A text of any length; memory grows with all."""
        if len(self._words) > MAX_WORDS or self._tokens.size > MAX_TOKENS:
            self._forget()
        lookup = self._words.__getitem__
        indices = []
        for text in texts:
            words = self._split(text)
            words.append("")  # the end of the document
            indices.append(np.fromiter(map(lookup, words), dtype=np.int64, count=len(words)))
        self._learn()
        return [self._gather(words) for words in indices]

    def _forget(self) -> None:
        self._words = _Words({"": 0})
        self._tokens = np.array([self._eod_id])  # of all words, one after the other
        self._starts, self._lengths = np.array([0]), np.array([1])  # (words,)

    def _learn(self) -> None:
        """Encode the words that were met for the first time."""
        if not self._words.new:
            return
        encodings = self._tokenizer.encode_batch_fast(self._words.new, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.array([len(tokens) for tokens in ids])
        starts = self._tokens.size + np.cumsum(lengths) - lengths
        self._tokens = np.append(self._tokens, np.fromiter((token for tokens in ids for token in tokens), np.int64))
        self._starts, self._lengths = np.append(self._starts, starts), np.append(self._lengths, lengths)
        self._words.new = []

    def _gather(self, words: np.ndarray) -> np.ndarray:
        """Tokens of a text from the indices of its words, (words,)."""
        lengths = self._lengths[words]
        ends = np.cumsum(lengths)
        return self._tokens[np.repeat(self._starts[words] - (ends - lengths), lengths) + np.arange(ends[-1])]

    def _split(self, text: str) -> list[str]:
        """Words of a text; where it is not ASCII, what lies between two safe cuts counts as a word."""
        if text.isascii():
            return self._ascii_words(text)
        words: list[str] = []
        for ascii_only, group in groupby(SAFE_CUT.split(text), str.isascii):
            pieces = list(group)
            words += self._ascii_words("".join(pieces)) if ascii_only else pieces
        return words

    def _ascii_words(self, text: str) -> list[str]:
        if self._added is None:
            return self._word.findall(text)
        words: list[str] = []
        for number, part in enumerate(self._added.split(text)):  # added tokens at odd places
            if number % 2:
                words.append(part)
            elif part:
                words += self._word.findall(part)
        return words


class _Words(dict):
    """Word -> index; words that are not there get the next one and are noted in `new`."""

    def __init__(self, known: dict[str, int]) -> None:
        super().__init__(known)
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        index = self[word] = len(self)
        self.new.append(word)
        return index


def _patterns(added: list[str]) -> tuple[re.Pattern[str] | None, re.Pattern[str]]:
    """A pattern of one group that finds added tokens as the library does, leftmost and then longest, and one that finds
    the words between them. Runs of spaces (GPT-NeoX: 2 to 24) need no pattern of their own, which is much faster."""
    lengths = sorted(len(content) for content in added)
    if not added:
        return None, _WORD
    if set("".join(added)) == {" "} and lengths == list(range(2, lengths[-1] + 1)):
        space = rf"(?:[{_SPACE[:-1]}]| (?! ))+"  # up to a run
        return None, re.compile(rf"{_VISIBLE}| {{2,{lengths[-1]}}}|{space}(?![^{_SPACE}])|{space}")
    longest_first = sorted(added, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})"), _WORD
