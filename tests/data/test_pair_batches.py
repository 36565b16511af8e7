import collections
import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from data.config import PairsConfig
from data.pair_batches import PairBatch, PairCorpus, PairLoader, encode_sources, prepare_pairs, valid_batches
from data.tokenizer import char_with_ends, fingerprint, load_tokenizer, train_bpe

SEQ_LEN, BATCH = 24, 4
SETTINGS = {"tokenizer": "char", "buckets": (8, 12), "examples": 130, "valid_pairs": 30}


@pytest.fixture(scope="module")
def corpus() -> PairCorpus:
    return prepare_pairs(PairsConfig(**SETTINGS), seed=3)


def from_pairs(folder: pathlib.Path, pairs: list[tuple[str, str]], **settings) -> PairCorpus:
    path = folder / "pairs.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return prepare_pairs(PairsConfig(**{**SETTINGS, "path": str(path), "valid_pairs": 0, **settings}), seed=0)


def take(corpus: PairCorpus, steps: int, *, state: dict | None = None, **settings) -> list[PairBatch]:
    loader = PairLoader(corpus, **{"batch_size": BATCH, "seq_len": SEQ_LEN, **settings})
    if state is not None:
        loader.restore(json.loads(json.dumps(state)))
    return list(itertools.islice(loader, steps))


def an_epoch(corpus: PairCorpus) -> int:
    return PairLoader(corpus, batch_size=BATCH, seq_len=SEQ_LEN).batches_per_epoch


def texts(corpus: PairCorpus, batches: list[PairBatch]) -> list[tuple[str, str]]:
    """The pairs in the rows, each read through its mask, once from tokens and once from targets."""
    read = []
    for batch in batches:
        for source, source_mask, tokens, targets, mask in zip(*batch, strict=True):
            if mask.any():
                source_ids, ids = source[source_mask > 0].tolist(), targets[mask > 0].tolist()
                assert (source_ids[-1], ids[-1]) == (corpus.source_tokenizer.eos_id, corpus.tokenizer.eos_id)
                assert tokens[mask > 0].tolist() == [corpus.tokenizer.bos_id, *ids[:-1]]
                read.append((corpus.source_tokenizer.decode(source_ids[:-1]), corpus.tokenizer.decode(ids[:-1])))
    return read


def train_texts(corpus: PairCorpus, longest: int = SEQ_LEN) -> list[tuple[str, str]]:
    everything = prepare_pairs(PairsConfig(**{**SETTINGS, "buckets": ()}), seed=0)
    pairs = texts(everything, take(everything, 100, batch_size=1, seq_len=99))
    assert len(pairs) == len(set(pairs)) == 100
    return sorted(pair for pair in pairs if max(map(len, pair)) < longest)


def assert_same(batches: list[PairBatch], others: list[PairBatch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for array, twin in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, twin, strict=True)


def test_rows_of_a_batch(tmp_path):
    corpus = from_pairs(tmp_path, [("ab", "c"), ("b", "aabb")], buckets=())
    assert corpus.tokenizer.characters == "abc"  # and eos 3, bos 4
    (batch,) = take(corpus, 1, batch_size=3, seq_len=8)
    order = [0, 1, 2] if batch.source[0, 0] == 0 else [1, 0, 2]
    assert [column[order].tolist() for column in batch] == [
        [[0, 1, 3, 0, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0, 0, 0], [0] * 8],
        [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8],
        [[4, 2, 0, 0, 0, 0, 0, 0], [4, 0, 0, 1, 1, 0, 0, 0], [0] * 8],
        [[2, 3, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 3, 0, 0, 0], [0] * 8],
        [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0], [0] * 8],
    ]
    assert [array.dtype.name for array in batch] == ["int32", "float32", "int32", "int32", "float32"]


def test_an_epoch_holds_every_pair_once_and_the_next_in_another_order(corpus):
    epoch = an_epoch(corpus)
    both = take(corpus, 2 * epoch)
    first, second = texts(corpus, both[:epoch]), texts(corpus, both[epoch:])
    assert sorted(first) == sorted(second) == train_texts(corpus)
    assert len(first) < 100  # some are longer
    assert first != second


def test_a_pair_is_in_the_smallest_bucket_that_holds_it(corpus):
    shapes = set()
    for batch in take(corpus, an_epoch(corpus)):
        shapes.add(batch.source.shape)
        assert {array.shape for array in batch} == {batch.source.shape}
        rows, edge = batch.source.shape
        assert rows == max(1, BATCH * SEQ_LEN // edge // BATCH) * BATCH
        for source, target in texts(corpus, [batch]):
            assert edge == next(edge for edge in (8, 12, 24) if max(len(source), len(target)) + 1 <= edge)
    assert sorted(shapes) == [(4, 24), (8, 12)]  # no date fits into 8
    assert PairLoader(corpus, batch_size=BATCH, seq_len=SEQ_LEN).shapes == [(8, 12), (4, 24)]


def test_batches_of_an_epoch_are_shuffled_across_buckets(corpus):
    edges = [batch.source.shape[1] for batch in take(corpus, an_epoch(corpus))]
    assert edges not in (sorted(edges), sorted(edges, reverse=True))


def test_only_the_last_batch_of_a_bucket_has_empty_rows(corpus):
    empty = collections.Counter()
    for batch in take(corpus, an_epoch(corpus)):
        rows = ~batch.mask.any(axis=1)
        assert not any(array[rows].any() for array in batch)
        empty[batch.mask.shape[1]] += bool(rows.any())
    assert max(empty.values()) <= 1


def test_a_pair_as_long_as_a_bucket_is_in_it(tmp_path):
    corpus = from_pairs(tmp_path, [("a" * 7, "b"), ("a", "b" * 8), ("a" * 23, "b"), ("a", "b" * 24)])
    loader = PairLoader(corpus, batch_size=1, seq_len=SEQ_LEN)
    assert loader.shapes == [(3, 8), (2, 12), (1, 24)]
    assert sorted(texts(corpus, take(corpus, 3, batch_size=1))) == [("a", "b" * 8), ("a" * 7, "b"), ("a" * 23, "b")]


def test_the_seed_decides_the_order(corpus):
    other = dataclasses.replace(corpus, seed=4)
    assert_same(take(corpus, 5), take(corpus, 5))
    assert texts(corpus, take(corpus, 5)) != texts(corpus, take(other, 5))


@pytest.mark.parametrize("done", [0, 1, 5, 60])
def test_a_cursor_resumes_with_exactly_the_next_batch(done, corpus):
    loader = PairLoader(corpus, batch_size=BATCH, seq_len=SEQ_LEN)
    for _ in range(done):
        next(loader)
    assert_same(take(corpus, 40, state=loader.state()), list(itertools.islice(loader, 40)))
    assert loader.state()["batch"] == done + 40
    loader.close()


def test_a_cursor_goes_back(corpus):
    loader = PairLoader(corpus, batch_size=BATCH, seq_len=SEQ_LEN)
    start, first = loader.state(), next(loader)
    for _ in range(50):
        next(loader)
    loader.restore(start)
    assert_same([next(loader)], [first])


@pytest.mark.parametrize("host", [0, 1])
def test_hosts_make_parts_of_the_same_batches(host, corpus):
    part = lambda rows: range(host * rows // 2, (host + 1) * rows // 2)  # noqa: E731
    for whole, own in [
        (take(corpus, 40), take(corpus, 40, part=part)),
        (valid_batches(corpus, BATCH, SEQ_LEN), valid_batches(corpus, BATCH, SEQ_LEN, part=part)),
    ]:
        rows = [part(len(batch.mask)) for batch in whole]
        cut = [PairBatch(*(array[list(at)] for array in batch)) for at, batch in zip(rows, whole, strict=True)]
        assert_same(own, cut)


def test_a_cursor_moves_to_other_hosts(corpus):
    loader = PairLoader(corpus, batch_size=BATCH, seq_len=SEQ_LEN, part=lambda rows: [0])
    next(loader)
    assert_same(take(corpus, 2, state=loader.state()), take(corpus, 3)[1:])


@pytest.mark.parametrize(
    ("corpus_change", "loader_change", "name"),
    [
        ({"seed": 9}, {}, "seed was 3, now it is 9"),
        ({"key": "other"}, {}, "corpus was '.*', now it is 'other'"),
        ({"buckets": (12,)}, {}, r"buckets was \[8, 12, 24\], now it is \[12, 24\]"),
        ({}, {"batch_size": 8}, "batch_size was 4, now it is 8"),
        ({}, {"seq_len": 32}, "seq_len was 24, now it is 32"),
    ],
)
def test_a_cursor_of_another_order_is_refused(corpus_change, loader_change, name, corpus):
    state = PairLoader(corpus, batch_size=BATCH, seq_len=SEQ_LEN).state()
    with pytest.raises(ValueError, match=f"stands in another order of examples: {name}; restore the old value, or st"):
        take(dataclasses.replace(corpus, **corpus_change), 1, state=state, **loader_change)


def test_no_pair_that_fits_is_refused(corpus):
    with pytest.raises(ValueError, match=r"no pair fits into train.seq_len=8: the shortest needs 11 tokens"):
        take(dataclasses.replace(corpus, buckets=()), 1, seq_len=8)


def test_a_bucket_longer_than_the_rows_is_refused(corpus):
    with pytest.raises(ValueError, match=r"data.buckets has 12, more than train.seq_len=10"):
        take(corpus, 1, seq_len=10)
    with pytest.raises(ValueError, match=r"data.buckets has 12, more than train.seq_len=10"):
        valid_batches(corpus, 1, 10)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_held_out_batches_hold_every_pair_once(batch_size, corpus):
    batches = valid_batches(corpus, batch_size, SEQ_LEN)
    held = [pair for pair in corpus.valid_texts if max(map(len, pair)) < SEQ_LEN]
    assert len(held) > 20
    assert sorted(texts(corpus, batches)) == sorted(held)
    assert_same(valid_batches(corpus, batch_size, SEQ_LEN, limit=2), batches[:2])
    assert_same(valid_batches(dataclasses.replace(corpus, seed=8), batch_size, SEQ_LEN), batches)


def test_nothing_held_out_gives_no_batches(tmp_path):
    assert valid_batches(from_pairs(tmp_path, [("a", "b")]), 2, SEQ_LEN) == []


def test_what_is_said_of_pairs_and_batches(tmp_path):
    pairs = [("a", "b" * 7), ("aaa", "b"), ("a" * 30, "b"), (" ", "b")]
    corpus = from_pairs(tmp_path, pairs)
    assert corpus.describe() == [
        f"{tmp_path}/pairs.tsv: 3 pairs train, 0 validate, 0 kept apart for test; "
        "1 dropped: 1 with an empty side, 0 repeat a held-out pair",
        "37 source tokens and 12 target tokens train, in one vocabulary of 4",
    ]
    # source 2 + 4, target 8 + 2, of 2 sides of 3 rows of 8
    assert PairLoader(corpus, batch_size=1, seq_len=SEQ_LEN).describe() == [
        "1 batches an epoch, padding 67%; dropped as longer than 24 tokens: 1 to train on, 0 to validate with",
        "1 batches of 3 x 8: 2 pairs, padding 67%",
    ]


def test_test_pairs_are_in_no_batch(tmp_path):
    pairs = [(f"{number}", f"n{number}") for number in range(30)]
    corpus = from_pairs(tmp_path, pairs, valid_pairs=5, test_pairs=10)
    assert (len(corpus.valid_texts), len(corpus.test_texts)) == (5, 10)
    seen = texts(corpus, take(corpus, 2 * an_epoch(corpus)) + valid_batches(corpus, BATCH, SEQ_LEN))
    assert not {*seen} & {*corpus.test_texts}
    assert {*seen} | {*corpus.test_texts} == {*pairs}


SENTENCES = [("the cat sat on the mat", "die Katze saß auf der Matte"), ("the <|eos|> dog", "der <|bos|> Hund")] * 3


@pytest.mark.parametrize("tokenizer", ["bpe", "char", "byte"])
@pytest.mark.parametrize("shared", [True, False])
def test_every_tokenizer_gives_the_text_back(tokenizer, shared, tmp_path):
    corpus = from_pairs(tmp_path, SENTENCES, tokenizer=tokenizer, shared=shared, buckets=(), bpe_vocab=280)
    assert texts(corpus, take(corpus, 1, batch_size=6, seq_len=64)).count(SENTENCES[1]) == 3
    assert sorted(texts(corpus, take(corpus, 1, batch_size=6, seq_len=64))) == sorted(SENTENCES)
    assert (corpus.source_tokenizer is corpus.tokenizer) == (shared or tokenizer == "byte")
    assert not corpus.tokenizer.adds_bos
    for one in (corpus.source_tokenizer, corpus.tokenizer):
        one.save(tmp_path / "saved")
        assert fingerprint(load_tokenizer(tmp_path / "saved")) == fingerprint(one)


def test_a_vocabulary_each_knows_its_own_language(tmp_path):
    corpus = from_pairs(tmp_path, [("abc", "xy"), ("ab", "xyz")], shared=False)
    assert corpus.describe()[1].endswith("in vocabularies of 5 and 5")
    with pytest.raises(ValueError, match="line 1: character 'x'"):
        encode_sources(corpus.source_tokenizer, ["x"], max_length=9)


def test_equal_keys_mean_equal_tokens(tmp_path, corpus):
    assert prepare_pairs(PairsConfig(**SETTINGS), seed=8).key == corpus.key
    settings = [{"examples": 131}, {"lower": True}, {"shared": False}, {"valid_pairs": 31}, {"tokenizer": "byte"}]
    keys = {prepare_pairs(PairsConfig(**{**SETTINGS, **change}), seed=3).key for change in settings}
    assert len(keys | {corpus.key}) == 6


def test_sources_are_encoded_with_their_end():
    tokenizer = char_with_ends("abc")
    assert encode_sources(tokenizer, ["ab", "", "CA"[::-1].lower()], max_length=3) == [[0, 1, 3], [3], [0, 2, 3]]
    assert encode_sources(tokenizer, ["AB"], max_length=3, lower=True) == [[0, 1, 3]]


def test_a_special_token_in_a_source_is_its_letters():
    tokenizer = train_bpe(["some text"], vocab_size=260, adds_bos=False)
    ((*ids, end),) = encode_sources(tokenizer, ["a <|eos|> b"], max_length=30)
    assert tokenizer.decode(ids) == "a <|eos|> b"
    assert end == tokenizer.eos_id
    assert end not in ids


def test_a_source_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="line 2 has 4 tokens with its end, more than the 3 that the model takes; sho"):
        encode_sources(char_with_ends("abc"), ["ab", "abc"], max_length=3)


def test_a_source_with_an_unknown_character_is_refused():
    with pytest.raises(ValueError, match=r"^line 2: character 'z' \(U\+007A\) at 1 is not among the 3 characters"):
        encode_sources(char_with_ends("abc"), ["ab", "az"], max_length=9)
