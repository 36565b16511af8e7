import errno
import itertools
import json
import os
import pathlib

import pytest

from data import corpus as corpus_module
from data import sources, survey
from data.cache import TokenCache
from data.config import DataConfig, SourceConfig
from data.corpus import Corpus, prepare
from data.sources import Document
from data.tokenizer import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, WordTokenizer, train_bpe

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


@pytest.fixture
def room(tmp_path):
    """Forty small texts, and a cache of their own."""
    for index in range(40):
        (tmp_path / "text" / f"{index:02}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "text" / f"{index:02}.txt").write_text(f"{index} {WORDS[index % 5]} text\n")
    return tmp_path


def config(room: pathlib.Path, **settings) -> DataConfig:
    return DataConfig(**{"path": str(room / "text"), "cache_dir": str(room / "cache"), "tokenizer": "byte", **settings})


def documents(tokens: TokenCache, corpus: Corpus) -> list[str]:
    offsets = tokens.offsets.tolist()
    return [corpus.tokenizer.decode(tokens.tokens[start:end].tolist()) for start, end in itertools.pairwise(offsets)]


def both(corpus: Corpus) -> tuple[list[str], list[str]]:
    return documents(corpus.train[0], corpus), documents(corpus.valid[0], corpus)


def every(corpus: Corpus) -> list[str]:
    train, valid = both(corpus)
    return train + valid


@pytest.fixture
def readings(monkeypatch):
    """Counts how often each file's text is read."""
    read, original = [], sources._read_text

    def counting(path, *, is_alone):
        read.append(path.name)
        return original(path, is_alone=is_alone)

    monkeypatch.setattr(sources, "_read_text", counting)
    return read


def test_documents_are_split_by_content_and_framed(room):
    corpus = prepare(config(room, valid_fraction=0.1), seed=0)
    train, valid = both(corpus)
    assert (len(train), len(valid)) == (36, 4)
    assert sorted(train + valid) == sorted(path.read_text() for path in (room / "text").iterdir())
    first = corpus.train[0].tokens[: corpus.train[0].offsets[1]].tolist()
    assert (first[0], first[-1]) == (256, 257)


def test_what_is_held_out_does_not_depend_on_names_and_hardly_on_neighbours(room):
    _, valid = both(prepare(config(room, valid_fraction=0.1), seed=0))
    for path in sorted((room / "text").iterdir()):
        path.rename(room / "text" / f"z{100 - int(path.stem)}.txt")
    assert sorted(both(prepare(config(room, valid_fraction=0.1), seed=0))[1]) == sorted(valid)
    for index in range(20):
        (room / "text" / f"new{index}.txt").write_text(f"new {index}")
    assert len(set(both(prepare(config(room, valid_fraction=0.1), seed=0))[1]) & set(valid)) >= 2


def test_equal_documents_stay_together(room):
    for index in range(40):
        (room / "text" / f"copy{index:02}.txt").write_text((room / "text" / f"{index:02}.txt").read_text())
    train, valid = both(prepare(config(room, valid_fraction=0.1, dedup="none"), seed=0))
    assert len(train) + len(valid) == 80
    assert not set(train) & set(valid)


def test_repeats_are_dropped_and_reported(room):
    (room / "text" / "copy.txt").write_text("0 alpha text\n")
    (room / "text" / "empty.txt").write_text(" \n")
    corpus = prepare(config(room), seed=0)
    assert len(every(corpus)) == 40
    (report,) = corpus.reports
    assert report.documents == 42
    assert report.dropped == {"exact repeat": 1, "empty": 1}
    assert [pathlib.Path(name).name for name in report.names["exact repeat"]] == ["copy.txt"]
    assert corpus.describe()[0].startswith(
        f"{room / 'text'}: 42 documents, 0.0 MB, 1 dropped: exact repeat, 1 dropped: empty; "
    )


def test_filters_drop_what_they_say(room):
    (room / "text" / "symbols.txt").write_text("+-*/" * 20)
    (room / "text" / "lines.txt").write_text("same\n" * 20)
    corpus = prepare(config(room, max_symbol_ratio=0.5, max_repeat_ratio=0.5, min_chars=14), seed=0)
    assert {reason.split("_")[0]: count for reason, count in corpus.reports[0].dropped.items()} == {
        "shorter than min": sum(len(path.read_text()) < 14 for path in (room / "text").iterdir()),
        "symbols above max": 1,
        "repeated lines above max": 1,
    }


def test_the_tail_of_one_text_is_held_out(room):
    text = "".join(f"line {index}\n" for index in range(1000))
    (room / "one.txt").write_text(text)
    corpus = prepare(
        config(room, path=str(room / "one.txt"), tokenizer="char", split="tail", valid_fraction=0.1), seed=0
    )
    border = int(len(text) * 0.9)
    assert both(corpus) == ([text[:border]], [text[border:]])
    assert corpus.train[0].num_tokens + corpus.valid[0].num_tokens == len(text)
    assert corpus.tokenizer.encode("line") == corpus.tokenizer.encode_batch(["line"])[0].tolist()


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_lone_text_is_cut_and_has_neither_begin_nor_end(tokenizer, room):
    text = "".join(f"line {index}\n" for index in range(100))
    (room / "one.txt").write_text(text)
    corpus = prepare(config(room, path=str(room / "one.txt"), tokenizer=tokenizer, bpe_vocab=270), seed=0)
    special = {corpus.tokenizer.bos_id, corpus.tokenizer.eos_id}
    for tokens in (corpus.train[0], corpus.valid[0]):
        assert tokens.num_documents == 1
        assert not special & set(tokens.tokens.tolist())
    assert not corpus.tokenizer.adds_bos
    assert "".join(both(corpus)[0] + both(corpus)[1]) == text


def test_the_tail_of_many_texts_is_the_last_of_them(room):
    train, valid = both(prepare(config(room, split="tail", valid_fraction=0.25), seed=0))
    text = "".join(path.read_text() for path in sorted((room / "text").iterdir()))
    assert "".join(train + valid) == text
    assert len("".join(train)) == int(len(text) * 0.75)


@pytest.mark.parametrize(("valid_fraction", "held_out"), [(0.025, 1), (0.024, 1), (0.05, 2)])
def test_few_documents_are_held_out_by_place(valid_fraction, held_out, room):
    """Forty documents: from 1/40 on whole ones, below that the end of the last."""
    train, valid = both(prepare(config(room, valid_fraction=valid_fraction), seed=0))
    is_cut = valid_fraction < 1 / 40
    assert len(valid) == held_out
    assert (valid[0] in (room / "text" / "39.txt").read_text()[1:]) == is_cut
    assert len(train) == 40 - held_out + is_cut


def test_a_long_text_in_parts_equals_the_whole(room, monkeypatch):
    text = "".join(f"line {index} of many\n" for index in range(200))
    (room / "text" / "long.txt").write_text(text)
    whole = prepare(config(room), seed=0)
    monkeypatch.setattr(sources, "PART_BYTES", 64)
    parts = prepare(config(room, cache_dir=str(room / "other")), seed=0)
    assert sorted(every(parts)) == sorted(every(whole))
    (room / "one.txt").write_text(text)
    lone = prepare(config(room, path=str(room / "one.txt"), valid_fraction=0.1), seed=0)
    border = int(len(text) * 0.9)
    assert both(lone) == ([text[:border]], [text[border:]])


def test_nothing_is_held_out_where_that_is_asked_for(room):
    train, valid = both(prepare(config(room, valid_fraction=0.0), seed=0))
    assert (len(train), valid) == (40, [])


def test_a_second_start_reads_no_text(room, readings):
    first = prepare(config(room, tokenizer="bpe", bpe_vocab=270), seed=0)
    assert len(readings) == 80  # two passes
    second = prepare(config(room, tokenizer="bpe", bpe_vocab=270, packing="stream", prefetch=1), seed=5)
    assert len(readings) == 80
    assert second.key == first.key
    assert both(second) == both(first)
    assert second.reports == first.reports


def test_touched_files_with_the_same_content_are_not_tokenised_again(room, readings):
    first = prepare(config(room), seed=0)
    for path in (room / "text").iterdir():
        os.utime(path, (1, 1))
    second = prepare(config(room), seed=0)
    assert len(readings) == 120  # surveyed again, not tokenised again
    assert second.key == first.key


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "char"},
        {"valid_fraction": 0.5},
        {"split": "tail"},
        {"min_chars": 14},
        {"tokenizer": "bpe", "bpe_vocab": 258},
    ],
)
def test_what_changes_the_tokens_changes_the_key(change, room):
    assert prepare(config(room, **change), seed=0).key != prepare(config(room), seed=0).key


def test_changed_content_changes_the_key(room):
    before = prepare(config(room), seed=0)
    (room / "text" / "00.txt").write_text("changed\n")
    after = prepare(config(room), seed=0)
    assert after.key != before.key
    assert "changed\n" in every(after)


@pytest.mark.parametrize("name", ["train.tokens", "valid.offsets", "entry.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_anew(name, room, readings):
    first = prepare(config(room, tokenizer="bpe", bpe_vocab=270), seed=0)
    wanted = both(first)
    (path,) = (room / "cache").glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-1])
    again = prepare(config(room, tokenizer="bpe", bpe_vocab=270), seed=0)
    assert both(again) == wanted
    assert again.key == first.key
    assert len(readings) > 80
    count = len(readings)
    prepare(config(room, tokenizer="bpe", bpe_vocab=270), seed=0)
    assert len(readings) == count


def test_a_damaged_index_is_made_anew(room):
    first = prepare(config(room), seed=0)
    (index,) = (room / "cache" / "index").iterdir()
    index.write_text("{")
    assert prepare(config(room), seed=0).key == first.key
    assert json.loads(index.read_text())["entries"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("byte", ByteTokenizer), ("char", CharTokenizer), ("words", WordTokenizer), ("bpe", HuggingFaceTokenizer)],
)
def test_the_tokenizer_is_the_one_asked_for_and_comes_back(name, kind, room):
    settings = config(room, tokenizer=name, bpe_vocab=300)
    fresh, cached = prepare(settings, seed=0), prepare(settings, seed=0)
    assert isinstance(fresh.tokenizer, kind)
    assert isinstance(cached.tokenizer, kind)
    assert fresh.tokenizer.vocab_size == cached.tokenizer.vocab_size


def test_a_tokenizer_of_a_folder_is_taken_as_it_is(room):
    made = train_bpe(["alpha beta"], vocab_size=262, adds_bos=False)
    made.save(room / "tokenizer")
    corpus = prepare(config(room, tokenizer=str(room / "tokenizer")), seed=0)
    first = corpus.train[0].tokens[: corpus.train[0].offsets[1]].tolist()
    assert first == [*made.encode(documents(corpus.train[0], corpus)[0]), 1]
    train_bpe(["gamma delta"], vocab_size=263, adds_bos=False).save(room / "tokenizer")
    assert prepare(config(room, tokenizer=str(room / "tokenizer")), seed=0).key != corpus.key


def test_a_mixture_has_a_cache_for_each_source(room):
    (room / "one.txt").write_text("one text alone\n" * 50)
    mixture = (SourceConfig(path=str(room / "text"), weight=3.0), SourceConfig(path=str(room / "one.txt")))
    corpus = prepare(config(room, path="stdlib", mixture=mixture, valid_fraction=0.1), seed=0)
    assert corpus.weights == (3, 1)
    assert [tokens.num_documents for tokens in corpus.train] == [36, 1]
    assert [tokens.num_documents for tokens in corpus.valid] == [4, 1]
    assert corpus.tokenizer.adds_bos
    assert len(corpus.describe()) == 2


def test_a_document_counts_once_in_a_mixture(room):
    (room / "more").mkdir()
    for name, text in (("a", "0 alpha text\n"), ("b", "only here\n")):
        (room / "more" / name).write_text(text)
    mixture = tuple(SourceConfig(path=str(room / name)) for name in ("text", "more"))
    corpus = prepare(config(room, path="stdlib", mixture=mixture, valid_fraction=0.0), seed=0)
    assert documents(corpus.train[1], corpus) == ["only here\n"]
    assert [report.dropped for report in corpus.reports] == [{}, {"exact repeat": 1}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_chars": 1000}, "leaves no document to train on: 40 documents, 0.0 MB, 40 dropped: shorter than"),
        (
            {"tokenizer": "no/where"},
            "tokenizer 'no/where' is not bpe, byte, char, words, nor an existing folder",
        ),
        ({"path": "no/where"}, "data.path=no/where does not exist; give stdlib, a text file or folder"),
    ],
)
def test_what_cannot_be_prepared_is_refused(settings, message, room, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message) as error:
        prepare(config(room, **settings), seed=0)
    assert "\n" not in str(error.value)


def test_one_document_cannot_be_held_out(room):
    (room / "one.txt").write_text("one text\n")
    with pytest.raises(
        ValueError, match=r"needs at least 2 documents to hold one out, .*one.txt has 1; set data.split"
    ):
        prepare(config(room, path=str(room / "one.txt"), split="document"), seed=0)


def test_words_are_never_cut(room):
    with pytest.raises(ValueError, match=r"data.split=tail cuts a text to hold out its end; set data.split=document"):
        prepare(config(room, tokenizer="words", split="tail"), seed=0)


def test_documents_of_one_origin_stay_on_one_side(room, monkeypatch):
    """Both texts of each of 20 things, in sources that say what a thing is."""
    made = [Document("", f"{order} {thing}", origin=str(thing)) for thing in range(20) for order in ("one", "two")]
    for module in (survey, corpus_module):
        monkeypatch.setattr(module, "read_with_progress", lambda source, what: iter(made))
    corpus = prepare(config(room, tokenizer="words", valid_fraction=0.25), seed=0)
    train, valid = both(corpus)
    assert (len(train), len(valid)) == (30, 10)
    assert not {text.split()[1] for text in train} & {text.split()[1] for text in valid}


def test_a_text_that_changes_while_it_is_read_is_refused(room, monkeypatch):
    def change(*arguments):
        (room / "text" / "05.txt").write_text("changed meanwhile\n")
        return original(*arguments)

    original = corpus_module._make_tokenizer
    monkeypatch.setattr(corpus_module, "_make_tokenizer", change)
    with pytest.raises(ValueError, match="changed while it was read; start again"):
        prepare(config(room), seed=0)
    assert not list((room / "cache").glob("tokens-*"))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(room, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot keep tokenised text in .*: No space left on device; set data.cache_dir"):
        prepare(config(room), seed=0)
    assert not list((room / "cache").glob(".new-*"))
    monkeypatch.undo()
    assert prepare(config(room), seed=0).train[0].num_documents == 38


def test_the_sample_is_spread_over_the_text_and_bounded(monkeypatch):
    monkeypatch.setattr(survey, "SEGMENT_CHARS", 10)
    sample = survey._Sample(100)
    for index in range(1000):
        sample.add(f"{index:010}{index:010}", index.to_bytes(16))
    chosen = [int(segment) for segment in sample.segments()]
    assert len(chosen) == 10
    assert max(chosen) > 500 > min(chosen)
    backwards = survey._Sample(100)
    for index in reversed(range(1000)):
        backwards.add(f"{index:010}{index:010}", index.to_bytes(16))
    assert sorted(backwards.segments()) == sorted(sample.segments())


def test_no_sample_is_kept_where_none_is_needed():
    sample = survey._Sample(0)
    sample.add("text", bytes(16))
    assert sample.segments() == []
