"""How requests of a trace were answered: when each token came, and percentiles. Knows no engine, imports no jax."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

PERCENTILES = (50, 90, 99)


class Answered(NamedTuple):
    """How one request fared, in seconds after the start."""

    due: float  # when it came; what it waited for being let in counts as latency
    first: float  # its first token
    last: float
    tokens: int
    outputs: int  # steps that gave it tokens

    @property
    def first_token(self) -> float:
        """TTFT: seconds until the first token."""
        return self.first - self.due

    @property
    def per_token(self) -> float | None:
        """TPOT: seconds of each further token; None where there is none."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    def with_more(self, tokens: int, now: float) -> "Answered":
        """The same after a step that gave it tokens."""
        first = self.first if self.tokens else now
        return self._replace(first=first, last=now, tokens=self.tokens + tokens, outputs=self.outputs + 1)


class Tick(NamedTuple):
    """A step of the engine that gave tokens."""

    time: float
    tokens: int


class Played(NamedTuple):
    """A trace that has been answered."""

    answers: list[Answered]  # as the trace has them
    ticks: list[Tick]
    seconds: float
    counted: dict[str, int]  # what the engine did meanwhile, by the names of EngineStats

    @property
    def throughput(self) -> float:
        """Tokens of answers a second."""
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that the cache had."""
        return self.counted["cached_tokens"] / max(self.counted["prompt_tokens"], 1)

    @property
    def first_tokens(self) -> list[float]:
        """Every request's TTFT."""
        return [answer.first_token for answer in self.answers]

    @property
    def per_tokens(self) -> list[float]:
        """Every request's TPOT, where it has one."""
        return [value for answer in self.answers if (value := answer.per_token) is not None]

    def figures(self) -> dict[str, float]:
        """What is reported: throughput, latencies by percentile, cache."""
        return {
            "output_tokens_per_second": self.throughput,
            **percentiles("ttft", self.first_tokens),
            **percentiles("tpot", self.per_tokens),
            "cache_hit_rate": self.hit_rate,
        }


def percentiles(name: str, seconds: Iterable[float]) -> dict[str, float]:
    """{"ttft_p50_ms": …, "ttft_p90_ms": …, "ttft_p99_ms": …}"""
    values = list(seconds)
    found = np.percentile(values, PERCENTILES) if values else [float("nan")] * len(PERCENTILES)
    return {f"{name}_p{p}_ms": float(value) * 1e3 for p, value in zip(PERCENTILES, found, strict=True)}
