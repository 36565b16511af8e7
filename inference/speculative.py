"""Guesses of what comes next, from the text itself: prompt lookup, and how many to make. Knows no model.

Guessed tokens are computed together with the last one and kept while they are what plain decoding chooses: the token at
a place of the answer is drawn with the key of its seed and that place, guessed or not. So an answer with guesses is the
answer without them, drawn ones too (coupling of draft and target: Daliri et al. 2024, arXiv:2408.07978); what guesses
change is the number of steps.
"""

from collections.abc import Sequence

SIZES = (4, 3, 2)  # tokens at the end of the text that are looked up, the most telling first


class Guesser:
    """Guesses for each text as many tokens as have been right of late: one more when all were, half when none was."""

    def __init__(self, most: int):
        self.most = most
        self._texts: dict[int, Lookup] = {}
        self._counts: dict[int, int] = {}

    def guess(self, id: int, tokens: Sequence[int]) -> list[int]:
        """Tokens that may come next in the text of that id, which has only grown since the last time."""
        text = self._texts.setdefault(id, Lookup())
        text.read(tokens)
        return text.after(tokens, self._counts.get(id, self.most))

    def learn(self, id: int, *, guessed: int, right: int) -> None:
        """How the last guesses went."""
        count = self._counts.get(id, self.most)
        self._counts[id] = min(self.most, count + 1) if right == guessed else max(1, right, count // 2)

    def forget(self, id: int) -> None:
        """The text has ended."""
        self._counts.pop(id, None)
        self._texts.pop(id, None)


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
