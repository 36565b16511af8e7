"""Byte-level BPE of text through a table of its words. Knows how GPT-2 cuts words; knows no tokenizer file.

Text repeats its words, so each distinct word is merged once and a text is looked up word by word. This takes a
quarter of the time that `tokenizers` spends on cutting and merging each word anew (docs/design/data.md).
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32

# GPT-2's rule with its \p{L} and \p{N} written out for ASCII, where they mean just this.
ASCII_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
# Elsewhere larger pieces serve: the rule always cuts where a blank follows a non-blank, and never looks back.
PIECE_END = re.compile(r"(?<=[!-~])(?=[ \t-\r])")
MAX_WORDS = 1 << 19  # the table starts anew beyond this, so that its memory is bounded


class _Numbers(dict[str, int]):
    """Numbers words in the order of their first appearance."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


class WordTable:
    """The tokens of every word seen so far."""

    def __init__(self, encode_words: Callable[[list[str]], list[list[int]]]):
        self._encode_words = encode_words
        self._forget()

    def _forget(self) -> None:
        self._numbers = _Numbers()
        self._starts = np.zeros(0, np.int64)  # of each word, in _tokens
        self._lengths = np.zeros(0, np.int64)
        self._tokens = np.zeros(0, np.int32)

    def encode(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """Tokens of each text: what encoding it as a whole gives."""
        if len(self._numbers) > MAX_WORDS:
            self._forget()
        words = [self._number(_cut(text)) for text in texts]
        self._learn(list(self._numbers)[len(self._starts) :])
        return [self._join(numbers) for numbers in words]

    def _number(self, words: list[str]) -> np.ndarray:
        return np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))

    def _learn(self, new: list[str]) -> None:
        tokens = self._encode_words(new)
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        self._starts = np.concatenate([self._starts, len(self._tokens) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        flat = np.array([token for ids in tokens for token in ids], np.int32)
        self._tokens = np.concatenate([self._tokens, flat])

    def _join(self, numbers: np.ndarray) -> np.ndarray:
        """Each word's run of tokens, one after the other."""
        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        return self._tokens[np.arange(total) + np.repeat(self._starts[numbers] - (ends - lengths), lengths)]


def _cut(text: str) -> list[str]:
    """A text in words or pieces that give the same tokens alone as in the text."""
    return ASCII_WORD.findall(text) if text.isascii() else PIECE_END.split(text)
