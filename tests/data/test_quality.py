import random

import pytest

from data.quality import Repeats, Report, content_hash, flaw, num_bands, repeat_ratio, shingles, symbol_ratio

OPEN = {"min_chars": 0, "max_symbol_ratio": 1.0, "max_repeat_ratio": 1.0}


@pytest.mark.parametrize(("text", "ratio"), [("a += b", 1 / 3), ("", 0), ("abc 12\n", 0), ("!?", 1), ("größe_", 1 / 6)])
def test_symbols_are_neither_letters_digits_nor_blanks(text, ratio):
    assert symbol_ratio(text) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("text", "ratio"), [("a\nb\na\na", 1 / 2), ("a\n  a  \n\n\n", 1 / 2), ("", 0), ("\n \n", 0), ("a\nb", 0)]
)
def test_repeats_are_lines_seen_before(text, ratio):
    assert repeat_ratio(text) == ratio


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        ("fine", {}, None),
        (" \n\t", {}, "empty"),
        ("short", {"min_chars": 6}, "shorter than min_chars=6"),
        ("longer", {"min_chars": 6}, None),
        ("!!!a", {"max_symbol_ratio": 0.7}, "symbols above max_symbol_ratio=0.7"),
        ("!!!a", {"max_symbol_ratio": 0.75}, None),
        ("!!!!", {}, None),
        ("x\nx\nx", {"max_repeat_ratio": 0.6}, "repeated lines above max_repeat_ratio=0.6"),
        ("x\nx\ny", {"max_repeat_ratio": 0.6}, None),
    ],
)
def test_a_flaw_is_the_first_filter_that_is_not_passed(text, rules, reason):
    assert flaw(text, **{**OPEN, **rules}) == reason


def words(seed: int, count: int = 400) -> list[str]:
    draw = random.Random(seed)
    return [str(draw.randrange(100_000)) for _ in range(count)]


def changed(original: list[str], count: int) -> str:
    """The words with `count` of them replaced, evenly spread."""
    step = len(original) // count
    return " ".join(
        "new" if index % step == 0 and index // step < count else word for index, word in enumerate(original)
    )


def find_all(texts: list[str], kind, threshold: float = 0.8) -> list[str | None]:
    repeats = Repeats(kind, threshold=threshold)
    return [repeats.find(text, content_hash(text)) for text in texts]


def test_exact_repeats_are_found_after_the_first():
    texts = ["one", "two", "one", "one ", "two"]
    assert find_all(texts, "exact") == [None, None, "exact repeat", None, "exact repeat"]
    assert find_all(texts, "none") == [None] * 5


def test_near_repeats_are_found_from_the_threshold_on():
    """Replacing k of 400 words changes 5 k of 396 shingles: similarity (396 - 5 k) / (396 + 5 k)."""
    original = words(0)
    texts = [" ".join(original), changed(original, 2), changed(original, 25), " ".join(words(1)), " ".join(original)]
    assert find_all(texts, "near") == [None, "near repeat", None, None, "exact repeat"]  # 0.95, 0.52
    assert find_all(texts, "near", threshold=0.4)[2] == "near repeat"
    assert find_all(texts, "near", threshold=0.99)[1] is None


def test_many_different_texts_are_kept():
    assert find_all([" ".join(words(seed, 60)) for seed in range(300)], "near") == [None] * 300


def test_texts_without_words_are_compared_whole():
    assert find_all(["+ - *", "( )", "+ - *"], "near") == [None, None, "exact repeat"]


def test_shingles_are_runs_of_five_words():
    assert shingles("A b, c d e-f!") == ["a b c d e", "b c d e f"]
    assert shingles("A b") == ["a b"]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands = num_bands(threshold)
    found = 1 - (1 - threshold ** (128 // bands)) ** bands
    assert found >= 0.95
    assert bands == 1 or 1 - (1 - threshold ** (256 // bands)) ** (bands // 2) < 0.95


def test_a_report_counts_and_names():
    report = Report(documents=6, bytes=3_200_000)
    for name in "abcd":
        report.drop(name, "empty")
    report.drop("e", "exact repeat")
    assert str(report) == "6 documents, 3.2 MB, 4 dropped: empty, 1 dropped: exact repeat"
    assert report.names == {"empty": ["a", "b", "c"], "exact repeat": ["e"]}
