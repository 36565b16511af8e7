"""Which documents are worth training on: filters, exact and near repeats, a report. Knows no files and no tokens."""

import dataclasses
import hashlib
import re
from typing import Any, Literal

SYMBOLS_OUT = re.compile(r"[^\W_]+|\s+")  # what is no symbol
WORDS = re.compile(r"\w+")
SHINGLE = 5  # words
NUM_HASHES = 128  # of a MinHash
NAMED = 3  # dropped documents that a report names for each reason


@dataclasses.dataclass(kw_only=True)
class Report:
    """What became of a source's documents."""

    documents: int = 0  # read
    bytes: int = 0  # read
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # how many for each reason
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # the first of them

    def drop(self, name: str, reason: str) -> None:
        """Count a dropped document."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        named = self.names.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(name)

    def __str__(self) -> str:
        read = f"{self.documents:,} documents, {self.bytes / 1e6:.1f} MB"
        return ", ".join([read, *(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items())])


def content_hash(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def symbol_ratio(text: str) -> float:
    """Share of characters that are neither letters, digits nor blanks: "a += b" -> 1/3."""
    return len(SYMBOLS_OUT.sub("", text)) / max(1, len(text))


def repeat_ratio(text: str) -> float:
    """Share of non-blank lines that an earlier line equals: "a\\nb\\na\\na" -> 1/2."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def flaw(text: str, *, min_chars: int, max_symbol_ratio: float, max_repeat_ratio: float) -> str | None:
    """The filter that a document does not pass, in words; None where it passes all."""
    if not text.strip():
        return "empty"
    if len(text) < min_chars:
        return f"shorter than min_chars={min_chars}"
    if max_symbol_ratio < 1 and symbol_ratio(text) > max_symbol_ratio:
        return f"symbols above max_symbol_ratio={max_symbol_ratio}"
    if max_repeat_ratio < 1 and repeat_ratio(text) > max_repeat_ratio:
        return f"repeated lines above max_repeat_ratio={max_repeat_ratio}"
    return None


class Repeats:
    """Documents seen so far; finds those that repeat one, exactly or nearly.

    Nearly: the Jaccard similarity of their sets of five-word shingles, estimated by MinHash, is at least `threshold`.
    Keeps 16 bytes of each document, and half a kilobyte where `kind` is "near".
    """

    def __init__(self, kind: Literal["none", "exact", "near"], *, threshold: float):
        self._kind = kind
        self._hashes: set[bytes] = set()
        self._near = _NearRepeats(threshold) if kind == "near" else None

    def find(self, text: str, content: bytes) -> str | None:
        """Why the text repeats an earlier one, in words; a text that does not is remembered."""
        if self._kind == "none":
            return None
        if content in self._hashes:
            return "exact repeat"
        if self._near is not None and self._near.repeats(text):
            return "near repeat"
        self._hashes.add(content)
        return None


class _NearRepeats:
    """MinHashes of distinct documents in bands: equal in one band is reason to compare."""

    def __init__(self, threshold: float):
        from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue]

        self._sketch = RMinHash
        self._threshold = threshold
        self._index = RMinHashLSH(threshold=threshold, num_perm=NUM_HASHES, num_bands=num_bands(threshold))
        self._sketches: list[Any] = []

    def repeats(self, text: str) -> bool:
        sketch = self._sketch(num_perm=NUM_HASHES, seed=0)
        sketch.update(shingles(text))
        if any(sketch.jaccard(self._sketches[key]) >= self._threshold for key in self._index.query(sketch)):
            return True
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return False


def shingles(text: str) -> list[str]:
    """Every run of five words, lower-case; all words where there are fewer, the text itself where there are none."""
    words = WORDS.findall(text.lower()) or [text]
    return [" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))]


def num_bands(threshold: float) -> int:
    """Bands of the index: the fewest that find a pair at the threshold with a probability of at least 95 %.

    With b bands of r hashes, a pair of similarity s is found with probability 1 - (1 - s^r)^b.
    """
    for bands in (1, 2, 4, 8, 16, 32, 64):
        if 1 - (1 - threshold ** (NUM_HASHES // bands)) ** bands >= 0.95:
            return bands
    return NUM_HASHES
