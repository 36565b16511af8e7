"""When a prompt is worth computing on another server, by rates that were measured. Pure numbers: no array, no network.

A decode server that computes prompts itself holds up the answers that it is in the middle of. A prefill server can do
it instead, but what it computed, the keys and values of every token, then has to come over the network:

    here   tokens / rates.here                                        and everything else that runs waits meanwhile
    there  rates.delay + tokens / rates.there + bytes / rates.link
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from inference.config import EngineConfig
from parallel.records import require

SECRET, SHORTEST = "MESHLIGHT_PREFILL_SECRET", 16  # a variable of the environment, and characters in it at least
WEIGHT = 0.3  # of what was seen last, in a rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisaggregationConfig:
    """Which prompts a decode server gives away, and to whom."""

    prefill_from: str = ""  # address of a server that computes long prompts for this one
    prefill_when: Literal["worth", "always"] = "worth"  # a prompt goes: where rates say so, or whatever they say
    min_away: int = 64  # tokens of a prompt that the cache lacks, fewer of which are always computed here
    slowdown: float = 2.0  # so many times as long as here a prompt may take there while other answers run here
    at_once: int = 8  # prompts away at the same time; further ones are computed here

    def __post_init__(self):
        require(self, "disaggregation", "min_away", low=1)
        require(self, "disaggregation", "slowdown", low=1, high=1000)
        require(self, "disaggregation", "at_once", low=1, high=4096)
        if self.prefill_from and not re.fullmatch(r"https?://[^/?#@]+", self.prefill_from):
            raise ValueError(f"prefill_from={self.prefill_from} is no address of a server; give it as http://HOST:PORT")

    def secret(self, environment: Mapping[str, str], engine: EngineConfig) -> str:
        """What both servers know, from the environment; empty where this one has nothing to do with another."""
        secret = environment.get(SECRET, "")
        if self.prefill_from and not secret:
            raise ValueError(f"--prefill-from needs the secret of both servers in the variable {SECRET}")
        if secret and len(secret) < SHORTEST:
            raise ValueError(f"the secret in {SECRET} has {len(secret)} characters; it needs at least {SHORTEST}")
        if secret and not engine.prefix_cache:
            raise ValueError(f"KV blocks go through the prefix cache; leave out --no-prefix-cache, or unset {SECRET}")
        return secret


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast prompts are computed and moved."""

    here: float  # prompt tokens a second of the decode server
    there: float  # prompt tokens a second of the prefill server, its queue included
    link: float  # bytes a second from there into the cache here
    delay: float  # seconds of a call that do not depend on its size

    def __post_init__(self):
        for name in ("here", "there", "link"):
            require(self, "rates", name, low=1e-9)
        require(self, "rates", "delay", low=0)


class Estimate(NamedTuple):
    """What a prompt would take, in seconds, and where it is computed."""

    here: float
    there: float
    is_away: bool


def estimate(
    missing: int, others: int, *, bytes_per_token: float, rates: Rates, config: DisaggregationConfig
) -> Estimate:
    """Where to compute a prompt of which the cache lacks `missing` tokens while `others` answers run.

    1000 tokens of 46 kB, here 500/s, there 500/s, 1 GB/s, 10 ms  ->  here 2.0 s, there 2.06 s: away if others run
    """
    here = missing / rates.here
    there = rates.delay + missing / rates.there + missing * bytes_per_token / rates.link
    limit = config.slowdown if others else 1.0
    is_worth = config.prefill_when == "always" or there <= limit * here
    return Estimate(here, there, is_worth and missing >= config.min_away)


def break_even(*, bytes_per_token: float, rates: Rates, limit: float = 1.0) -> float:
    """Tokens from which on a prompt takes at most `limit` times as long there as here; infinite where none does."""
    gain = limit / rates.here - 1 / rates.there - bytes_per_token / rates.link
    return rates.delay / gain if gain > 0 else math.inf


def learned(
    rates: Rates, *, tokens: int, computing: float, num_bytes: int, moving: float, weight: float = WEIGHT
) -> Rates:
    """The rates after one more prompt: so many tokens and bytes, and the seconds that they took."""

    def moved(old: float, amount: int, seconds: float) -> float:
        """Seconds a unit are averaged, since these add up."""
        if not amount or seconds <= 0:
            return old
        return 1 / ((1 - weight) / old + weight * seconds / amount)

    return dataclasses.replace(
        rates, there=moved(rates.there, tokens, computing), link=moved(rates.link, num_bytes, moving)
    )
