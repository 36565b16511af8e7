"""Asks a prefill server for the KV blocks of a prompt before the prompt is handed to the engine here. Knows no API.

What comes goes into the prefix cache; then the prompt is let in like any other, and only the rest of it is computed.
Whatever goes wrong (the server is gone, slow, full, of another model, its bytes damaged), all of it is computed here.
"""

import asyncio
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import httpx
import jax
import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inference.blocks import block_names
from inference.disaggregation import WEIGHT, DisaggregationConfig, Estimate, Rates, estimate, learned
from inference.engine import Engine, Exported
from inference.handover import FRAME, HEAD_LIMIT, Ask, DamagedError, Head, Sealing, block_bytes, read_blocks, read_head
from inference.prefill_door import PATH, About, parts
from inference.request import Prompt
from inference.service import FullError, Service, TimedOutError, UnavailableError

PROBE = 512  # tokens of the prompts that rates are first measured with, at most
ALIKE = 0.1  # mean difference of log-probabilities up to which two models are one, computed on two machines
REST, LONGEST_REST = 2.0, 60.0  # seconds without asking after a failure, doubled with each further one
MARGIN, AT_LEAST = 4.0, 5.0  # an answer may take so many times what is expected, and so many seconds anyway
FORGET = 30.0  # seconds after which what was learned of a busy server is old
GUESS = {"link": 1e9, "delay": 0.01}  # bytes a second, seconds: till they were measured


class AwayError(Exception):
    """The prefill server does not do it; the text says why."""


THEIRS = (AwayError, DamagedError, httpx.HTTPError, TimeoutError)
OURS = (FullError, UnavailableError, TimedOutError)  # which the prompt itself will meet again


@dataclasses.dataclass
class Tally:
    """What has come of the prompts."""

    here: int = 0  # computed here, since that is quicker
    away: int = 0  # computed there
    failed: int = 0  # computed here after all
    blocks: int = 0  # that came
    bytes: int = 0


class AwayCollector(Collector):
    """The tally and the rates as Prometheus reads them."""

    def __init__(self, tally: Tally, rates: Callable[[], Rates]):
        self._tally, self._rates = tally, rates

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        prompts = CounterMetricFamily("meshlight_prefill_prompts", "Prompts, by where computed", labels=["where"])
        for where in ("here", "away", "failed"):
            prompts.add_metric([where], getattr(self._tally, where))
        yield prompts
        yield CounterMetricFamily("meshlight_prefill_bytes", "Bytes of KV blocks that came", value=self._tally.bytes)
        note = "Prompt tokens a second here and there, bytes a second between, seconds of a call"
        rates = GaugeMetricFamily("meshlight_prefill_rate", note, labels=["of"])
        for name, value in dataclasses.asdict(self._rates()).items():
            rates.add_metric([name], value)
        yield rates


class PrefillAway:
    """The prefill server, as a decode server sees it. To be used on one event loop."""

    def __init__(
        self,
        service: Service,
        about: About,
        *,
        url: str,
        secret: str,
        config: DisaggregationConfig,
        say: Callable[[str], None] = lambda line: None,
        transport: httpx.AsyncBaseTransport | None = None,  # how it is reached, where not by the network
    ):
        self.tally = Tally()
        self._service, self._about, self._config, self._say = service, about, config, say
        self._url, self._secret = url, secret
        self._rates = self._first_rates = Rates(here=1.0, there=1.0, **GUESS)
        self._learned_at = 0.0
        service.metrics.registry.register(AwayCollector(self.tally, lambda: self._rates))
        self._num_away, self._rest, self._resting_until = 0, REST, 0.0
        self._http = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(keepalive_expiry=2.0), transport=transport)

    async def before(self, prompt: Prompt, salt: str) -> None:
        """Bring the prompt's blocks here if that is worth it. Never fails: then the prompt is computed here."""
        if self._num_away >= self._config.at_once or time.monotonic() < self._resting_until:
            return
        self._num_away += 1
        try:
            have = await self._service.call(lambda engine: len(engine.known_blocks(prompt, salt)))
            if self.estimate(len(prompt) - have * self._about.block_size).is_away:
                await self._fetch(Ask(tokens=prompt, salt=salt, have=have))
                self.tally.away += 1
                self._rest = REST
            else:
                self.tally.here += 1
        except THEIRS as error:
            self._failed(error)
        except OURS:
            self.tally.failed += 1
        finally:
            self._num_away -= 1

    def estimate(self, missing: int) -> Estimate:
        """What a prompt would take here and there now."""
        is_old = time.monotonic() - self._learned_at > FORGET
        return estimate(
            missing,
            self._service.stats.running,
            bytes_per_token=block_bytes(self._about.layout) / self._about.block_size,
            rates=self._first_rates if is_old else self._rates,
            config=self._config,
        )

    async def measure(self, max_length: int) -> Rates:
        """Measure all rates with a prompt that nobody has; those of the other server are guessed where it is not up."""
        size = self._about.block_size
        tokens = (0,) * (min(PROBE, max_length - 1) // size * size)
        if not tokens:  # no prompt has a full block, so none ever goes
            return self._rates
        started = time.monotonic()
        await self._service.read(tokens, secrets.token_hex(16))
        here = len(tokens) / (time.monotonic() - started)
        self._rates = self._first_rates = Rates(here=here, there=here, **GUESS)
        try:
            ask = Ask(tokens=tokens, salt=secrets.token_hex(16))
            await self._fetch(ask, weight=1.0)
            started = time.monotonic()
            await self._fetch(dataclasses.replace(ask, have=len(tokens) // size, nonce=secrets.token_bytes(16)))
            self._rates = dataclasses.replace(self._rates, delay=time.monotonic() - started)
            self._first_rates = self._rates
        except THEIRS as error:
            self._failed(error)
        return self._first_rates

    async def close(self) -> None:
        """End the connections."""
        await self._http.aclose()

    async def _fetch(self, ask: Ask, *, weight: float = WEIGHT) -> None:
        """Ask, and put what comes into the cache here, a few blocks at a time."""
        within = max(AT_LEAST, MARGIN * self.estimate(len(ask.tokens) - ask.have * self._about.block_size).there)
        names = list(block_names(ask.tokens, self._about.block_size, salt=ask.salt))
        async with (
            asyncio.timeout(within),
            self._http.stream("POST", self._url + PATH, content=ask.sealed(self._secret), timeout=within) as response,
        ):
            if response.status_code != 200:
                raise AwayError(f"it says {response.status_code}")
            frames = Frames(response.aiter_raw(), Sealing(self._secret, ask))
            head = read_head(await frames.next(HEAD_LIMIT))
            self._check(head, most=len(names) - ask.have)
            started = time.monotonic()
            for start, end in parts(ask.have, ask.have + head.blocks):
                content = await frames.next((end - start) * block_bytes(self._about.layout))
                leaves = read_blocks(content, names[start:end], head.layout)
                put = functools.partial(imported, about=self._about, names=names[start:end], leaves=leaves)
                await self._service.call(put)
        self._learn(head, time.monotonic() - started, weight)

    def _check(self, head: Head, *, most: int) -> None:
        """Refuse what would be of no use here, or do harm."""
        ours, theirs = np.array(self._about.fingerprint), np.array(head.fingerprint)
        if head.layout != self._about.layout:
            raise AwayError("its blocks are of another form; start both servers with the same model and cache options")
        if ours.shape != theirs.shape or not np.mean(np.abs(ours - theirs)) <= ALIKE:
            raise AwayError("it has another model, or other weights; start both servers with the same")
        if not 0 <= head.blocks <= most:
            raise DamagedError(f"{head.blocks} blocks come, but at most {most} were asked for")

    def _learn(self, head: Head, moving: float, weight: float) -> None:
        num_bytes = head.blocks * block_bytes(self._about.layout)
        self._rates = learned(
            self._rates, tokens=head.computed, computing=head.seconds, num_bytes=num_bytes, moving=moving, weight=weight
        )
        self._learned_at = time.monotonic()
        self.tally.blocks += head.blocks
        self.tally.bytes += num_bytes

    def _failed(self, error: Exception) -> None:
        """Let the other server rest, longer with each failure."""
        self.tally.failed += 1
        self._resting_until = time.monotonic() + self._rest
        self._say(f"prompts are computed here for {self._rest:g} s: {self._url}: {str(error) or type(error).__name__}")
        self._rest = min(2 * self._rest, LONGEST_REST)


class Frames:
    """Frames out of a body as it comes; never more of it in memory than one of them and what came with its end."""

    def __init__(self, pieces: AsyncIterator[bytes], sealing: Sealing):
        self._pieces, self._sealing, self._buffer = pieces, sealing, bytearray()

    async def next(self, limit: int) -> bytes:
        """The content of the next frame, which has at most `limit` bytes."""
        head = await self._take(FRAME.size)
        rest = await self._take(self._sealing.length(head, limit))
        return await asyncio.to_thread(self._sealing.opened, head, rest)

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            piece = await anext(self._pieces, None)
            if piece is None:
                raise DamagedError("the answer ends too early")
            self._buffer += piece
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


def imported(engine: Engine, *, about: About, names: Sequence[bytes], leaves: Sequence[np.ndarray]) -> int:
    """Put blocks into the cache; -> how many were new."""
    return engine.import_blocks(Exported(list(names), jax.tree.unflatten(about.structure, leaves)))
