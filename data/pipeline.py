"""Batches of a corpus without end: globally shuffled, mixed, cut up among hosts, made ahead, resumable.

Examples are numbered from 0, over all epochs. What example number n is depends on the corpus, the row length and the
seed alone; a step takes the next `batch_size` numbers and a host reads just its rows of them. So a cursor is one
number, good for any number of hosts, workers and batch sizes.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.cache import TokenCache
from data.corpus import Corpus, prepare
from data.cursor import check_order
from data.packing import Batch, Rows, cut, empty_batch, fill_rows, num_cuts, pad_rows, plan_rows

__all__ = ["Batch", "Corpus", "TrainLoader", "import_grain", "prepare", "valid_batches"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Rows of whole documents: each epoch has the same rows in another order."""

    tokens: TokenCache
    rows: Rows
    length: int

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self.rows.num_rows

    def read(self, examples: Sequence[int]) -> Batch:
        """Rows by number, over all epochs."""
        return fill_rows(self.tokens.tokens, self.rows, [n % self.num_rows for n in examples], length=self.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamRows:
    """Rows cut from one stream: each epoch cuts at other places."""

    tokens: TokenCache
    length: int
    seed: int

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return num_cuts(self.tokens.num_tokens, length=self.length)

    def read(self, examples: Sequence[int]) -> Batch:
        """Rows by number, over all epochs."""
        shifts = self.tokens.num_tokens - self.num_rows * self.length
        starts = []
        for epoch, row in (divmod(n, self.num_rows) for n in examples):
            starts.append(_fold(self.seed, epoch) % shifts + row * self.length)
        return cut(self.tokens.tokens, starts, length=self.length)


def _fold(*parts: int) -> int:
    """32 bits that stand for some numbers, the same on every machine."""
    return zlib.crc32(repr(parts).encode())


def _train_rows(corpus: Corpus, *, length: int) -> tuple[PackedRows | StreamRows, ...]:
    """The rows of each source."""
    made: list[PackedRows | StreamRows] = []
    for source, tokens in enumerate(corpus.train):
        if corpus.packing == "stream":
            rows = StreamRows(tokens=tokens, length=length, seed=_fold(corpus.seed, source))
        else:
            rows = PackedRows(tokens=tokens, rows=plan_rows(tokens.offsets, length=length), length=length)
        if not rows.num_rows:
            raise ValueError(
                f"a training text of {tokens.num_tokens} tokens gives no row of train.seq_len={length}: "
                f"packing=stream needs {length + 1} tokens, packing=pack a document of 2; give more text"
            )
        made.append(rows)
    return tuple(made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HostPart:
    """Reads one host's rows out of a batch of (source, example) numbers."""

    rows: tuple[PackedRows | StreamRows, ...]  # of each source
    places: tuple[int, ...]  # in the batch

    def __call__(self, numbers: tuple[np.ndarray, np.ndarray]) -> Batch:
        sources, examples = (column[list(self.places)] for column in numbers)
        if len(self.rows) == 1:
            return self.rows[0].read(examples.tolist())
        batch = empty_batch(len(examples), self.rows[0].length)
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source)
            for whole, part in zip(batch, self.rows[source].read(examples[places].tolist()), strict=True):
                whole[places] = part
        return batch


def _tag(source: int, example: int) -> tuple[int, int]:
    return source, example


class TrainLoader:
    """The batches of one host, step after step, without end: of each its rows `part`, by default all."""

    def __init__(self, corpus: Corpus, *, batch_size: int, seq_len: int, part: Sequence[int] | None = None) -> None:
        self._corpus, self._batch_size = corpus, batch_size
        self._rows = _train_rows(corpus, length=seq_len)
        self._part = _HostPart(rows=self._rows, places=tuple(range(batch_size) if part is None else part))
        self._identity = {"corpus": corpus.key, "packing": corpus.packing, "seq_len": seq_len, "seed": corpus.seed}
        self._example = 0  # the first of the next batch
        self._batches: Any = None  # grain's iterator from there on; made when first needed

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources, each once."""
        return sum(rows.num_rows for rows in self._rows)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._make_batches())
        batch = next(self._batches)
        self._example += self._batch_size
        return batch

    def _make_batches(self) -> Any:
        """grain's pipeline from the cursor on."""
        import grain  # a quarter of a second, so not before a batch is wanted

        shuffled = [
            _shuffle(rows.num_rows, _fold(self._corpus.seed, source)).map(functools.partial(_tag, source))
            for source, rows in enumerate(self._rows)
        ]
        examples = grain.MapDataset.mix(shuffled, self._corpus.weights)[self._example :]
        batches = examples.batch(self._batch_size).map(self._part)
        ahead = self._corpus.prefetch
        made = batches.to_iter_dataset(grain.ReadOptions(num_threads=min(1, ahead), prefetch_buffer_size=ahead))
        if not self._corpus.workers:
            return made
        _let_grain_start_processes()
        options = grain.MultiprocessingOptions(num_workers=self._corpus.workers, per_worker_buffer_size=max(1, ahead))
        return made.mp_prefetch(options)

    def state(self) -> dict[str, Any]:
        """Where the next batch starts, and in which order of examples; survives JSON."""
        return {"example": self._example, **self._identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the batch that follows `state`; ValueError if it counts the examples of another order."""
        check_order(state, self._identity)
        self.close()
        self._example = int(state["example"])

    def close(self) -> None:
        """Stop what makes batches ahead; the next batch starts it anew."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def import_grain() -> None:
    """Import what makes batches, while no other thread imports anything.

    grain replaces Python's import meanwhile; others would get modules that fail ('LazyModule' object is not callable).
    """
    import grain  # noqa: F401


def _shuffle(num_rows: int, seed: int) -> Any:
    """Example numbers without end: each epoch holds each of its rows once, in an order of its own."""
    import grain

    endless = grain.MapDataset.range(num_rows * ((1 << 62) // num_rows))
    return grain.experimental.WindowShuffleMapDataset(endless, window_size=num_rows, seed=seed)


def _let_grain_start_processes() -> None:
    """grain's worker start reads absl flags, which only absl's own main would have parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def valid_batches(
    corpus: Corpus, batch_size: int, seq_len: int, limit: int = 0, part: Sequence[int] | None = None
) -> list[Batch]:
    """Held-out batches: together they hold every held-out token once; `limit` keeps the first so many, 0 all.

    A host gets its rows `part` of each, by default all.

    Rows are in a fixed random order, so that a few batches stand for all. The last batch is filled up with padding.
    """
    plans = []
    for tokens in corpus.valid:
        ends = np.array([0, tokens.num_tokens], np.int64)
        offsets = ends if corpus.packing == "stream" else tokens.offsets
        plans.append(PackedRows(tokens=tokens, rows=plan_rows(offsets, length=seq_len), length=seq_len))
    places = [(source, row) for source, plan in enumerate(plans) for row in range(plan.num_rows)]
    places = [places[at] for at in np.random.default_rng(0).permutation(len(places))]
    groups = [places[at : at + batch_size] for at in range(0, len(places), batch_size)]
    whole = (_read_group(plans, group, batch_size) for group in (groups[:limit] if limit else groups))
    rows = range(batch_size) if part is None else part
    return [Batch._make(column[list(rows)] for column in batch) for batch in whole]


def _read_group(plans: Sequence[PackedRows], group: Sequence[tuple[int, int]], batch_size: int) -> Batch:
    rows = [plans[source].read([row]) for source, row in group]
    return pad_rows(Batch(*(np.concatenate(parts) for parts in zip(*rows, strict=True))), batch_size=batch_size)
