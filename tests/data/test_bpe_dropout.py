import random

import pytest

from data.bpe_dropout import draw_spellings, merge
from data.tokenizer import train_bpe

TEXTS = [
    "Eine Frau in einem grünen Hemd läuft.",
    "Two men, <|eos|> and 12 dogs",
    "",
    "  wide   gaps ",
    "the theme there",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS * 3, vocab_size=330, adds_bos=False)


def spelled(tokenizer, dropout, seed=0):
    return [tokens.tolist() for tokens in draw_spellings(tokenizer, dropout, seed=seed).encode(TEXTS)]


def test_without_dropout_words_are_spelled_as_the_tokenizer_spells_them(tokenizer):
    assert spelled(tokenizer, 0.0) == [tokenizer.letters.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_with_all_merges_left_out_words_are_bytes(tokenizer):
    assert [len(tokens) for tokens in spelled(tokenizer, 1.0)] == [len(text.encode()) for text in TEXTS]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_other_spellings_are_the_same_text(tokenizer, dropout):
    spellings = [spelled(tokenizer, dropout, seed) for seed in range(4)]
    for tokens in spellings:
        assert [tokenizer.decode(each) for each in tokens] == [
            tokenizer.decode(each) for each in spelled(tokenizer, 0.0)
        ]
    assert len({str(tokens) for tokens in spellings}) == 4
    assert spelled(tokenizer, dropout, 2) == spellings[2]


def test_the_earliest_merge_comes_first():
    ranks = {("a", "b"): 1, ("b", "c"): 0, ("a", "bc"): 2}
    assert merge(list("abcab"), ranks, 0.0, random.Random(0)) == ["abc", "ab"]


def test_a_merge_is_passed_over_as_often_as_was_asked():
    draw = random.Random(0)
    whole = sum(len(merge(["a", "b"], {("a", "b"): 0}, 0.3, draw)) == 1 for _ in range(4000))
    assert whole / 4000 == pytest.approx(0.7, abs=0.03)  # 4 standard deviations
