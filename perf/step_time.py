"""Seconds of a step of serving, put together from predictions of whole prefills and decode steps. Knows no scheduler.

A step that reads prompts beside answers multiplies by every weight once: what is no attention costs what as many tokens
of a prompt cost, or of answers where there is nothing else; attention of answers and of prompts is added to it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from parallel.chips import Chip
from perf.predict import predict
from perf.replica import Step
from perf.work import Job

EXACT = 8  # counts up to which no value is interpolated
SHORTEST = 64  # keys; fewer are taken as so many


class Split(NamedTuple):
    """Seconds of a step."""

    rest: float  # products, passes, collectives, overhead
    attention: float


Predict = Callable[[Job], Split]


class StepTime:
    """Steps of one server: a function of the step. What it has asked for is kept."""

    def __init__(self, job: Job, predict: Predict):
        self._job, self._predict = job, predict
        self._decoded: dict[tuple[int, int], Split] = {}
        self._read: dict[int, Split] = {}

    def __call__(self, step: Step) -> float:
        """Its seconds."""
        rows, context = len(step.contexts), sum(step.contexts) / max(len(step.contexts), 1)
        tokens = sum(part.tokens for part in step.parts)
        prompts = sum(self.prompt_attention(part.start, part.tokens) for part in step.parts)
        return self.seconds(rows, context, tokens) + prompts

    def seconds(self, rows: int | float, context: int | float, tokens: int | float = 0.0) -> float:
        """Of a step that goes on with so many answers, each seeing `context` keys, and reads so many prompt tokens.

        The prompts' own attention comes on top.
        """
        attention = self.decode(rows, context).attention if rows else 0.0
        if not tokens:
            return attention + (self.decode(rows, context).rest if rows else 0.0)
        alone = self.decode(rows, context).rest if rows else 0.0
        return attention + max(alone, self.prefill(rows + tokens).rest)

    def prompt_attention(self, start: int | float, tokens: int | float) -> float:
        """Seconds of prompt tokens' attention to what stands before them, and to each other."""
        end = start + tokens
        pairs = end * (end + 1) - start * (start + 1)
        return self.prefill(end).attention * pairs / (end * (end + 1))

    def decode(self, rows: int | float, context: int | float) -> Split:
        """A decode step of so many answers that see so many keys each."""
        return between(rows, lambda b: between(max(context, SHORTEST), lambda s: self._decode_at(b, s), coarse=True))

    def prefill(self, tokens: int | float) -> Split:
        """Reading one prompt of so many tokens."""
        return between(tokens, self._prefill_at)

    def _decode_at(self, rows: int, context: int) -> Split:
        if (rows, context) not in self._decoded:
            job = dataclasses.replace(self._job, kind="decode", batch=rows, length=context, output=0)
            self._decoded[rows, context] = self._predict(job)
        return self._decoded[rows, context]

    def _prefill_at(self, tokens: int) -> Split:
        if tokens not in self._read:
            job = dataclasses.replace(self._job, kind="prefill", batch=1, length=tokens, output=0)
            self._read[tokens] = self._predict(job)
        return self._read[tokens]


def by_prediction(job: Job, chip: Chip) -> StepTime:
    """Steps of a server with the job's model, layout and number formats, by perf/predict.py."""

    def split(job: Job) -> Split:
        found = predict(job, chip)
        attention = sum(part.seconds for part in found.parts if part.kind == "attention")
        return Split(found.seconds - attention, attention)

    return StepTime(job, split)


def between(x: int | float, at: Callable[[int], Split], *, coarse: bool = False) -> Split:
    """The value at x, on the line between two counts near it: eight of an octave, or two where `coarse`."""
    low, high = neighbours(x, 1 if coarse else 3)
    if low == high:
        return at(low)
    share, first, second = (x - low) / (high - low), at(low), at(high)
    return Split(*(a + share * (b - a) for a, b in zip(first, second, strict=True)))


def neighbours(x: int | float, bits: int) -> tuple[int, int]:
    """The counts of so many binary digits after the first that x lies between.

    11.5, 1 bit  ->  8, 12        100, 3 bits  ->  96, 104
    """
    low = int(x)
    if low < EXACT:
        return max(low, 1), max(low + (x > low), 1)
    size = 1 << max(low.bit_length() - 1 - bits, 0)
    low = low // size * size
    return (low, low) if x == low else (low, low + size)
