"""Codes with a label, written as words: `image p3 p7 class 4`, and read back. Knows no images, no sound, no tokens.

Words("image", "p").labelled([3, 7], "4")   -> "image p3 p7 class 4"     what is seen, then what it is
Words("image", "p").described([3, 7], "4")  -> "class 4 image p3 p7"     what it shall be, then what it looks like
"""

from collections.abc import Sequence
from typing import NamedTuple

CLASS = "class"  # the word before a label


class Example(NamedTuple):
    """One document's words, and the thing that they were made from: all documents of one thing stay on one side."""

    origin: str
    text: str


class Words(NamedTuple):
    """How the codes of one kind of thing are spelled."""

    begin: str  # the word that begins the codes
    letter: str  # stands before each code's number

    def spell(self, codes: Sequence[int]) -> str:
        """The codes alone."""
        return " ".join([self.begin, *(f"{self.letter}{code}" for code in codes)])

    def labelled(self, codes: Sequence[int], label: str) -> str:
        """Codes, then the label: to classify, end at `class`."""
        return f"{self.spell(codes)} {CLASS} {label}"

    def described(self, codes: Sequence[int], label: str) -> str:
        """The label, then the codes: to generate, end at the word that begins them."""
        return f"{CLASS} {label} {self.spell(codes)}"

    def question(self, codes: Sequence[int]) -> str:
        """What a label is the answer to."""
        return f"{self.spell(codes)} {CLASS}"

    def wish(self, label: str) -> str:
        """What codes are the answer to."""
        return f"{CLASS} {label} {self.begin}"

    def read(self, text: str) -> list[int]:
        """The codes in a text; ValueError for a word that is none."""
        wrong = [word for word in text.split() if not self._is_code(word)]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} is no code of an {self.begin}; codes are written {self.letter}0, {self.letter}1, …"
            )
        return [int(word.removeprefix(self.letter)) for word in text.split()]

    def _is_code(self, word: str) -> bool:
        return word.startswith(self.letter) and word.removeprefix(self.letter).isdecimal()
