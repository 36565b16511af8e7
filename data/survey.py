"""The first look at a source: what each document is worth, which are held out, what the text consists of.

Knows no tokens. What it finds is small beside the text: a few numbers for each document, and a sample.
"""

import array
import enum
import hashlib
import heapq
from typing import NamedTuple

import numpy as np

from data.config import DataConfig, SourceConfig
from data.quality import Repeats, Report, content_hash, flaw
from data.sources import Document, read_with_progress

SAMPLE_CHARS = 2_000_000  # of each source, to train a BPE on
SEGMENT_CHARS = 1 << 16  # the sample is made of segments of this size


class Fate(enum.IntEnum):
    """What becomes of a document or a part of one."""

    DROPPED = 0
    TRAIN = 1
    VALID = 2
    CUT = 3  # its beginning trains, its end is held out


class Survey(NamedTuple):
    """What the first pass finds out about a source."""

    content: str  # hash of all documents
    fates: bytes  # of each document or part, in order
    cut: int  # characters of the cut document that train
    is_lone: bool  # one text in two pieces, which neither begins nor ends
    sample: list[str]  # segments of text
    characters: str  # every character that is kept, sorted
    words: frozenset[str]  # every word that is kept
    report: Report


def survey(source: SourceConfig, config: DataConfig, repeats: Repeats) -> Survey:
    """The first pass over a source: what each document is worth, and what is in it.

    `repeats` has seen the sources before it, so that a document counts once in a mixture.
    """
    report, sample = Report(), _Sample(SAMPLE_CHARS if config.tokenizer == "bpe" else 0)
    digest, characters, words = hashlib.blake2b(digest_size=16), set[str](), set[str]()
    kept, starts, lengths, places = bytearray(), bytearray(), array.array("q"), array.array("Q")
    for document in read_with_progress(source, "reading"):
        content = content_hash(document.text)
        digest.update(mark(document, content))
        reason = _reason_to_drop(document, content, repeats, config)
        report.documents += document.starts
        report.bytes += len(document.text.encode())
        kept.append(reason is None)
        starts.append(document.starts)
        lengths.append(len(document.text))
        places.append(int.from_bytes(_place(document, content)[:8]))
        if reason is not None:
            report.drop(document.name, reason)
            continue
        sample.add(document.text, content)
        if config.tokenizer == "char":
            characters.update(document.text)
        if config.tokenizer == "words":
            words.update(document.text.split())
    if not any(kept):
        raise ValueError(f"{source.path} leaves no document to train on: {report}")
    parts = _Parts(*(np.array(column) for column in (kept, starts, lengths, places)))
    fates, cut = _decide(parts, config, source)
    return Survey(
        content=digest.hexdigest(),
        fates=fates.astype(np.uint8).tobytes(),
        cut=cut,
        is_lone=Fate.CUT in fates and parts.num_texts == 1,
        sample=sample.segments(),
        characters="".join(sorted(characters)),
        words=frozenset(words),
        report=report,
    )


def mark(document: Document, content: bytes) -> bytes:
    """What the hash of a source takes in of each document."""
    return content + bytes([document.starts, document.ends])


def _place(document: Document, content: bytes) -> bytes:
    """What decides whether a document is held out: its content, or the origin that it shares with others."""
    return content_hash(document.origin) if document.origin else content


def _reason_to_drop(document: Document, content: bytes, repeats: Repeats, config: DataConfig) -> str | None:
    """Why a document is not used; parts of a long text always are."""
    if not (document.starts and document.ends):
        return None
    rules = {name: getattr(config, name) for name in ("min_chars", "max_symbol_ratio", "max_repeat_ratio")}
    return flaw(document.text, **rules) or repeats.find(document.text, content)


class _Sample:
    """Segments of the text, chosen by their hashes, of `budget` characters at most or just above."""

    def __init__(self, budget: int):
        self._budget, self._size = budget, 0
        self._heap: list[tuple[int, str]] = []  # the largest hash, negated, is on top

    def add(self, text: str, content: bytes) -> None:
        """Offer a text."""
        for at in range(0, len(text) if self._budget else 0, SEGMENT_CHARS):
            place = hashlib.blake2b(content + at.to_bytes(8), digest_size=8).digest()
            segment = text[at : at + SEGMENT_CHARS]
            heapq.heappush(self._heap, (-int.from_bytes(place), segment))
            self._size += len(segment)
            while self._size - len(self._heap[0][1]) >= self._budget:
                self._size -= len(heapq.heappop(self._heap)[1])

    def segments(self) -> list[str]:
        """What was chosen."""
        return [segment for _, segment in sorted(self._heap)]


class _Parts(NamedTuple):
    """The documents of a source, or parts of them, as columns."""

    kept: np.ndarray
    starts: np.ndarray  # whether it is the first part of its text
    lengths: np.ndarray  # characters
    places: np.ndarray  # by content or origin, uniform

    @property
    def num_texts(self) -> int:
        return int((self.starts & self.kept).sum())


def _decide(parts: _Parts, config: DataConfig, source: SourceConfig) -> tuple[np.ndarray, int]:
    """Which documents train and which are held out: by content, or by place where the fraction makes no whole document.

    The content rule moves no document when others come or go, save those at the border; equal texts stay together, and
    so do the documents of one origin.
    """
    fates = np.where(parts.kept, Fate.TRAIN, Fate.DROPPED)
    if not config.valid_fraction:
        return fates, 0
    if config.split == "tail" or (config.split == "auto" and parts.num_texts * config.valid_fraction < 1):
        return _decide_by_place(fates, parts, config.valid_fraction)
    if parts.num_texts < 2:
        raise ValueError(
            f"data.split=document needs at least 2 documents to hold one out, {source.path} has {parts.num_texts}; "
            "set data.split=tail or data.valid_fraction=0"
        )
    first = np.flatnonzero(parts.starts)
    candidates = np.sort(parts.places[first[parts.kept[first] == 1]])
    count = min(len(candidates) - 1, max(1, round(len(candidates) * config.valid_fraction)))
    held_out = parts.places[first] <= candidates[count - 1]
    fates[(fates == Fate.TRAIN) & held_out[np.cumsum(parts.starts, dtype=np.int64) - 1]] = Fate.VALID
    return fates, 0


def _decide_by_place(fates: np.ndarray, parts: _Parts, valid_fraction: float) -> tuple[np.ndarray, int]:
    """Hold out the last `valid_fraction` of all characters."""
    lengths = np.where(parts.kept, parts.lengths, 0)
    ends = np.cumsum(lengths)
    border = int(ends[-1] * (1 - valid_fraction))
    begins = ends - lengths
    fates = np.where((fates == Fate.TRAIN) & (begins >= border), Fate.VALID, fates)
    crossing = np.flatnonzero((fates == Fate.TRAIN) & (ends > border))
    fates[crossing] = Fate.CUT
    return fates, border - int(begins[crossing[0]]) if len(crossing) else 0
