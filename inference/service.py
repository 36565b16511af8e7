"""One engine in a thread of its own, and any number of askers around it on an event loop. Knows no HTTP and no text.

The loop sends commands to the thread through one queue; the thread sends what came of a step back in one call. An
engine without work sleeps in that queue. A slow asker never holds the engine up: what it does not read is kept up to a
bound, beyond which it is cut off.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from inference.config import SamplingConfig
from inference.metrics import Metrics
from inference.request import EngineStats, Output, Prompt, Request
from inference.turnover import Turnover

Answer = TypeVar("Answer")


@runtime_checkable
class TokenEngine(Protocol):
    """What the service needs of an engine."""

    def add(self, request: Request) -> int:
        """Take a request in; -> its id. ValueError where it can never fit."""
        ...

    def cancel(self, id: int) -> None:
        """End a request; its last Output comes from the next step."""
        ...

    def step(self) -> list[Output]:
        """Compute a little of everything that runs."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def stats(self) -> EngineStats:
        """What it holds and has done."""
        ...

    def embed(self, texts: Sequence[Prompt]) -> np.ndarray:
        """A vector of unit length for each text."""
        ...

    def logprobs(self, texts: Sequence[Prompt]) -> list[list[float]]:
        """For each text, log p of every token but the first."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How slowly answers may come, and be read."""

    buffer: int = 4096  # tokens that came and were not read, at most
    patience: float = 30.0  # seconds that tokens may lie there while nothing is read
    timeout: float = 600.0  # seconds that an answer may take, waiting included


class FullError(Exception):
    """No room for another request now."""

    def __init__(self, wait: int):
        super().__init__(f"all places for requests are taken; try again in {wait} s")
        self.wait = wait  # seconds till there may be room


class UnavailableError(Exception):
    """No request is taken or answered any more; the text says why."""


class TimedOutError(Exception):
    """The answer took too long."""


class CutOffError(Exception):
    """The asker did not read."""


class Stream:
    """Answers to requests that were handed in together: `async for index, output in stream`. Close it when done."""

    def __init__(self, service: "Service", requests: Sequence[Request], reading: Reading):
        self.open: dict[int, int | None] = dict.fromkeys(range(len(requests)))  # places of unfinished requests -> ids
        self.asked = time.monotonic()
        self.first: dict[int, float] = {}  # when the first token of each came
        self.num_tokens: collections.Counter[int] = collections.Counter()
        self.left = {index: request.max_tokens for index, request in enumerate(requests)}
        self.is_closed = False
        self._service, self._reading = service, reading
        self._buffer: collections.deque[tuple[int, Output]] = collections.deque()
        self._unread, self._since = 0, self.asked  # tokens that came and were not read, and since when none was
        self._failure: Exception | None = None
        self._something = asyncio.Event()
        self._deadline = asyncio.get_running_loop().call_later(reading.timeout, self._expire)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> tuple[int, Output]:
        while True:
            if self._failure:
                raise self._failure
            if self._buffer:
                index, output = self._buffer.popleft()
                self._unread, self._since = self._unread - len(output.tokens), time.monotonic()
                return index, output
            if not self.open:
                raise StopAsyncIteration
            self._something.clear()
            await self._something.wait()

    def stop(self, index: int) -> None:
        """End one of the requests: what more comes of it is not wanted."""
        id_ = self.open.get(index)
        if id_ is not None:
            self._service.cancel(id_)

    def close(self) -> None:
        """End all of them, whatever has come."""
        self.is_closed = True
        self._deadline.cancel()
        self._buffer.clear()
        for index in list(self.open):
            self.stop(index)

    def _expire(self) -> None:
        self.fail(TimedOutError(f"the answer took more than {self._reading.timeout:g} s"))
        self.close()

    # What the service does.

    def put(self, index: int, output: Output) -> None:
        """More of one answer. An asker that has not read for long is cut off."""
        if self.is_closed:
            return
        now = time.monotonic()
        if not self._buffer:
            self._since = now
        self._buffer.append((index, output))
        self._unread += len(output.tokens)
        idle = now - self._since
        if self._unread > self._reading.buffer or idle > self._reading.patience:
            self.fail(CutOffError(f"{self._unread} tokens came and were not read for {idle:.0f} s"))
            self.close()
        self.wake()

    def wake(self) -> None:
        """Something changed that a reader may wait for."""
        self._something.set()

    def fail(self, error: Exception) -> None:
        """The next read raises this."""
        self._failure = self._failure or error
        self.wake()


class Service:
    """Takes requests up to a bound, and hands answers out, while one thread drives the engine."""

    def __init__(self, engine: TokenEngine, metrics: Metrics, *, capacity: int, reading: Reading = Reading()):
        self.capacity, self.metrics = capacity, metrics
        self.stats = engine.stats()
        self.failure = ""  # why the engine ended, if it did
        self.is_draining = False
        self._engine, self._reading = engine, reading
        self._commands: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._streams: dict[int, tuple[Stream, int]] = {}  # by the engine's id
        self._open: set[Stream] = set()
        self._calls: set[asyncio.Future] = set()
        self._turnover = Turnover()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    # For askers, on the event loop.

    @property
    def num_open(self) -> int:
        """Requests and calls that have not ended."""
        return sum(len(stream.open) for stream in self._open) + len(self._calls)

    @property
    def trouble(self) -> str:
        """Why nothing new is taken, or nothing."""
        return self.failure or ("the server is shutting down" if self.is_draining else "")

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Answers to the requests, all or none of which are taken. Raises FullError or UnavailableError."""
        self.check_room(len(requests))
        stream = Stream(self, requests, self._reading)
        self._keep(self._open, stream)
        for index, request in enumerate(requests):
            self._commands.put(functools.partial(self._add, stream, index, request))
        return stream

    async def call(self, function: Callable[[Any], Answer]) -> Answer:
        """What the function makes of the engine, between two steps."""
        self.check_room(1)
        future = self._loop.create_future()
        self._keep(self._calls, future)
        future.add_done_callback(lambda done: self._forget(self._calls, done))
        self._commands.put(functools.partial(self._answer, future, function))
        try:
            return await asyncio.wait_for(future, self._reading.timeout)
        except TimeoutError:
            raise TimedOutError(f"the answer took more than {self._reading.timeout:g} s") from None

    async def embed(self, texts: Sequence[Prompt]) -> np.ndarray:
        """A vector for each text."""
        return await self.call(lambda engine: engine.embed(texts))

    async def logprobs(self, text: Prompt) -> list[float]:
        """log p of every token but the first."""
        return (await self.call(lambda engine: engine.logprobs([text])))[0]

    async def read(self, prompt: Prompt, salt: str) -> None:
        """Compute a prompt, so that the cache has its blocks."""
        only = Request(prompt=prompt, sampling=SamplingConfig(temperature=0.0), max_tokens=1, salt=salt)
        stream = self.submit([only])
        try:
            async for _ in stream:
                pass
        finally:
            stream.close()

    def cancel(self, id: int) -> None:
        """Tell the engine to end a request."""
        self._commands.put(lambda: self._engine.cancel(id))

    async def drain(self, patience: float) -> bool:
        """Take nothing new, and wait for what runs; -> whether all of it ended in time."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), patience)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the thread, and with it what still runs."""
        self.is_draining = True
        self._fail_all("the server has shut down")
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, 60)

    def check_room(self, places: int) -> None:
        """Raise FullError or UnavailableError where no more requests are taken."""
        if self.trouble:
            raise UnavailableError(self.trouble)
        excess = self.num_open + places - self.capacity
        if excess > 0:
            left = [s.left[index] - s.num_tokens[index] for s in self._open for index in s.open]
            raise FullError(self._turnover.wait(excess, left=min(left, default=1), now=time.monotonic()))

    def _keep(self, where: set, what: Any) -> None:
        where.add(what)
        self._idle.clear()

    def _forget(self, where: set, what: Any) -> None:
        where.discard(what)
        if not self._open and not self._calls:
            self._idle.set()

    # On the event loop, called by the thread.

    def _admitted(self, id_: int, stream: Stream, index: int) -> None:
        if index in stream.open:
            self._streams[id_] = stream, index
            stream.open[index] = id_
        if stream.is_closed or index not in stream.open:
            self.cancel(id_)

    def _refused(self, stream: Stream, index: int, error: Exception | None) -> None:
        if error is not None:
            stream.fail(error)
            stream.close()
        self._ended(stream, index, "cancelled" if error is None else "refused")

    def _deliver(self, outputs: list[Output], stats: EngineStats) -> None:
        now = time.monotonic()
        self.stats = stats
        self._turnover.stepped(now)
        for output in outputs:
            if output.id not in self._streams:  # given up
                continue
            stream, index = self._streams[output.id]
            if output.tokens:
                if not stream.num_tokens[index]:
                    stream.first[index] = now
                    self.metrics.first_token(now - stream.asked)
                stream.num_tokens[index] += len(output.tokens)
            stream.put(index, output)
            if output.finish is not None:
                del self._streams[output.id]
                self._turnover.ended(now)
                self._ended(stream, index, output.finish)

    def _ended(self, stream: Stream, index: int, finish: str) -> None:
        now, count = time.monotonic(), stream.num_tokens[index]
        if stream.open.pop(index, self) is self:
            return
        since_first = now - stream.first.get(index, now)
        self.metrics.ended(finish, seconds=now - stream.asked, since_first=since_first, num_tokens=count)
        stream.wake()
        if not stream.open:
            self._forget(self._open, stream)

    def _fail_all(self, reason: str) -> None:
        for stream in list(self._open):
            stream.fail(UnavailableError(reason))
            for index in list(stream.open):
                self._ended(stream, index, "error")
        for future in list(self._calls):
            if not future.done():
                future.set_exception(UnavailableError(reason))
        self._streams.clear()

    def _failed(self, reason: str) -> None:
        self.failure = reason
        self._fail_all(reason)

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    outputs = self._engine.step()
                    self._tell(self._deliver, outputs, self._engine.stats())
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self._tell(self._failed, f"the engine failed: {type(error).__name__}: {error}")

    def _obey(self) -> bool:
        """Do what was asked for, waiting for it where there is nothing else to do; -> whether to go on."""
        while not self._engine.has_work or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _add(self, stream: Stream, index: int, request: Request) -> None:
        if stream.is_closed:
            return self._tell(self._refused, stream, index, None)
        try:
            id_ = self._engine.add(request)
        except ValueError as error:
            return self._tell(self._refused, stream, index, error)
        return self._tell(self._admitted, id_, stream, index)

    def _answer(self, future: asyncio.Future, function: Callable[[Any], Any]) -> None:
        if future.done():
            return
        try:
            result = function(self._engine)
        except ValueError as error:
            self._tell(settle, future, None, error)
        except Exception as error:  # such as too little memory for this one: others go on
            traceback.print_exc(file=sys.stderr)
            why = f"the engine could not do this: {type(error).__name__}"
            self._tell(settle, future, None, UnavailableError(why))
        else:
            self._tell(settle, future, result, None)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # where the loop has ended, nobody is left to hear
            self._loop.call_soon_threadsafe(function, *arguments)


def settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    """Give the future its result, if somebody still waits for it."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
