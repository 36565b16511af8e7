"""Which heads tie one word to another: a ranking of attention maps. Knows no text and no pictures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evals.attention_maps import AttentionMap


class Tie(NamedTuple):
    """How much one head takes of one word where another is the query.

    Weights are summed over the tokens of the word looked at, since they share what is given to it, and averaged over
    the tokens of the word that looks.
    """

    layer: int  # place of its map among the maps
    head: int
    weight: float
    without_first: float  # the same of what does not go to the first key
    first: float  # what goes to the first key
    most: str  # the key that the word looks at most
    most_weight: float


def ties(maps: Sequence[AttentionMap], queries: Sequence[int], keys: Sequence[int]) -> list[Tie]:
    """Every head of every map, those with the largest weight first."""
    found = []
    for layer, map in enumerate(maps):
        rows = np.mean(map.weights[:, list(queries)], axis=1)
        for head, row in enumerate(rows):
            weight, first, most = float(np.sum(row[list(keys)])), float(row[0]), int(np.argmax(row))
            rest = weight - (first if 0 in keys else 0.0)
            share = rest / (1 - first) if first < 1 else 0.0
            found.append(Tie(layer, head, weight, share, first, map.keys[most], float(row[most])))
    return sorted(found, key=lambda tie: -tie.weight)
