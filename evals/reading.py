"""A text as a model reads it: tokens, a label for each, and which tokens a word is. Knows no model."""

import itertools
import re
from typing import NamedTuple

from data.tokenizer import Tokenizer
from inference.generate import text_tokens

OCCURRENCE = re.compile(r"(.+)#([1-9]\d*)", re.DOTALL)  # the#2 is the second "the"
WORD = re.compile(r"\w+(?:['’]\w+)*")


class Reading(NamedTuple):
    """What the model sees of a text."""

    tokens: tuple[int, ...]
    labels: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]  # characters of `text` that each token has a part in
    text: str  # what the tokens spell


def read(tokenizer: Tokenizer, text: str) -> Reading:
    """The tokens of a text, a beginning token included where the model wants one."""
    tokens = text_tokens(text, tokenizer)
    spans = []
    for before, now in itertools.pairwise([tokenizer.decode(tokens[:n]) for n in range(len(tokens) + 1)]):
        start, certain = (len(part.rstrip("\ufffd")) for part in (before, now))
        spans.append((min(start, certain), min(certain + 1, len(now))))  # an unfinished character is a part of it
    labels = tuple(label(tokenizer, token) for token in tokens)
    return Reading(tuple(tokens), labels, tuple(spans), tokenizer.decode(tokens))


def label(tokenizer: Tokenizer, token: int) -> str:
    """A short name of a token: its text without the space before it.

    " animal" -> "animal"    "\\n" -> "↵"    " " -> "␣"    the token that begins a text -> "⟨bos⟩"
    """
    if token in (tokenizer.bos_id, tokenizer.eos_id):
        return "⟨bos⟩" if token == tokenizer.bos_id else "⟨eos⟩"
    text = tokenizer.decode([token])
    shown = text.strip(" ").replace("\n", "↵").replace("\t", "⇥")
    return shown or ("␣" if text else f"⟨{token}⟩")


def tokens_of(reading: Reading, asked: str, option: str) -> tuple[int, ...]:
    """Which tokens hold a word or phrase of the text, `the#2` its second occurrence; `option` asked for it."""
    match = OCCURRENCE.fullmatch(asked)
    word, wanted = (match[1], int(match[2])) if match else (asked, 1)
    exact = re.escape(word)
    found = [*re.finditer(rf"(?<!\w){exact}(?!\w)", reading.text)] or [*re.finditer(exact, reading.text)]
    if not word or not found:
        words = ", ".join(dict.fromkeys(WORD.findall(reading.text)))
        raise ValueError(f"{option} {word!r} is not in the text; its words are: {words}")
    if wanted > len(found):
        raise ValueError(f"{option} {asked}: the text has {word!r} {len(found)} times; give a number up to that")
    low, high = found[wanted - 1].span()
    return tuple(at for at, (start, end) in enumerate(reading.spans) if start < high and end > low)
