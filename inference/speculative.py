"""Guesses of what comes next: prompt lookup, and how many to make. Knows no model and no device.

Guessed tokens are computed together with the last one and kept while they are what plain decoding chooses: the token at
a place of the answer is drawn with the key of its seed and that place, guessed or not. So an answer with guesses is the
answer without them, drawn ones too (coupling of draft and target: Daliri et al. 2024, arXiv:2408.07978); what guesses
change is the number of steps.
"""

from collections.abc import Sequence

SIZES = (4, 3, 2)  # tokens at the end of the text that are looked up, the most telling first


UNKNOWN = -1  # a guess that only the device will know


class Pace:
    """How many tokens to guess for each text: one more when all were right, half when none was."""

    def __init__(self, most: int):
        self.most = most
        self._counts: dict[int, int] = {}

    def __getitem__(self, id: int) -> int:
        return self._counts.get(id, self.most)

    def learn(self, id: int, *, guessed: int, right: int) -> None:
        """How the last guesses went."""
        self._counts[id] = min(self.most, self[id] + 1) if right == guessed else max(1, right, self[id] // 2)

    def forget(self, id: int) -> None:
        """The text has ended."""
        self._counts.pop(id, None)


class TextGuesses:
    """Guesses by what followed the same words before."""

    def __init__(self, most: int):
        self._pace = Pace(most)
        self._texts: dict[int, Lookup] = {}

    def guess(self, id: int, tokens: Sequence[int]) -> list[int]:
        """Tokens that may come next in the text of that id, which has only grown since the last time."""
        text = self._texts.setdefault(id, Lookup())
        text.read(tokens)
        return text.after(tokens, self._pace[id])

    def learn(self, id: int, *, guessed: int, right: int) -> None:
        """How the last guesses went."""
        self._pace.learn(id, guessed=guessed, right=right)

    def forget(self, id: int) -> None:
        """The text has ended."""
        self._pace.forget(id)
        self._texts.pop(id, None)


class ModelGuesses:
    """Room for guesses that a model on the device makes."""

    def __init__(self, most: int):
        self._pace = Pace(most)

    def guess(self, id: int, tokens: Sequence[int]) -> list[int]:
        """As many tokens as the model shall guess."""
        return [UNKNOWN] * self._pace[id]

    def learn(self, id: int, *, guessed: int, right: int) -> None:
        """How the last guesses went."""
        self._pace.learn(id, guessed=guessed, right=right)

    def forget(self, id: int) -> None:
        """The text has ended."""
        self._pace.forget(id)


class Lookup:
    """Where a text had the same few tokens before (prompt lookup: Saxena 2023)."""

    def __init__(self):
        self._next: dict[tuple[int, ...], int] = {}  # place of the token that followed, the latest such place
        self._num_read = 1

    def read(self, tokens: Sequence[int]) -> None:
        """Take in what is new; what nothing follows yet waits."""
        for place in range(self._num_read, len(tokens)):
            for size in SIZES:
                if size <= place:
                    self._next[tuple(tokens[place - size : place])] = place
        self._num_read = max(self._num_read, len(tokens))

    def after(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the longest known end.  [7, 1, 2, 3, 9, 1, 2], 2 -> [3, 9]"""
        for size in SIZES:
            place = self._next.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                return list(tokens[place : place + count])
        return []
