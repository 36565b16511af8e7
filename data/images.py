"""Handwritten digits as words, and words as pictures: each patch of 2 x 2 pixels is one code. Knows no tokens, no runs.

The pictures are scikit-learn's (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998), which
come with the package. A third of them is kept apart: no document, no codebook is made of them.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float64, Int64

from data import codebook
from data.labelled import Example, Words

PATH = "digits"  # data.path
PATCH = 2  # pixels a side
NUM_CODES = 48
KEPT_APART = 599  # of the 1,797
VARIANTS = 16  # of each picture to train on, beside itself
TURN, SHIFT, NOISE = 8.0, 0.5, 0.7  # standard deviations of a variant: degrees, pixels, levels of grey
RULES = (PATH, PATCH, NUM_CODES, KEPT_APART, VARIANTS, TURN, SHIFT, NOISE)  # what decides the documents
WORDS = Words("image", "p")


class Digits(NamedTuple):
    """Pictures of 8 x 8 pixels, 0 is white and 16 is black, and the digits that they show."""

    pixels: Float64[np.ndarray, "n rows columns"]
    labels: Int64[np.ndarray, " n"]


@functools.cache
def load() -> tuple[Digits, Digits]:
    """The pictures to train on and those kept apart, always the same ones."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            f"data.path={PATH} needs scikit-learn, which is not installed; it comes with `uv sync --group modalities`"
        ) from None
    rows, digits = load_digits(return_X_y=True)
    pixels, labels = np.asarray(rows, np.float64).reshape(-1, 8, 8), np.asarray(digits, np.int64)
    order = np.random.default_rng(0).permutation(len(pixels))
    apart, rest = np.sort(order[:KEPT_APART]), np.sort(order[KEPT_APART:])
    return Digits(pixels[rest], labels[rest]), Digits(pixels[apart], labels[apart])


@functools.cache
def centres() -> Float64[np.ndarray, "codes pixels"]:
    """The codebook, fitted on the pictures to train on alone."""
    return codebook.fit(patches(load()[0].pixels).reshape(-1, PATCH * PATCH), size=NUM_CODES)


def patches(pixels: Float64[np.ndarray, "n rows columns"]) -> Float64[np.ndarray, "n patches pixels"]:
    """Pictures cut into squares, row by row."""
    return rearrange(pixels, "n (r p) (c q) -> n (r c) (p q)", p=PATCH, q=PATCH)


def codes(pixels: Float64[np.ndarray, "n rows columns"]) -> Int64[np.ndarray, "n patches"]:
    """The nearest code of each patch."""
    cut = patches(pixels)
    return codebook.nearest(cut.reshape(-1, PATCH * PATCH), centres()).reshape(cut.shape[:2])


def picture(codes: Sequence[int]) -> Float64[np.ndarray, "rows columns"]:
    """The square picture that the codes stand for; ValueError where they are not as many as a picture has."""
    side = load()[0].pixels.shape[1] // PATCH
    if len(codes) != side * side:
        raise ValueError(f"{len(codes)} codes are no picture: it has {side} x {side} = {side * side}")
    if not all(0 <= code < NUM_CODES for code in codes):
        raise ValueError(f"codes {min(codes)} to {max(codes)} are not all in the codebook: it has 0 to {NUM_CODES - 1}")
    return rearrange(centres()[list(codes)], "(r c) (p q) -> (r p) (c q)", r=side, p=PATCH)


def examples() -> Iterator[Example]:
    """The documents of the pictures to train on: each of them and its variants, both ways round.

    "image p3 … p9 class 7" is one document and "class 7 image p3 … p9" another: within one, the second picture would be
    copied from the first. All of a picture's documents carry its number, so that all train or all are held out.
    """
    learned, _ = load()
    for number, (rows, label) in enumerate(zip(learned_codes().tolist(), learned.labels, strict=True)):
        for row in rows:
            yield Example(f"{PATH}:{number}", WORDS.labelled(row, str(label)))
            yield Example(f"{PATH}:{number}", WORDS.described(row, str(label)))


@functools.cache
def learned_codes() -> Int64[np.ndarray, "n variants patches"]:
    """Each picture to train on and its variants, always the same ones."""
    learned, _ = load()
    draw = np.random.default_rng(0)
    shown = [learned.pixels, *(varied(learned.pixels, draw) for _ in range(VARIANTS))]
    return np.stack([codes(pixels) for pixels in shown], axis=1)


def varied(
    pixels: Float64[np.ndarray, "n rows columns"], draw: np.random.Generator
) -> Float64[np.ndarray, "n rows columns"]:
    """Each picture a little turned and moved, with a little noise: codes that are near each other take turns."""
    from scipy.ndimage import affine_transform

    n, rows, columns = pixels.shape
    middle = np.array([rows - 1, columns - 1]) / 2
    moved = []
    for picture, angle, shift in zip(
        pixels, np.radians(draw.normal(0, TURN, n)), draw.normal(0, SHIFT, (n, 2)), strict=True
    ):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        moved.append(affine_transform(picture, turn, middle - turn @ middle + shift, order=1))
    return np.clip(np.stack(moved) + draw.normal(0, NOISE, pixels.shape), 0, 16)
