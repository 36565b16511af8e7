import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Batch, cut, fill_rows, num_cuts, pack, pad_rows, plan_rows

LENGTHS = st.lists(st.integers(0, 40), max_size=30)


def assert_rows(batch: Batch, **expected):
    for name, rows in expected.items():
        assert getattr(batch, name).tolist() == rows, name


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that a token says where it is from."""
    numbers = iter(range(1, 10_000))
    return [[next(numbers) for _ in range(length)] for length in lengths]


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def test_rows_hold_whole_documents():
    assert_rows(
        pack([[1, 2, 3, 9], [4, 5, 9], [6, 9]], length=4),
        tokens=[[1, 2, 3, 6], [4, 5, 0, 0]],
        targets=[[2, 3, 9, 9], [5, 9, 0, 0]],
        mask=[[1, 1, 1, 1], [1, 1, 0, 0]],
        segments=[[1, 1, 1, 2], [1, 1, 0, 0]],
        positions=[[0, 1, 2, 0], [0, 1, 0, 0]],
    )


def test_a_long_document_is_cut_into_full_rows_and_a_rest():
    assert_rows(
        pack([[1, 2, 3, 4, 5, 6], [7, 8]], length=3),
        tokens=[[1, 2, 3], [4, 5, 7]],
        targets=[[2, 3, 4], [5, 6, 8]],
        segments=[[1, 1, 1], [1, 1, 2]],
        positions=[[0, 1, 2], [0, 1, 0]],
    )


def test_a_piece_goes_to_the_fullest_row_with_room():
    rows = pack([[1] * 8, [2] * 6, [3] * 5, [4] * 3, [5] * 2], length=10)  # 7, 5, 4, 2 and 1 slots
    assert_rows(rows, tokens=[[1, 1, 1, 1, 1, 1, 1, 4, 4, 5], [2, 2, 2, 2, 2, 3, 3, 3, 3, 0]])


@pytest.mark.parametrize("documents", [[], [[]], [[5]], [[], [5], []]])
def test_a_document_without_a_second_token_predicts_nothing(documents):
    assert pack(documents, length=4).tokens.shape == (0, 4)


def test_types_are_those_of_a_batch():
    assert [array.dtype.name for array in pack([[1, 2]], length=2)] == ["int32", "int32", "float32", "int32", "int32"]


@given(LENGTHS, st.integers(1, 12))
def test_every_token_but_a_first_is_a_target_once(lengths, length):
    documents = documents_of(lengths)
    batch = pack(documents, length=length)
    assert sorted(batch.targets[batch.mask == 1]) == sorted(token for doc in documents for token in doc[1:])


@given(LENGTHS, st.integers(1, 12))
def test_a_segment_is_one_run_of_one_document(lengths, length):
    documents = documents_of(lengths)
    home = {token: index for index, document in enumerate(documents) for token in document}
    batch = pack(documents, length=length)
    for tokens, targets, segments, positions in zip(
        batch.tokens, batch.targets, batch.segments, batch.positions, strict=True
    ):
        for segment in range(1, segments.max(initial=0) + 1):
            here = segments == segment
            assert len({home[token] for token in tokens[here]}) == 1
            assert targets[here].tolist() == (tokens[here] + 1).tolist()  # tokens of a document count up by one
            assert positions[here].tolist() == list(range(here.sum()))


@given(LENGTHS, st.integers(1, 12))
def test_padding_is_nothing_and_stands_last(lengths, length):
    batch = pack(documents_of(lengths), length=length)
    padding = batch.segments == 0
    assert not any(array[padding].any() for array in batch)
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(4, 12))
@settings(max_examples=50)
def test_no_two_rows_could_be_one(lengths, length):
    """Best fit never opens a row while a piece would fit into an open one, so at most one row is half empty."""
    used = (pack(documents_of(lengths), length=length).segments > 0).sum(1)
    assert (used * 2 <= length).sum() <= 1


def test_text_like_lengths_fill_nearly_all_slots():
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 5000).astype(np.int64)
    assert plan_rows(offsets_of(lengths.tolist()), length=512).fill(512) > 0.998


def test_filling_picked_rows_equals_picking_filled_rows():
    documents = documents_of([7, 3, 12, 5])
    tokens = np.array([token for document in documents for token in document])
    rows = plan_rows(offsets_of([7, 3, 12, 5]), length=6)
    whole = pack(documents, length=6)
    for array, picked in zip(whole, fill_rows(tokens, rows, [2, 0], length=6), strict=True):
        assert array[[2, 0]].tolist() == picked.tolist()


def test_a_stream_is_one_document():
    assert_rows(
        cut(np.arange(10, 20), [0, 3], length=3),
        tokens=[[10, 11, 12], [13, 14, 15]],
        targets=[[11, 12, 13], [14, 15, 16]],
        mask=[[1, 1, 1], [1, 1, 1]],
        segments=[[1, 1, 1], [1, 1, 1]],
        positions=[[0, 1, 2], [0, 1, 2]],
    )


@given(st.integers(0, 200), st.integers(1, 20))
def test_cuts_fit_into_the_stream_at_every_shift(num_tokens, length):
    count = num_cuts(num_tokens, length=length)
    assert (count > 0) == (num_tokens > length)
    if count:
        last_shift = num_tokens - count * length - 1
        assert 0 <= last_shift
        batch = cut(np.arange(num_tokens), [last_shift + row * length for row in range(count)], length=length)
        assert batch.targets[-1, -1] == num_tokens - 1


def test_padding_rows_count_for_nothing():
    batch = pad_rows(pack([[1, 2, 3]], length=2), batch_size=3)
    assert_rows(
        batch, tokens=[[1, 2], [0, 0], [0, 0]], mask=[[1, 1], [0, 0], [0, 0]], segments=[[1, 1], [0, 0], [0, 0]]
    )
