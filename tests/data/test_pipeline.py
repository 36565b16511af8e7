import contextlib
import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from data import cache
from data.cache import new_folder, open_entry, token_writers, write_entry
from data.corpus import Corpus
from data.packing import Batch
from data.pipeline import TrainLoader, valid_batches
from data.tokenizer import ByteTokenizer

LENGTHS = [5, 30, 2, 17, 9, 1, 12, 40, 3, 8]  # tokens of documents; 127 in all, of which 117 are targets
LENGTH = 8


def write_source(place: pathlib.Path, lengths: list[int], first: int) -> cache.Entry:
    """Documents whose tokens are all different, counting up from `first`; the same are held out."""
    numbers = itertools.count(first)
    documents = [np.array([next(numbers) for _ in range(length)], np.int32) for length in lengths]
    with new_folder(place, is_whole=lambda _: False) as folder, token_writers(folder, "uint16") as writers:
        for document, split in itertools.product(documents, cache.SPLITS):
            writers[split].append(document, starts=True, num_bytes=0)
        write_entry(folder, writers, {})
    entry = open_entry(place)
    assert entry is not None
    return entry


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[cache.Entry]:
    root = tmp_path_factory.mktemp("sources")
    return [write_source(root / str(source), LENGTHS, 1 + 1000 * source) for source in range(3)]


@pytest.fixture
def corpus(sources) -> Corpus:
    return make_corpus(sources[:1])


def make_corpus(entries: list[cache.Entry], **changes) -> Corpus:
    corpus = Corpus(
        tokenizer=ByteTokenizer(),
        sources=("test",) * len(entries),
        train=tuple(entry.train for entry in entries),
        valid=tuple(entry.valid for entry in entries),
        weights=(1.0,) * len(entries),
        reports=(),
        key="key",
        packing="pack",
        prefetch=2,
        workers=0,
        seed=3,
    )
    return dataclasses.replace(corpus, **changes)


def take(corpus: Corpus, steps: int, *, state: dict | None = None, batch_size: int = 4, **settings) -> list[Batch]:
    with contextlib.closing(TrainLoader(corpus, batch_size=batch_size, seq_len=LENGTH, **settings)) as loader:
        if state is not None:
            loader.restore(json.loads(json.dumps(state)))
        return [next(loader) for _ in range(steps)]


def rows(batches: list[Batch]) -> list[list[int]]:
    return np.concatenate([batch.tokens for batch in batches]).tolist()


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for array, twin in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, twin, strict=True)


def targets(batches: list[Batch]) -> list[int]:
    return sorted(np.concatenate([batch.targets[batch.mask == 1] for batch in batches]).tolist())


def all_targets(first: int = 1) -> list[int]:
    """Every token but the first of each document."""
    starts = set(np.cumsum([first, *LENGTHS]).tolist())
    return [token for token in range(first, first + sum(LENGTHS)) if token not in starts]


def test_an_epoch_holds_every_target_once_and_the_next_in_another_order(corpus):
    loader = TrainLoader(corpus, batch_size=1, seq_len=LENGTH)
    epoch = loader.rows_per_epoch
    assert epoch == 15  # 117 targets need at least 14.6 rows
    first, second = take(corpus, epoch, batch_size=1), take(corpus, 2 * epoch, batch_size=1)[epoch:]
    assert targets(first) == targets(second) == all_targets()
    assert rows(first) != rows(second)
    assert sorted(rows(first)) == sorted(rows(second))


def test_batches_have_the_types_of_a_step(corpus):
    (batch,) = take(corpus, 1)
    assert isinstance(batch, Batch)
    assert [(array.shape, array.dtype.name) for array in batch] == [
        ((4, LENGTH), name) for name in ("int32", "int32", "float32", "int32", "int32")
    ]


def test_the_seed_decides_the_order(corpus):
    other = dataclasses.replace(corpus, seed=4)
    assert rows(take(corpus, 3)) == rows(take(corpus, 3))
    assert rows(take(corpus, 3)) != rows(take(other, 3))


@pytest.mark.parametrize("packing", ["pack", "stream"])
@pytest.mark.parametrize("part", [[0, 1], [3], [0, 2, 3]])
def test_hosts_make_parts_of_the_same_batches(packing, part, sources):
    corpus = make_corpus(sources, packing=packing)
    whole = [Batch._make(column[part] for column in batch) for batch in take(corpus, 9)]
    assert_same(take(corpus, 9, part=part), whole)
    whole = [Batch._make(column[part] for column in batch) for batch in valid_batches(corpus, 4, LENGTH, limit=2)]
    assert_same(valid_batches(corpus, 4, LENGTH, limit=2, part=part), whole)


def test_the_order_of_rows_does_not_depend_on_the_batch_size(corpus):
    assert rows(take(corpus, 12, batch_size=2)) == rows(take(corpus, 4, batch_size=6))


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_batches_made_ahead_are_those_made_on_demand(prefetch, corpus):
    assert_same(take(dataclasses.replace(corpus, prefetch=prefetch), 10), take(corpus, 10))


def test_worker_processes_make_the_same_batches_and_resume(corpus):
    """The cursor counts what was taken; the workers are ahead of it."""
    whole = take(corpus, 7)
    loader = TrainLoader(dataclasses.replace(corpus, workers=2), batch_size=4, seq_len=LENGTH)
    with contextlib.closing(loader):
        loader.restore({**loader.state(), "example": 8})
        assert_same([next(loader) for _ in range(3)], whole[2:5])
    assert loader.state()["example"] == 20
    assert_same(take(corpus, 2, state=loader.state()), whole[5:])


@pytest.mark.parametrize("packing", ["pack", "stream"])
@pytest.mark.parametrize("done", [0, 1, 3, 4, 7, 100])
def test_a_cursor_resumes_with_exactly_the_next_batch(packing, done, sources):
    corpus = make_corpus(sources[:2], packing=packing)
    loader = TrainLoader(corpus, batch_size=4, seq_len=LENGTH)
    with contextlib.closing(loader):
        for _ in range(done):
            next(loader)
        state = loader.state()
        following = [next(loader) for _ in range(6)]
    assert_same(take(corpus, 6, state=state), following)
    assert loader.state()["example"] == (done + 6) * 4


def test_a_cursor_moves_to_other_hosts_and_batch_sizes(corpus):
    loader = TrainLoader(corpus, batch_size=4, seq_len=LENGTH, part=[2, 3])
    with contextlib.closing(loader):
        for _ in range(3):
            next(loader)
    whole = rows(take(corpus, 9))
    assert rows(take(corpus, 6, state=loader.state())) == whole[12:]
    assert rows(take(corpus, 12, state=loader.state(), batch_size=2)) == whole[12:]


@pytest.mark.parametrize(
    ("change", "name"), [({"seed": 9}, "seed"), ({"key": "other"}, "corpus"), ({"packing": "stream"}, "packing")]
)
def test_a_cursor_of_another_order_is_refused(change, name, corpus):
    state = TrainLoader(corpus, batch_size=4, seq_len=LENGTH).state()
    with pytest.raises(ValueError, match=f"another order of examples: {name} was .*, now it is .*; restore the old"):
        take(dataclasses.replace(corpus, **change), 1, state=state)


def test_a_cursor_of_other_rows_is_refused(corpus):
    state = TrainLoader(corpus, batch_size=4, seq_len=LENGTH).state()
    with pytest.raises(ValueError, match="seq_len was 8, now it is 16"):
        TrainLoader(corpus, batch_size=4, seq_len=16).restore(state)


def test_a_mixture_draws_by_weight_and_shuffles_each_source(sources):
    corpus = make_corpus(sources, weights=(5.0, 1.0, 2.0))
    drawn = np.array(rows(take(corpus, 100)))
    source = drawn[:, 0] // 1000
    assert np.bincount(source).tolist() == [250, 50, 100]
    for number in range(3):
        own = drawn[source == number][:15]  # an epoch of this source
        tokens = own[own > 0] - 1000 * number
        assert len(set(tokens.tolist())) == len(tokens) == 117
    orders = [(drawn[source == number][:15, 0] % 1000).tolist() for number in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_every_prefix_of_a_mixture_is_close_to_its_weights(sources):
    source = np.array(rows(take(make_corpus(sources[:2], weights=(3.0, 1.0)), 20)))[:, 0] // 1000
    share = np.cumsum(source == 0) - 0.75 * np.arange(1, len(source) + 1)
    assert abs(share).max() <= 1


def test_an_epoch_of_a_stream_holds_every_token_once_but_at_its_edges(sources):
    corpus = make_corpus(sources[:1], packing="stream")
    epochs = [rows(take(corpus, 14 * (epoch + 1), batch_size=1))[14 * epoch :] for epoch in range(4)]
    for epoch in epochs:
        tokens = sorted(itertools.chain(*epoch))
        assert tokens == list(range(tokens[0], tokens[0] + 14 * LENGTH))
    shifts = [min(map(min, epoch)) for epoch in epochs]
    assert len(set(shifts)) > 1  # each epoch cuts at other places
    assert all(1 <= shift <= sum(LENGTHS) - 14 * LENGTH for shift in shifts)


def test_a_stream_sees_across_documents(sources):
    (batch,) = take(make_corpus(sources[:1], packing="stream"), 1)
    assert (batch.targets == batch.tokens + 1).all()
    assert (batch.segments == 1).all()
    assert (batch.mask == 1).all()


@pytest.mark.parametrize("packing", ["pack", "stream"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_held_out_batches_hold_every_target_once(packing, batch_size, sources):
    corpus = make_corpus(sources[:2], packing=packing)
    batches = valid_batches(corpus, batch_size, LENGTH)
    assert {batch.tokens.shape for batch in batches} == {(batch_size, LENGTH)}
    expected = [
        token
        for first in (1, 1001)
        for token in (all_targets(first) if packing == "pack" else range(first + 1, first + sum(LENGTHS)))
    ]
    assert targets(batches) == expected


def test_held_out_batches_are_always_the_same_and_padded_at_the_end(corpus):
    batches = valid_batches(corpus, 4, LENGTH)
    assert_same(batches, valid_batches(dataclasses.replace(corpus, seed=77), 4, LENGTH))
    assert [int((batch.segments > 0).any(axis=1).sum()) for batch in batches] == [4, 4, 4, 3]
    assert_same(valid_batches(corpus, 4, LENGTH, limit=2), batches[:2])
    assert_same(valid_batches(corpus, 4, LENGTH, limit=99), batches)


def test_a_few_held_out_batches_stand_for_all(sources, tmp_path):
    """Full rows come first in a plan, short documents last; a limit must not take long documents only."""
    entry = write_source(tmp_path / "mixed", [81] * 5 + [3] * 100, 1)
    (batch,) = valid_batches(make_corpus([entry]), 20, LENGTH, limit=1)
    num_documents = batch.segments.max(axis=1)
    assert (num_documents > 1).any()
    assert (num_documents == 1).any()


def test_nothing_held_out_gives_no_batches(sources):
    none = dataclasses.replace(sources[0].valid, num_tokens=0, num_documents=0)
    assert valid_batches(dataclasses.replace(make_corpus(sources[:1]), valid=(none,)), 4, LENGTH) == []


@pytest.mark.parametrize(("packing", "length"), [("stream", 127), ("pack", 8)])
def test_a_text_that_gives_no_row_is_refused(packing, length, sources, tmp_path):
    entry = sources[0] if packing == "stream" else write_source(tmp_path / "short", [1, 1], 1)
    with pytest.raises(ValueError, match=rf"gives no row of train.seq_len={length}: .* needs {length + 1} tokens"):
        TrainLoader(make_corpus([entry], packing=packing), batch_size=1, seq_len=length)


def test_one_row_is_enough(sources):
    corpus = make_corpus(sources[:1], packing="stream")
    with contextlib.closing(TrainLoader(corpus, batch_size=3, seq_len=126)) as loader:
        assert next(loader).tokens[:, 0].tolist() == [1, 1, 1]
