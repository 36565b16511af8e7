import gzip
import json
import pathlib
import re

import pytest

from data.config import PairsConfig, bucket_edges
from data.pairs import read_pairs

PAIRS = [(f"sentence {number}", f"Satz {number}") for number in range(20)]


def write_two(folder: pathlib.Path, stem: str, pairs: list[tuple[str, str]], ending: str = "") -> None:
    folder.mkdir(exist_ok=True)
    for side, language in enumerate(("en", "de")):
        content = "".join(pair[side] + "\n" for pair in pairs).encode()
        path = folder / f"{stem}.{language}{ending}"
        path.write_bytes(gzip.compress(content) if ending else content)


def config(path: object, **settings) -> PairsConfig:
    return PairsConfig(path=str(path), **{"valid_pairs": 0, **settings})


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    write_two(tmp_path, "train", PAIRS)
    return tmp_path


def refused(message: str):
    return pytest.raises(ValueError, match=f"^(?=[^\n]*$).*{message}")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_folder_of_two_files(ending, tmp_path):
    write_two(tmp_path, "train", PAIRS, ending)
    texts = read_pairs(config(tmp_path))
    assert texts == (PAIRS, [], [], 0, 0)


@pytest.mark.parametrize("stem", ["val", "valid", "dev"])
def test_a_folder_brings_its_validation(stem, folder):
    write_two(folder, stem, PAIRS[:2], ".gz")
    texts = read_pairs(config(folder, valid_pairs=7))
    assert (texts.train, texts.valid) == (PAIRS, PAIRS[:2])


def test_two_files_by_name(folder):
    texts = read_pairs(config(f"{folder}/train.de,{folder}/train.en"))
    assert texts.train == [(target, source) for source, target in PAIRS]


def test_languages_turn_a_folder_around(folder):
    assert read_pairs(config(folder, source="de", target="en")).train[0] == ("Satz 0", "sentence 0")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_one_file(kind, ending, tmp_path):
    line = {"tsv": "\t".join, "jsonl": lambda pair: json.dumps({"de": pair[1], "en": pair[0], "id": 3})}[kind]
    content = "".join(line(pair) + "\n" for pair in PAIRS).encode()
    path = tmp_path / f"pairs.{kind}{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    assert read_pairs(config(path)).train == PAIRS


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "train.en").write_bytes("\ufeffone\u2028line\r\ntwo\x0b\x85".encode())
    (tmp_path / "train.de").write_bytes(b"eine\r\nzwei\r\n")
    assert read_pairs(config(tmp_path)).train == [("one\u2028line", "eine"), ("two", "zwei")]


def test_blank_sides_are_dropped_and_counted(tmp_path):
    write_two(tmp_path, "train", [("a", ""), (" b ", "c"), ("\u00a0", "d"), ("", "")])
    write_two(tmp_path, "val", [("e", "f"), ("g", "\t")])
    texts = read_pairs(config(tmp_path))
    assert texts == ([("b", "c")], [("e", "f")], [], 4, 0)
    assert texts.report() == (
        "1 pairs train, 1 validate, 0 kept apart for test; 4 dropped: 4 with an empty side, 0 repeat a held-out pair"
    )


def test_lower_case_on_both_sides(folder):
    assert read_pairs(config(folder, lower=True)).train[3] == ("sentence 3", "satz 3")


def test_held_out_pairs_are_drawn_alike_and_apart(folder):
    texts, again = (read_pairs(config(folder, valid_pairs=3, test_pairs=4)) for _ in range(2))
    assert texts == again
    assert [len(part) for part in texts[:3]] == [13, 3, 4]
    assert sorted(texts.train + texts.valid + texts.test) == sorted(PAIRS)
    assert texts.train == [pair for pair in PAIRS if pair in texts.train]  # in the order of the file
    assert texts.valid != PAIRS[:3]


def test_a_held_out_pair_is_not_trained_on_where_the_text_repeats_it(tmp_path):
    write_two(tmp_path, "train", PAIRS * 3)
    texts = read_pairs(config(tmp_path, valid_pairs=5, test_pairs=5))
    assert (len(texts.train), texts.num_repeats) == (30, 20)
    assert len({*texts.train, *texts.valid, *texts.test}) == 20
    assert not {*texts.train} & {*texts.valid, *texts.test}


def test_dates_are_generated():
    texts = read_pairs(PairsConfig(examples=100, valid_pairs=10, test_pairs=5, lower=True))
    assert [len(part) for part in texts[:3]] == [85, 10, 5]
    assert all(source == source.lower() for source, _ in texts.train)


def test_different_numbers_of_lines(folder):
    (folder / "train.de").write_text("Satz 0\nSatz 1\n")
    with refused(
        f"{folder}/train.en has 20 lines and {folder}/train.de has 2; .* "
        r"\(line 1: 'sentence 0' \| 'Satz 0'\)"
    ):
        read_pairs(config(folder))
    (folder / "train.de").write_text("")
    with refused(r"has 0; .*\(line 1: 'sentence 0' \| nothing\)"):
        read_pairs(config(folder))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_another_encoding(ending, tmp_path):
    write_two(tmp_path, "train", PAIRS, ending)
    content = "Satz\nZwei Männer\n".encode("latin-1")
    path = tmp_path / f"train.de{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    with refused(f"{path} line 2 is not UTF-8: byte 7 is 0xE4; convert the file to UTF-8"):
        read_pairs(config(tmp_path))


def test_a_cut_gzip_file(tmp_path):
    write_two(tmp_path, "train", PAIRS, ".gz")
    path = tmp_path / "train.de.gz"
    whole = path.read_bytes()
    for content in (whole[:-9], b"plain text", whole[:20] + b"\xff" * 20 + whole[40:]):
        path.write_bytes(content)
        with refused(f"{path} is not a whole gzip file: .*; fetch or compress it again"):
            read_pairs(config(tmp_path))


def test_a_folder_without_the_language_says_what_it_has(folder):
    with refused(f"folder {folder} has no train.fr or train.fr.gz, it has train.de, train.en; set data.source and"):
        read_pairs(config(folder, target="fr"))
    (folder / "val.en").write_text("a\n")
    with refused(f"folder {folder} has no val.de or val.de.gz, it has train.de, train.en, val.en"):
        read_pairs(config(folder))


def test_a_folder_of_many_files_shows_some(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}").touch()
    with refused("it has 00, 01, 02, 03, 04, 05, 06, 07, …; set"):
        read_pairs(config(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "no.en,no.de", "train.en,train.de,train.fr"])
def test_a_path_that_is_not_there(name, folder):
    with refused(f"data.path={folder}/{name} does not exist; give dates, a folder with train.SOURCE"):
        read_pairs(config(f"{folder}/{name}"))


def test_one_of_two_files_is_not_there(folder):
    with refused(f"there is no file {folder}/train.d; {folder} has train.de, train.en"):
        read_pairs(config(f"{folder}/train.en,{folder}/train.d"))


def test_one_plain_file(folder):
    with refused(f"data.path={folder}/train.en is one file and neither .tsv nor .jsonl; give dates"):
        read_pairs(config(folder / "train.en"))


def test_the_same_file_twice(folder):
    with refused(f"{folder}/train.en is both source and target; give the file of each language"):
        read_pairs(config(f"{folder}/train.en,{folder}/../{folder.name}/train.en"))


def test_the_same_text_on_both_sides(tmp_path):
    write_two(tmp_path, "train", [("a", "a"), ("b", "b ")])
    with refused(f"data.path={tmp_path} has the same text on both sides of all 2 pairs; give the source language"):
        read_pairs(config(tmp_path))


@pytest.mark.parametrize(("pairs", "lines"), [([], 0), ([("a", ""), ("", "b")], 2)])
def test_no_pairs_at_all(pairs, lines, tmp_path):
    write_two(tmp_path, "train", pairs)
    with refused(f"data.path={tmp_path} holds no pair: {lines} lines, none with text on both sides"):
        read_pairs(config(tmp_path))


@pytest.mark.parametrize(("line", "tabs"), [("alone", 0), ("", 0), ("a\tb\tc", 2)])
def test_a_tsv_line_without_one_tab(line, tabs, tmp_path):
    (tmp_path / "pairs.tsv").write_text(f"a\tb\n{line}\nc\td\n")
    with refused(re.escape(f"pairs.tsv line 2 has {tabs} tabs, not 1: {line!r}; each line is source TAB target")):
        read_pairs(config(tmp_path / "pairs.tsv"))


def test_a_tsv_line_may_have_an_empty_side(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a\tb\n\tc\nd\t\n")
    assert read_pairs(config(tmp_path / "pairs.tsv")) == ([("a", "b")], [], [], 2, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"en": "a"}', "has no key 'de', it has en; set data.source and data.target"),
        ("{}", "has no key 'en', it has none; set data.source and data.target"),
        ('{"en": "a", "de": 3}', "holds int under 'de' instead of text; correct the line"),
        ('{"en": "a", "de": "\\ud800"}', "holds half a surrogate pair under 'de', which no text has"),
        ('["a", "b"]', "holds list; each line holds one object"),
        ("{en: a}", "is not JSON: .*; each line holds one object"),
    ],
)
def test_a_jsonl_line_that_holds_no_pair(line, message, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(f'{{"en": "a", "de": "b"}}\n\n{line}\n')
    with refused(f"pairs.jsonl line 3 {message}"):
        read_pairs(config(tmp_path / "pairs.jsonl"))


def test_holding_out_everything(folder):
    with refused("valid_pairs=12 and data.test_pairs=8 leave nothing to train on of 20 different pairs; lower them"):
        read_pairs(config(folder, valid_pairs=12, test_pairs=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "de"}, "data.source=de and data.target=de are the same; translate between two"),
        ({"buckets": (16, 8)}, r"data.buckets=\(16, 8\) must rise from 2 or more, as 16,24,32 does"),
        ({"buckets": (1, 8)}, r"data.buckets=\(1, 8\) must rise"),
        ({"buckets": (8, 8)}, r"data.buckets=\(8, 8\) must rise"),
        ({"bpe_vocab": 257}, "data.bpe_vocab=257 must be at least 258"),
        ({"test_pairs": -1}, "data.test_pairs=-1 must be at least 0"),
        ({"examples": 0}, "data.examples=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with refused(message):
        PairsConfig(**settings)


def test_the_longest_row_is_the_last_bucket():
    assert bucket_edges((16, 24), seq_len=40) == (16, 24, 40)
    assert bucket_edges((16, 24), seq_len=24) == (16, 24)
    assert bucket_edges((), seq_len=8) == (8,)
    with refused("data.buckets has 24, more than train.seq_len=16; leave it out, or raise train.seq_len"):
        bucket_edges((16, 24), seq_len=16)
