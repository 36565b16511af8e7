"""Traces of requests for a benchmark: when each comes, how long it is, what it shares. Knows no engine and no model.

A trace follows from its seed alone. Tokens are drawn at random, since time depends on how many there are and on which
are shared; a trace whose answers matter takes documents as tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Mix = Literal["sharegpt", "fixed", "prefix", "chat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """A log-normal distribution of lengths, clipped."""

    mean: float  # before clipping
    sigma: float  # of the logarithm; 0 gives the mean each time
    low: int
    high: int

    @property
    def expected(self) -> float:
        """The mean after clipping, before rounding."""
        if self.sigma == 0:
            return min(max(self.mean, self.low), self.high)
        mu = math.log(self.mean) - self.sigma**2 / 2
        low, high = ((math.log(bound) - mu) / self.sigma for bound in (self.low, self.high))
        inside = self.mean * (normal(high - self.sigma) - normal(low - self.sigma))
        return self.low * normal(low) + inside + self.high * (1 - normal(high))

    def draw(self, random: np.random.Generator, count: int) -> list[int]:
        """So many lengths."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return np.rint(np.clip(random.lognormal(mu, self.sigma, count), self.low, self.high)).astype(int).tolist()

    def scaled(self, factor: float) -> "Lengths":
        """The same distribution of lengths times `factor`."""
        low, high = (max(2, round(bound * factor)) for bound in (self.low, self.high))
        return Lengths(mean=self.mean * factor, sigma=self.sigma, low=low, high=high)


# Means of ShareGPT as tokenised for OPT (PagedAttention, arXiv:2309.06180, section 6.1: 161.31 in, 337.99 out). Sigmas
# are ours: they give the long tails of that paper's figure 11 without its exact shape.
SHAREGPT_PROMPTS = Lengths(mean=161.31, sigma=1.1, low=4, high=1024)
SHAREGPT_ANSWERS = Lengths(mean=337.99, sigma=0.8, low=8, high=1024)


class Arrival(NamedTuple):
    """A request of a trace."""

    time: float  # seconds after the start, or after the end of the request that it follows
    prompt: tuple[int, ...]  # after what it follows, if it follows something
    max_tokens: int
    follows: int = -1  # place in the trace of the request whose prompt and answer stand before its own prompt


Trace = list[Arrival]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What a trace is made from."""

    mix: Mix = "sharegpt"
    requests: int = 32
    rate: float = math.inf  # requests a second, Poisson; inf is all at once
    scale: float = 0.125  # lengths of sharegpt, fixed and chat are multiplied by it: two cores are no server
    prefix: int = 512  # tokens that all prompts of `prefix` begin with
    turns: int = 4  # of each chat
    vocab: int = 49152
    seed: int = 0


def trace(work: Workload) -> Trace:
    """The requests in the order in which they come."""
    return {"sharegpt": mixed, "fixed": alike, "prefix": sharing, "chat": chats}[work.mix](work)


def mixed(work: Workload) -> Trace:
    """Prompts and answers of ShareGPT-like lengths, nothing shared."""
    times, lengths, words = _streams(work)
    prompts = SHAREGPT_PROMPTS.scaled(work.scale).draw(lengths, work.requests)
    answers = SHAREGPT_ANSWERS.scaled(work.scale).draw(lengths, work.requests)
    whens = arrivals(times, work.rate, work.requests)
    return [Arrival(t, tokens(words, n, work.vocab), m) for t, n, m in zip(whens, prompts, answers, strict=True)]


def alike(work: Workload) -> Trace:
    """As long as the mean of `mixed`, each of them: no batch waits for a straggler."""
    times, _, words = _streams(work)
    prompt = round(SHAREGPT_PROMPTS.scaled(work.scale).expected)
    answer = round(SHAREGPT_ANSWERS.scaled(work.scale).expected)
    whens = arrivals(times, work.rate, work.requests)
    return [Arrival(t, tokens(words, prompt, work.vocab), answer) for t in whens]


def sharing(work: Workload) -> Trace:
    """One system prompt before questions of 16 to 48 tokens, short answers."""
    times, lengths, words = _streams(work)
    prefix = tokens(words, work.prefix, work.vocab)
    whens, sizes = arrivals(times, work.rate, work.requests), lengths.integers(16, 49, work.requests)
    return [Arrival(t, prefix + tokens(words, int(n), work.vocab), 16) for t, n in zip(whens, sizes, strict=True)]


def chats(work: Workload) -> Trace:
    """Conversations: each turn comes a second after the answer before it, and its prompt begins with all of that."""
    times, lengths, words = _streams(work)
    count = -(-work.requests // work.turns)
    whens = arrivals(times, work.rate, count)
    prompts = SHAREGPT_PROMPTS.scaled(work.scale).draw(lengths, work.requests)
    answers = SHAREGPT_ANSWERS.scaled(work.scale).draw(lengths, work.requests)
    return [
        Arrival(
            whens[place] if place < count else 1.0,
            tokens(words, prompts[place], work.vocab),
            answers[place],
            follows=place - count if place >= count else -1,
        )
        for place in range(work.requests)
    ]


def copying(documents: Sequence[Sequence[int]], *, answer: int, begun: int = 8) -> Trace:
    """Copy-heavy tasks: a document, then its first `begun` tokens once more; what follows is the document's rest."""
    return [
        Arrival(0.0, (*document, *document[:begun]), min(answer, len(document) - begun))
        for document in documents
        if len(document) > begun
    ]


def arrivals(random: np.random.Generator, rate: float, count: int) -> list[float]:
    """Times of a Poisson process; all 0 where the rate is infinite."""
    if math.isinf(rate):
        return [0.0] * count
    return np.cumsum(random.exponential(1 / rate, count)).tolist()


def tokens(random: np.random.Generator, count: int, vocab: int) -> tuple[int, ...]:
    """So many random tokens."""
    return tuple(random.integers(0, vocab, count).tolist())


def longest(trace: Trace) -> int:
    """Tokens of the longest sequence, what it follows and a step's guesses included."""
    lengths: list[int] = []
    for arrival in trace:
        before = lengths[arrival.follows] if arrival.follows >= 0 else 0
        lengths.append(before + len(arrival.prompt) + arrival.max_tokens)
    return max(lengths) + 1


def normal(x: float) -> float:
    """The normal distribution's probability of less than x."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _streams(work: Workload) -> list[np.random.Generator]:
    """Randomness of times, lengths and tokens, apart: another rate leaves lengths and tokens as they are."""
    return [np.random.default_rng(child) for child in np.random.SeedSequence(work.seed).spawn(3)]
