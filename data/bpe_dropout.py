"""Words of a BPE in other pieces than its own: BPE-dropout (Provilkov et al. 2020, arXiv:1910.13267).

A model that has met a word in several spellings knows its pieces better. A table draws one spelling of each word, so
that the whole text is encoded as fast as ever; several tables give several spellings, the same at each call.
"""

import itertools
import json
import random
from collections.abc import Mapping

from data.huggingface_tokenizer import HuggingFaceTokenizer
from data.words import WordTable


def draw_spellings(tokenizer: HuggingFaceTokenizer, dropout: float, *, seed: int) -> WordTable:
    """A table that spells each word with merges left out at random. Special tokens in a text are their letters."""
    parts = json.loads(tokenizer.tokenizer.to_str())
    ids: dict[str, int] = parts["model"]["vocab"]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(parts["model"]["merges"])}
    cut = tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str
    draw = random.Random(seed)

    def spell(words: str) -> list[int]:
        pieces = (piece for word, _ in cut(words) for piece in merge(list(word), ranks, dropout, draw))
        return [ids[piece] for piece in pieces]

    return WordTable(lambda words: [spell(word) for word in words])


def merge(pieces: list[str], ranks: Mapping[tuple[str, str], int], dropout: float, draw: random.Random) -> list[str]:
    """Join neighbours, the earliest merge first, until none is left; each is passed over with chance `dropout`."""
    while True:
        pairs = enumerate(itertools.pairwise(pieces))
        found = [(ranks[pair], at) for at, pair in pairs if pair in ranks and draw.random() >= dropout]
        if not found:
            return pieces
        _, at = min(found)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
