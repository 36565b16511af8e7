import pytest

from data.labelled import Words

WORDS = Words("image", "p")


def test_documents_and_prompts():
    assert WORDS.labelled([3, 7], "4") == "image p3 p7 class 4"
    assert WORDS.described([3, 7], "4") == "class 4 image p3 p7"
    assert WORDS.labelled([3, 7], "4") == f"{WORDS.question([3, 7])} 4"
    assert WORDS.described([3, 7], "4") == f"{WORDS.wish('4')} p3 p7"


def test_codes_are_read_back():
    assert WORDS.read(" p3 p7") == [3, 7]
    assert WORDS.read("") == []


@pytest.mark.parametrize("word", ["class", "p", "a3", "px", "3", "p-1"])
def test_what_is_no_code_is_named(word):
    with pytest.raises(ValueError, match=f"^'{word}' is no code of an image; codes are written p0, p1, …$"):
        WORDS.read(f"p3 {word}")
