"""Words find their tokens, whatever the tokenizer makes of them."""

import pytest

from data.tokenizer import ByteTokenizer, CharTokenizer
from evals.reading import read, tokens_of

TEXT = "the cat saw the dog; it's there"


def spelled(text: str, word: str) -> str:
    """What the tokens of a word spell, and where the first stands."""
    tokenizer = CharTokenizer(characters="".join(sorted(set(text))))
    reading = read(tokenizer, text)
    tokens = tokens_of(reading, word, "--from")
    return f"{tokens[0]} {tokenizer.decode([reading.tokens[at] for at in tokens])}"


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("the", "0 the"),
        ("the#2", "12 the"),
        ("dog", "16 dog"),
        ("it's", "21 it's"),
        ("saw the", "8 saw the"),
        ("ere", "28 ere"),  # no word of its own: a part of one
    ],
)
def test_a_word_is_found_as_a_whole_then_as_a_part(word, found):
    assert spelled(TEXT, word) == found


def test_the_beginning_token_is_of_no_word_and_bytes_share_a_character():
    reading = read(ByteTokenizer(), "aü b")
    assert reading.tokens == (256, 97, 0xC3, 0xBC, 32, 98)
    assert reading.labels == ("⟨bos⟩", "a", "\ufffd", "\ufffd", "␣", "b")
    assert reading.spans == ((0, 0), (0, 1), (1, 2), (1, 2), (2, 3), (3, 4))
    assert tokens_of(reading, "aü", "--to") == (1, 2, 3)
    assert tokens_of(reading, "b", "--to") == (5,)


def test_what_is_not_in_the_text_is_refused_with_what_is():
    reading = read(ByteTokenizer(), TEXT)
    with pytest.raises(ValueError, match="--to 'animal' is not in the text; its words are: the, cat, saw, dog, it's"):
        tokens_of(reading, "animal", "--to")
    with pytest.raises(ValueError, match="'the' 2 times"):
        tokens_of(reading, "the#3", "--from")
