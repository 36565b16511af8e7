"""Batches of translation pairs: encoded once, sorted into buckets of like length, shuffled, resumable. Knows no files.

A bucket of edge e holds rows of e slots on both sides. Its batches have batch_size * (seq_len // e) rows, so that every
batch has about batch_size * seq_len slots a side, and as many rows as batch_size divides.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from data.config import PairsConfig, bucket_edges
from data.cursor import check_order
from data.pairs import Pair, read_pairs
from data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    char_with_ends,
    fingerprint,
    train_bpe,
)

Part = Callable[[int], Sequence[int]]  # the rows that a host reads, of a batch of so many


class PairBatch(NamedTuple):
    """B rows on one host, as numpy arrays; a row without a pair is padding alone."""

    source: Int32[np.ndarray, "B S"]  # source tokens and eos, then padding 0
    source_mask: Float32[np.ndarray, "B S"]  # 1 where a source token stands
    tokens: Int32[np.ndarray, "B T"]  # bos and target tokens
    targets: Int32[np.ndarray, "B T"]  # target tokens and eos
    mask: Float32[np.ndarray, "B T"]  # 1 where the target counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Token sequences one after the other."""

    tokens: Int32[np.ndarray, " tokens"]  # of all
    offsets: Int64[np.ndarray, " borders"]  # where each sequence starts, and the end of the last

    @property
    def lengths(self) -> Int64[np.ndarray, " texts"]:
        """Tokens of each."""
        return np.diff(self.offsets)

    def each(self) -> list[list[int]]:
        """Each text's tokens."""
        return [self.tokens[start:end].tolist() for start, end in itertools.pairwise(self.offsets.tolist())]

    def rows(
        self, picks: Int64[np.ndarray, " B"], *, width: int, skip: int, leave: int
    ) -> tuple[Int32[np.ndarray, "B width"], Bool[np.ndarray, "B width"]]:
        """The picked sequences without their first `skip` and last `leave` tokens, padded, and where they stand.

        A pick of -1 is an empty row.
        """
        starts = self.offsets[picks] + skip
        sizes = np.where(picks < 0, 0, self.offsets[picks + 1] - leave - starts)
        slots = np.arange(width)
        stands = slots < sizes[:, None]
        at = np.minimum(starts[:, None] + slots, len(self.tokens) - 1)
        return np.where(stands, self.tokens[at], np.int32(0)), stands


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedPairs:
    """Pairs as tokens."""

    sources: Texts  # tokens and eos
    targets: Texts  # bos, tokens and eos

    def __len__(self) -> int:
        return len(self.sources.offsets) - 1

    @functools.cached_property
    def needs(self) -> Int64[np.ndarray, " pairs"]:
        """The slots that the longer side of each pair fills."""
        return np.maximum(self.sources.lengths, self.targets.lengths - 1)

    def read(self, picks: Int64[np.ndarray, " B"], *, width: int) -> PairBatch:
        """Pairs by number as rows; -1 is an empty row."""
        source, source_stands = self.sources.rows(picks, width=width, skip=0, leave=0)
        tokens, _ = self.targets.rows(picks, width=width, skip=0, leave=1)
        targets, stands = self.targets.rows(picks, width=width, skip=1, leave=0)
        return PairBatch(source, source_stands.astype(np.float32), tokens, targets, stands.astype(np.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCorpus:
    """Everything that is known of a run's pairs when training starts."""

    name: str  # where the pairs are from
    source_tokenizer: Tokenizer
    tokenizer: Tokenizer  # the target's; the same object where both share one
    train: EncodedPairs
    valid: EncodedPairs
    valid_texts: tuple[Pair, ...]
    test_texts: tuple[Pair, ...]  # in no batch
    report: str  # what became of the pairs
    key: str  # equal keys mean equal tokens
    buckets: tuple[int, ...]  # row lengths below seq_len
    seed: int  # of the order of pairs

    def describe(self) -> list[str]:
        """What there is to learn from."""
        sources, targets = len(self.train.sources.tokens), len(self.train.targets.tokens) - len(self.train)
        own, other = f"{self.source_tokenizer.vocab_size:,}", f"{self.tokenizer.vocab_size:,}"
        is_shared = self.source_tokenizer is self.tokenizer
        return [
            f"{self.name}: {self.report}",
            f"{sources:,} source tokens and {targets:,} target tokens train, "
            + (f"in one vocabulary of {own}" if is_shared else f"in vocabularies of {own} and {other}"),
        ]


def prepare_pairs(config: PairsConfig, *, seed: int) -> PairCorpus:
    """Read a run's pairs, make their tokenizers, and encode them."""
    texts = read_pairs(config)
    everything = [*texts.train, *texts.valid, *texts.test]
    source_tokenizer, tokenizer = _make_tokenizers(config, texts.train, everything)
    train, valid = (_encode_pairs(source_tokenizer, tokenizer, part) for part in (texts.train, texts.valid))
    return PairCorpus(
        name=config.path,
        source_tokenizer=source_tokenizer,
        tokenizer=tokenizer,
        train=train,
        valid=valid,
        valid_texts=tuple(texts.valid),
        test_texts=tuple(texts.test),
        report=texts.report(),
        key=_key(source_tokenizer, tokenizer, train, valid),
        buckets=config.buckets,
        seed=seed,
    )


def _make_tokenizers(config: PairsConfig, train: list[Pair], everything: list[Pair]) -> tuple[Tokenizer, Tokenizer]:
    """The source's and the target's. Characters are those of held-out pairs too, which could not be encoded else."""
    if config.tokenizer == "byte":
        one = ByteTokenizer(adds_bos=False)
        return one, one
    columns = [list(column) for column in zip(*(everything if config.tokenizer == "char" else train), strict=True)]
    if config.shared:
        one = _make_tokenizer(config, columns[0] + columns[1])
        return one, one
    return _make_tokenizer(config, columns[0]), _make_tokenizer(config, columns[1])


def _make_tokenizer(config: PairsConfig, texts: list[str]) -> Tokenizer:
    if config.tokenizer == "char":
        return char_with_ends("".join(sorted(set().union(*texts))))
    return train_bpe(texts, vocab_size=config.bpe_vocab, adds_bos=False)


def _encode_pairs(source_tokenizer: Tokenizer, tokenizer: Tokenizer, pairs: list[Pair]) -> EncodedPairs:
    sources = _spelling(source_tokenizer).encode_batch([source for source, _ in pairs])
    targets = _spelling(tokenizer).encode_batch([target for _, target in pairs])
    return EncodedPairs(
        sources=_join(sources, begin=[], end=[_eos(source_tokenizer)]),
        targets=_join(targets, begin=[_bos(tokenizer)], end=[_eos(tokenizer)]),
    )


def _spelling(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, to which a special token's name in a text is just its letters."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return dataclasses.replace(tokenizer, tokenizer=tokenizer.letters)
    return tokenizer


def _bos(tokenizer: Tokenizer) -> int:
    assert tokenizer.bos_id is not None, "a translation starts from bos"
    return tokenizer.bos_id


def _eos(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos_id is not None, "a text and its translation end with eos"
    return tokenizer.eos_id


def _join(encoded: Sequence[np.ndarray], *, begin: Sequence[int], end: Sequence[int]) -> Texts:
    first, last = np.array(begin, np.int32), np.array(end, np.int32)
    parts = [part for ids in encoded for part in (first, ids, last)]
    sizes = [len(first) + len(ids) + len(last) for ids in encoded]
    return Texts(
        tokens=np.concatenate([np.zeros(0, np.int32), *parts]),
        offsets=np.cumsum([0, *sizes], dtype=np.int64),
    )


def _key(source_tokenizer: Tokenizer, tokenizer: Tokenizer, train: EncodedPairs, valid: EncodedPairs) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update((fingerprint(source_tokenizer) + fingerprint(tokenizer)).encode())
    for texts in (train.sources, train.targets, valid.sources, valid.targets):
        digest.update(np.int64(len(texts.offsets)).tobytes() + texts.offsets.tobytes() + texts.tokens.tobytes())
    return digest.hexdigest()


class _Bucket(NamedTuple):
    """Pairs of like length and the shape of their batches."""

    edge: int
    num_rows: int
    members: Int64[np.ndarray, " pairs"]

    @property
    def num_batches(self) -> int:
        return -(-len(self.members) // self.num_rows)

    def deal(self, rng: np.random.Generator) -> list["_Rows"]:
        """The members in a new order, a batch's worth at a time; the last batch is filled with empty rows."""
        picks = np.full(self.num_batches * self.num_rows, -1, np.int64)
        picks[: len(self.members)] = rng.permutation(self.members)
        return [_Rows(self.edge, batch) for batch in picks.reshape(-1, self.num_rows)]


class _Rows(NamedTuple):
    """A batch to be read."""

    edge: int
    picks: Int64[np.ndarray, " B"]  # pairs by number; -1 is an empty row

    def read(self, pairs: EncodedPairs, part: Part | None) -> PairBatch:
        picks = self.picks if part is None else self.picks[list(part(len(self.picks)))]
        return pairs.read(picks, width=self.edge)


def _fill_buckets(pairs: EncodedPairs, edges: Sequence[int], batch_size: int) -> list[_Bucket]:
    """Buckets that have pairs: each pair in the first that is wide enough, none where none is."""
    place = np.searchsorted(np.array(edges), pairs.needs)
    members = [np.flatnonzero(place == bucket) for bucket in range(len(edges))]
    filled = zip(edges, members, strict=True)
    return [_Bucket(edge, batch_size * (edges[-1] // edge), which) for edge, which in filled if len(which)]


def _deal(buckets: Sequence[_Bucket], rng: np.random.Generator) -> list[_Rows]:
    """Every pair once, in batches of mixed buckets."""
    batches = [batch for bucket in buckets for batch in bucket.deal(rng)]
    return [batches[at] for at in rng.permutation(len(batches)).tolist()]


class PairLoader:
    """The batches of one host, step after step, without end: of each its rows `part(rows)`, by default all.

    What batch number n is depends on the corpus, the settings and the seed alone, so a cursor is one number, good for
    any number of hosts.
    """

    def __init__(self, corpus: PairCorpus, *, batch_size: int, seq_len: int, part: Part | None = None) -> None:
        edges = bucket_edges(corpus.buckets, seq_len=seq_len)
        self._corpus, self._part = corpus, part
        self._buckets = _fill_buckets(corpus.train, edges, batch_size)
        if not self._buckets:
            raise ValueError(
                f"no pair fits into train.seq_len={seq_len}: the shortest needs {int(corpus.train.needs.min())} "
                "tokens with its end; raise train.seq_len"
            )
        self._num_long = [int((pairs.needs > seq_len).sum()) for pairs in (corpus.train, corpus.valid)]
        self._identity = {
            **{"corpus": corpus.key, "seed": corpus.seed},
            **{"batch_size": batch_size, "seq_len": seq_len, "buckets": list(edges)},
        }
        self._batch = 0  # the next one's number
        self._epoch = -1  # whose batches are in _dealt
        self._dealt: list[_Rows] = []

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and edge of every bucket that has pairs, shortest first."""
        return [(bucket.num_rows, bucket.edge) for bucket in self._buckets]

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every pair is once."""
        return sum(bucket.num_batches for bucket in self._buckets)

    def describe(self) -> list[str]:
        """What was left out, and how full the batches are."""
        train, valid = self._num_long
        needs = self._corpus.train
        lines, used, slots = [], 0, 0
        for bucket in self._buckets:
            sides = (needs.sources.lengths, needs.targets.lengths - 1)
            here = sum(int(side[bucket.members].sum()) for side in sides)
            room = 2 * bucket.num_batches * bucket.num_rows * bucket.edge
            used, slots = used + here, slots + room
            lines.append(
                f"{bucket.num_batches:,} batches of {bucket.num_rows} x {bucket.edge}: "
                f"{len(bucket.members):,} pairs, padding {1 - here / room:.0%}"
            )
        return [
            f"{self.batches_per_epoch:,} batches an epoch, padding {1 - used / slots:.0%}; dropped as longer than "
            f"{self._identity['seq_len']} tokens: {train:,} to train on, {valid:,} to validate with",
            *lines,
        ]

    def __iter__(self) -> Iterator[PairBatch]:
        return self

    def __next__(self) -> PairBatch:
        epoch, at = divmod(self._batch, self.batches_per_epoch)
        if epoch != self._epoch:
            self._dealt = _deal(self._buckets, np.random.default_rng((self._corpus.seed, epoch)))
            self._epoch = epoch
        self._batch += 1
        return self._dealt[at].read(self._corpus.train, self._part)

    def state(self) -> dict[str, Any]:
        """Which batch is next, and in which order; survives JSON."""
        return {"batch": self._batch, **self._identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the batch that follows `state`; ValueError if it counts the batches of another order."""
        check_order(state, self._identity)
        self._batch = int(state["batch"])

    def close(self) -> None:
        """Nothing runs ahead: a batch is made in less than a millisecond, when it is asked for."""


def batch_shapes(corpus: PairCorpus, batch_size: int, seq_len: int) -> tuple[tuple[int, int], ...]:
    """Rows and edge of every bucket that a pair is in, to train on or held out, the longest rows last."""
    edges = bucket_edges(corpus.buckets, seq_len=seq_len)
    buckets = [bucket for pairs in (corpus.train, corpus.valid) for bucket in _fill_buckets(pairs, edges, batch_size)]
    return tuple(sorted({(bucket.num_rows, bucket.edge) for bucket in buckets}, reverse=True))


def valid_batches(
    corpus: PairCorpus, batch_size: int, seq_len: int, limit: int = 0, part: Part | None = None
) -> list[PairBatch]:
    """Held-out batches: together they hold every held-out pair of at most seq_len tokens once.

    `limit` keeps the first so many, 0 all. A host gets its rows `part(rows)` of each, by default all. The order is a
    fixed random one, so that a few batches stand for all.
    """
    buckets = _fill_buckets(corpus.valid, bucket_edges(corpus.buckets, seq_len=seq_len), batch_size)
    batches = _deal(buckets, np.random.default_rng(0))
    return [batch.read(corpus.valid, part) for batch in (batches[:limit] if limit else batches)]


def encode_sources(
    tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int, lower: bool = False
) -> list[list[int]]:
    """Each line's tokens and eos, to be translated; ValueError where they are more than max_length.

    Lower-case them where the model was trained on lower-cased text.
    """
    spelling, encoded = _spelling(tokenizer), []
    for number, text in enumerate(texts, start=1):
        try:
            ids = spelling.encode(text.lower() if lower else text)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if len(ids) + 1 > max_length:
            raise ValueError(
                f"line {number} has {len(ids) + 1} tokens with its end, more than the {max_length} that the model "
                "takes; shorten it or cut it in two"
            )
        encoded.append([*ids, _eos(tokenizer)])
    return encoded
