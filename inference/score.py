"""How well a model predicts a text of any length: overlapping windows, each token counted once. Knows no files."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from inference.engine import Engine

LARGEST_WINDOW = 2048  # default, where the model's context is longer
TOKENS_AT_ONCE = 4096  # windows are read in batches of about so many tokens


class Score(NamedTuple):
    """What a model makes of a text."""

    tokens: int  # that were predicted: all but the first one, which has nothing before it
    nll: float  # negative log-likelihood, nats, of all of them
    perplexity: float  # exp(nll / tokens)
    bits_per_byte: float  # nll / ln 2 / bytes of the whole text
    bytes: int
    window: int
    stride: int


class Window(NamedTuple):
    """A part of a text that is read at once, and which of its tokens count."""

    start: int
    end: int
    counted: int  # from this token on; those before it are context


def windows(length: int, *, window: int, stride: int) -> list[Window]:
    """Cuts a text so that every token but the first counts once, and sees the `window - stride` before it or all.

    windows(7, window=4, stride=2) -> [(0, 4, 1), (2, 6, 4), (4, 7, 6)]
    """
    found = [Window(0, min(window, length), 1)]
    while found[-1].end < length:
        start = found[-1].start + stride
        found.append(Window(start, min(start + window, length), found[-1].end))
    return found


def score(
    engine: Engine,
    tokens: Sequence[int],
    *,
    num_bytes: int,
    window: int | None = None,
    stride: int | None = None,
    watch: Callable[[Sequence], Iterable] = iter,
) -> Score:
    """Negative log-likelihood of a text. The window is at most the context; the stride is half of it by default."""
    max_length = engine.program.config.max_length
    window = min(max_length, LARGEST_WINDOW) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= max_length:
        raise ValueError(f"window={window} must be between 2 and the model's context of {max_length} tokens")
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} must be between 1 and {window - 1}: each window continues the one before it")
    if len(tokens) < 2:
        raise ValueError(f"the text is {len(tokens)} tokens long; at least 2 are needed, the first one is only context")
    cuts = windows(len(tokens), window=window, stride=stride)
    at_once = max(1, TOKENS_AT_ONCE // window)
    parts: list[float] = []
    for first in watch(range(0, len(cuts), at_once)):
        batch = cuts[first : first + at_once]
        read = engine.logprobs([tuple(tokens[cut.start : cut.end]) for cut in batch])
        parts += [math.fsum(row[cut.counted - cut.start - 1 :]) for row, cut in zip(read, batch, strict=True)]
    nll = -math.fsum(parts)
    if not math.isfinite(nll):
        raise ValueError(f"the model gives the text the log-likelihood {-nll}; its weights are damaged")
    predicted = len(tokens) - 1
    return Score(
        tokens=predicted,
        nll=nll,
        perplexity=perplexity(nll / predicted),
        bits_per_byte=nll / math.log(2) / num_bytes,
        bytes=num_bytes,
        window=window,
        stride=stride,
    )


def perplexity(loss: float) -> float:
    """exp of the mean loss, as far as a float reaches."""
    return math.exp(min(loss, 709.0))
