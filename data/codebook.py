"""A codebook: vectors become the numbers of their nearest centres, and back. Knows no images, no sound and no words.

The centres are k-means': Lloyd's rounds (IEEE Trans. Inf. Theory 28(2), 1982) from a k-means++ start (Arthur and
Vassilvitskii, SODA 2007, section 2.2). The same vectors always give the same codebook.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int64

ROUNDS = 30  # at most; most fits settle before
MOST_VECTORS = 20_000  # that a fit looks at, evenly chosen
AT_ONCE = 8192  # vectors compared at once


def fit(vectors: Float64[np.ndarray, "n width"], *, size: int) -> Float64[np.ndarray, "size width"]:
    """The centres of `size` clusters of the vectors."""
    if len(vectors) < size:
        raise ValueError(f"a codebook of {size} codes needs as many vectors, not {len(vectors)}; give more data")
    vectors = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), MOST_VECTORS)).astype(np.int64)]
    centres = _spread(vectors, size)
    codes = nearest(vectors, centres)
    for _ in range(ROUNDS):
        counts = np.bincount(codes, minlength=size)
        sums = np.stack([np.bincount(codes, column, minlength=size) for column in vectors.T], axis=1)
        centres = np.where(counts[:, None], sums / np.maximum(counts, 1)[:, None], centres)  # an empty one stays
        before, codes = codes, nearest(vectors, centres)
        if (codes == before).all():
            break
    return centres


def _spread(vectors: np.ndarray, size: int) -> np.ndarray:
    """Each centre is the best of some vectors drawn with odds of their squared distance from those before it."""
    draw, tries = np.random.default_rng(0), 2 + int(np.log(size))
    chosen = [vectors[draw.integers(len(vectors))]]
    distance = np.square(vectors - chosen[0]).sum(axis=1)
    while len(chosen) < size:
        odds = np.cumsum(distance)
        drawn = np.searchsorted(odds, draw.random(tries) * odds[-1]).clip(max=len(vectors) - 1)
        left = [np.minimum(distance, np.square(vectors - vectors[place]).sum(axis=1)) for place in drawn]
        best = int(np.argmin([each.sum() for each in left]))
        chosen.append(vectors[drawn[best]])
        distance = left[best]
    return np.stack(chosen)


def nearest(
    vectors: Float64[np.ndarray, "n width"], centres: Float64[np.ndarray, "size width"]
) -> Int64[np.ndarray, " n"]:
    """The code of each vector; the first where two are as near."""
    return np.concatenate([np.zeros(0, np.int64), *_nearest(vectors, centres)])


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> Iterator[np.ndarray]:
    norms = np.square(centres).sum(axis=1)
    for at in range(0, len(vectors), AT_ONCE):  # |v - c|^2 without |v|^2, which is the same for all c
        yield np.argmin(norms - 2 * vectors[at : at + AT_ONCE] @ centres.T, axis=1)
