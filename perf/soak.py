"""Many clients that stream from a server on this machine for a while: does one fail, or wait, or the server grow?

Every client asks again as soon as its answer has ended, so there are always as many answers under way as clients. What
they ask is the same in every run. A wait is the time from a request to its first token.
"""

import asyncio
import collections
import dataclasses
import ipaddress
import itertools
import json
import pathlib
import statistics
import time
import urllib.parse
from typing import Any, NamedTuple

import httpx

from parallel.records import require

WARM_UP = 0.25  # of the time, after which memory should not grow
WORDS = ("a", "stream", "of", "words", "that", "mean", "little", "but", "are", "read", "as", "prompts", "are")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """One soak."""

    url: str  # of a server on this machine
    clients: int = 64  # at once
    seconds: int = 120  # after which no client asks again
    tokens: int = 32  # of the longest answer; the shortest has a quarter
    key: str = ""  # for the API
    pid: int = 0  # the server's process, whose memory is watched; 0 watches none
    longest: float = 3.0  # a client may wait so many times the median

    def __post_init__(self):
        require(self, "soak", "clients", low=1, high=512)
        require(self, "soak", "seconds", low=1, high=600)
        require(self, "soak", "tokens", low=4, high=4096)
        host = urllib.parse.urlsplit(self.url).hostname or ""
        if host != "localhost" and not is_loopback(host):
            raise ValueError(f"--url {self.url} is not on this machine; a soak of another one is an attack on it")


class Answered(NamedTuple):
    """One request."""

    begun: float  # seconds since the start of the soak
    wait: float  # seconds till its first token
    gap: float  # the longest time between two pieces after that
    tokens: int
    failure: str  # empty where there is none


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(config: SoakConfig) -> dict[str, Any]:
    """Soak; -> what was seen, and whether it is as it should be."""
    return asyncio.run(_run(config))


async def _run(config: SoakConfig) -> dict[str, Any]:
    start = time.monotonic()
    limits = httpx.Limits(max_connections=config.clients)
    async with httpx.AsyncClient(base_url=config.url, timeout=120, limits=limits, headers=headers(config)) as http:
        watching = asyncio.create_task(watch(config, start))
        clients = [client(http, config, index, start=start) for index in range(config.clients)]
        answered = [each for those in await asyncio.gather(*clients) for each in those]
    elapsed = time.monotonic() - start
    watching.cancel()
    (memory,) = await asyncio.gather(watching, return_exceptions=False)
    return report(config, answered, memory, elapsed=elapsed)


def headers(config: SoakConfig) -> dict[str, str]:
    """Who asks."""
    return {"Authorization": f"Bearer {config.key}"} if config.key else {}


async def client(http: httpx.AsyncClient, config: SoakConfig, index: int, *, start: float) -> list[Answered]:
    """Ask and read, till the time is over."""
    answered: list[Answered] = []
    while time.monotonic() - start < config.seconds:
        answered.append(await ask(http, body(config, index, len(answered)), start))
        if answered[-1].failure:
            await asyncio.sleep(0.2)  # a server that refuses everything is not asked thousands of times
    return answered


def body(config: SoakConfig, index: int, turn: int) -> dict[str, Any]:
    """What a client asks for in its turn: prompts of 10 to 100 words, answers of a quarter to all of the tokens."""
    count = 10 + (37 * index + 53 * turn) % 91
    words = [WORDS[(index + turn + i) % len(WORDS)] for i in range(count)]
    tokens = config.tokens * (1 + (index + turn) % 4) // 4
    prompt = f"Client {index}, turn {turn}: {' '.join(words)}"
    return {"prompt": prompt, "max_tokens": tokens, "seed": turn, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}}  # fmt: skip


async def ask(http: httpx.AsyncClient, asked: dict[str, Any], start: float) -> Answered:
    """One request, read to its end."""
    begun = time.monotonic()
    came, tokens, is_done, failure = [begun], 0, False, ""
    try:
        async with http.stream("POST", "/v1/completions", json=asked) as response:
            if response.status_code != 200:
                failure = f"status {response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
            async for line in response.aiter_lines() if not failure else nothing():
                is_done = is_done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    failure = failure or event.get("error", {}).get("message", "")
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    came.append(time.monotonic())
    except httpx.HTTPError as error:
        failure = f"{type(error).__name__}: {error}"
    if not failure and not (is_done and tokens == asked["max_tokens"]):
        failure = f"{tokens} tokens of {asked['max_tokens']} came, and {'an' if is_done else 'no'} end"
    gaps = [later - earlier for earlier, later in itertools.pairwise(came[1:])]
    return Answered(begun - start, came[min(1, len(came) - 1)] - begun, max(gaps, default=0.0), tokens, failure)


async def nothing():
    """No lines."""
    for line in ():
        yield line


async def watch(config: SoakConfig, start: float) -> list[tuple[float, int]]:
    """The server's memory in bytes, once a second, till this is cancelled."""
    seen: list[tuple[float, int]] = []
    try:
        while config.pid:
            seen.append((time.monotonic() - start, resident(config.pid)))
            await asyncio.sleep(1)
    except asyncio.CancelledError:
        pass
    return seen


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def report(
    config: SoakConfig, answered: list[Answered], memory: list[tuple[float, int]], *, elapsed: float
) -> dict[str, Any]:
    """The figures."""
    good = [each for each in answered if not each.failure]
    waits = sorted(each.wait for each in good) or [0.0]
    median = statistics.median(waits)
    found: dict[str, Any] = {
        "clients": config.clients,
        "seconds": elapsed,
        "requests": len(answered),
        "failed": len(answered) - len(good),
        "failures": dict(collections.Counter(each.failure for each in answered if each.failure).most_common(5)),
        "tokens_per_second": sum(each.tokens for each in good) / elapsed,
        "wait_median": median,
        "wait_99": waits[int(0.99 * (len(waits) - 1))],
        "wait_longest": waits[-1],
        "longest_over_median": waits[-1] / median if median else 0.0,
        "gap_longest": max((each.gap for each in good), default=0.0),
    }
    after = [size for at, size in memory if at > WARM_UP * config.seconds]
    if len(after) >= 4:
        quarter = max(1, len(after) // 4)
        first, last = statistics.mean(after[:quarter]), statistics.mean(after[-quarter:])
        found |= {"memory_after_warm_up": first, "memory_at_end": last, "memory_growth": last / first - 1}
    found["passed"] = bool(good) and not found["failed"] and found["longest_over_median"] <= config.longest
    return found
