"""One address in front of several servers: passes requests on, answers as they answer. Knows no model and no engine.

A request is sent to another replica only while its client has got nothing. Of a stream whole events are passed on, so
that one whose replica dies ends with an event that says so. Every request that came is counted under one outcome.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from inference.balancing import Balancer, BalancingConfig, beginning
from inference.event_stream import Events, event
from inference.listening import listen
from inference.router_counts import RouterCounts
from inference.routing import RouterConfig

Headers = list[tuple[bytes, bytes]]

# Headers that belong to one connection, not to what it carries (RFC 9110, 7.6.1), and those that are made anew.
ONE_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
MADE_ANEW = {b"host", b"content-length", b"expect"}
STREAMS = ("/v1/completions", "/v1/chat/completions")  # whose event streams end with [DONE]
REFUSAL_LIMIT = 64 * 2**10  # bytes kept of a refusal of a replica
HEALTH = "/health"


class RefusedError(Exception):
    """A clear answer instead of the one asked for."""

    def __init__(self, outcome: str, status: int, message: str, *, code: str, headers: Headers | None = None):
        super().__init__(message)
        self.outcome, self.status, self.headers = outcome, status, headers or []
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.content = json.dumps(problem(message, kind, code)).encode()


class UnreachableError(Exception):
    """The replica never got the request."""


class LostError(Exception):
    """The replica may have got the request, and sent nothing."""


class BrokenError(Exception):
    """The replica ended in the middle of its answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a client asks, read whole."""

    method: str
    path: str  # decoded
    target: bytes  # path and query as they came
    headers: Headers
    body: bytes
    key: bytes | None  # how its prompt begins

    def to(self, replica: str, config: RouterConfig) -> httpx.Request:
        """The same for a replica."""
        timeout = httpx.Timeout(config.patience, connect=config.connect, pool=config.connect)
        return httpx.Request(
            self.method,
            httpx.URL(replica).copy_with(raw_path=self.target),
            headers=self.headers,
            content=self.body if self.body or self.method not in ("GET", "HEAD") else None,
            extensions={"timeout": timeout.as_dict()},
        )


class Client:
    """Who asks: what it has got so far."""

    def __init__(self, send: Send):
        self._send = send
        self.has_started = self.has_ended = self.is_stream = False

    async def start(self, status: int, headers: Headers, *, is_stream: bool) -> None:
        """Status and headers; from here on nothing can be taken back."""
        self.has_started, self.is_stream = True, is_stream
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def take(self, piece: bytes, *, more: bool = True) -> None:
        """A piece of the answer; waits while the client does not read."""
        self.has_ended = self.has_ended or not more
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    async def refuse(self, refusal: RefusedError) -> None:
        """All that it gets."""
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(refusal.content)).encode()),
            *refusal.headers,
        ]
        await self.start(refusal.status, headers, is_stream=False)
        await self.take(refusal.content, more=False)

    async def cut(self, message: str, code: str) -> None:
        """End an answer that cannot go on: a stream with an event, anything else by the connection's end."""
        if self.is_stream and not self.has_ended:
            await self.take(event(problem(message, "server_error", code)), more=False)


class Router:
    """Passes requests on to replicas, and looks after them."""

    def __init__(
        self,
        replicas: Sequence[str],
        config: RouterConfig,
        balancing: BalancingConfig,
        *,
        admin_key: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.config, self.balancer = config, Balancer(replicas, balancing)
        self.counts = RouterCounts(self.balancer)
        self.is_draining = False
        self._admin_key, self._say = admin_key, say
        self._capacity = len(replicas) * balancing.max_running
        self._waiting: dict[str, set[asyncio.Timeout]] = {name: set() for name in replicas}
        self._running: set[asyncio.Task[str]] = set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._upstream = httpx.AsyncClient(limits=limits, trust_env=False, follow_redirects=False)

    # A request.

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        self.counts.came.inc()
        client, outcome = Client(send), "failed"
        try:
            outcome = await self._watched(scope, receive, client)
        except RefusedError as refusal:
            outcome = refusal.outcome
            with contextlib.suppress(ConnectionError):
                await client.refuse(refusal)
        except ConnectionError:
            outcome = "disconnected"
        except Exception as error:
            self._say(f"{type(error).__name__} in a request: {error}")
            if not client.has_started:
                await client.refuse(RefusedError("failed", 500, "the router failed; see its log", code="router_error"))
        finally:
            self.counts.ended(outcome)

    async def _watched(self, scope: Scope, receive: Receive, client: Client) -> str:
        """Answer, but stop as soon as the client leaves or the router has to end; -> the outcome."""
        self._admit()
        call = await self._read(scope, receive)
        self._admit()  # the body may have taken long to come
        answering = asyncio.create_task(self._answer(call, client))
        leaving = asyncio.create_task(left(receive))
        self._running.add(answering)
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return "disconnected"
            if not answering.cancelled():
                return answering.result()
        finally:
            self._running.discard(answering)
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        if not client.has_started:
            raise self._draining()
        await client.cut("the router is shutting down; the answer is not whole", "router_shutdown")
        return "broken"

    def _admit(self) -> None:
        """Refuse what there is no room for before its body is read."""
        if self.is_draining:
            raise self._draining()
        if len(self._running) >= self._capacity:
            raise self._full()

    async def _read(self, scope: Scope, receive: Receive) -> Call:
        """The whole request, within its limits."""
        path, query = scope["path"], scope["query_string"]
        if {".", ".."} & set(path.split("/")):
            raise RefusedError("invalid", 404, f"no path {path}", code="not_found")
        try:
            async with asyncio.timeout(self.config.stall):
                body = await read(receive, self.config.body_limit)
        except TimeoutError as error:
            message = f"the body did not come within {self.config.stall:g} seconds; send it faster"
            raise RefusedError("invalid", 408, message, code="timeout") from error
        target = (scope.get("raw_path") or path.encode()) + (b"?" + query if query else b"")
        if not target.isascii():
            raise RefusedError("invalid", 400, "the path is not ASCII; quote it with %", code="invalid")
        return Call(
            method=scope["method"],
            path=path,
            target=target,
            headers=passed_on(scope["headers"], without=MADE_ANEW),
            body=body,
            key=beginning(parsed(body), self.balancer.config.beginning),
        )

    async def _answer(self, call: Call, client: Client) -> str:
        """Ask replicas, one after the other, till one answers."""
        asked, lost, refusal, reason = [], 0, None, None
        began, favourite = time.perf_counter(), self.balancer.favourite(call.key) if call.key else None
        while lost < self.config.losses and (name := self.balancer.take(call.key, without=asked)):
            if reason is not None:
                self.counts.retried(reason)
            asked.append(name)
            self.counts.sent(name, favourite)
            try:
                return await self._ask(name, call, client, began)
            except RefusedError as answer:
                refusal, reason = answer, "refused"
            except UnreachableError:
                reason = "unreachable"
            except LostError:
                lost, reason = lost + 1, "lost"
            finally:
                self.balancer.give_back(name)
        raise self._no_answer(asked, lost, refusal)

    def _no_answer(self, asked: list[str], lost: int, refusal: RefusedError | None) -> RefusedError:
        """Why no replica answered."""
        if lost >= self.config.losses:
            message = f"{lost} replicas were lost with this request before they answered; it is not sent to another"
            return RefusedError("lost", 503, message, code="replica_lost", headers=self._later())
        if refusal is not None:  # those that are up are full
            return refusal
        if self.balancer.any_up(without=asked):
            return self._full()
        if lost:
            message = "the replica was lost with this request before it answered, and there is no other"
            return RefusedError("lost", 503, message, code="replica_lost", headers=self._later())
        return RefusedError("unavailable", 503, "no replica is up; try again", code="no_replica", headers=self._later())

    def _full(self) -> RefusedError:
        return RefusedError(
            "refused", 429, "all replicas are full; try again", code="full", headers=[(b"retry-after", b"1")]
        )

    def _draining(self) -> RefusedError:
        headers = [*self._later(), (b"connection", b"close")]
        return RefusedError("refused", 503, "the router is shutting down; try again", code="draining", headers=headers)

    def _later(self) -> Headers:
        return [(b"retry-after", str(max(1, round(self.config.health_every))).encode())]

    # One replica.

    async def _ask(self, name: str, call: Call, client: Client, began: float) -> str:
        """Pass a replica's answer on; -> the outcome. Where it raises one of our errors, the client has got nothing."""
        async with contextlib.AsyncExitStack() as stack:
            response, pieces, first = await self._opened(name, call, stack)
            self.balancer.answered(name)
            self.counts.first_byte.observe(time.perf_counter() - began)
            is_stream = isinstance(pieces, WholeEvents)
            headers = passed_on(response.headers.raw, without={b"content-length"} if is_stream else set())
            await client.start(response.status_code, headers, is_stream=is_stream)
            try:
                await client.take(first)
                async for piece in pieces:
                    await client.take(piece)
                if isinstance(pieces, WholeEvents) and call.path in STREAMS and not pieces.events.has_ended:
                    raise BrokenError("it ended without [DONE]")
            except (httpx.TransportError, BrokenError) as error:
                self._failed(name, f"in the middle of an answer: {line(error)}", is_silent=False)
                await client.cut("the replica was lost; the answer is not whole", "replica_lost")
                return "broken"
            await client.take(b"", more=False)
            return "answered"

    async def _opened(
        self, name: str, call: Call, stack: contextlib.AsyncExitStack
    ) -> "tuple[httpx.Response, AsyncIterator[bytes], bytes]":
        """A replica's answer up to the first piece that can be passed on."""
        try:
            async with asyncio.timeout(None) as patience:
                with self._waits(name, patience):
                    response = await self._upstream.send(call.to(name, self.config), stream=True)
                    stack.push_async_callback(response.aclose)
                    if response.status_code in (429, 503):
                        raise await refused(response)
                    pieces = pieces_of(response)
                    first = await anext(pieces, b"")
                    if not first and isinstance(pieces, WholeEvents):
                        raise httpx.RemoteProtocolError("a stream without an event")
                    return response, pieces, first
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            self._failed(name, f"not reached: {line(error)}", is_silent=True)
            raise UnreachableError from error
        except httpx.LocalProtocolError as error:
            raise RefusedError(
                "invalid", 400, f"the request cannot be passed on: {line(error)}", code="invalid"
            ) from error
        except (httpx.TransportError, TimeoutError) as error:
            self._failed(name, f"lost before its answer: {line(error)}", is_silent=False)
            raise LostError from error

    @contextlib.contextmanager
    def _waits(self, name: str, patience: asyncio.Timeout) -> Iterator[None]:
        """While inside, the end of the replica ends the patience."""
        self._waiting[name].add(patience)
        try:
            yield
        finally:
            self._waiting[name].discard(patience)

    # Their health.

    def _failed(self, name: str, how: str, *, is_silent: bool) -> None:
        """The replica failed; where it is left out for its silence, requests that wait for it go elsewhere."""
        if not self.balancer.failed(name):
            return
        self.counts.left_out.labels(name).inc()
        self._say(f"replica {name} is left out: {how}")
        if is_silent:
            waiting, self._waiting[name] = self._waiting[name], set()
            for patience in waiting:
                patience.reschedule(0.0)

    async def check(self, name: str) -> None:
        """One health check."""
        try:
            async with asyncio.timeout(self.config.health_within):
                async with self._upstream.stream("GET", name + HEALTH, timeout=self.config.health_within) as response:
                    status = response.status_code
        except (httpx.TransportError, TimeoutError) as error:
            self._failed(name, f"its health check failed: {line(error)}", is_silent=True)
            return
        if status >= 300:
            self._failed(name, f"its health check says {status}", is_silent=False)
        elif self.balancer.healthy(name):
            self._say(f"replica {name} is up")

    async def _look_after(self, name: str) -> None:
        while True:
            await asyncio.sleep(self.config.health_every)
            await self.check(name)

    @contextlib.asynccontextmanager
    async def looking_after(self) -> AsyncIterator[None]:
        """While inside, replicas are checked; all have been once on entry."""
        names = list(self.balancer.replicas)
        await asyncio.gather(*map(self.check, names))
        checks = [asyncio.create_task(self._look_after(name)) for name in names]
        try:
            yield
        finally:
            for task in checks:
                task.cancel()
            await asyncio.gather(*checks, return_exceptions=True)
            await self._upstream.aclose()

    # Its end.

    async def drain(self) -> None:
        """Refuse what comes, let what runs end, and cut what has not ended in time."""
        self.is_draining = True
        end = time.monotonic() + self.config.drain_within
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for task in self._running:
            task.cancel()

    # What else it answers.

    async def health(self, request: HttpRequest) -> Response:
        """Whether it is of use to send requests here."""
        conditions = [replica.condition for replica in self.balancer.replicas.values()]
        is_fine = not self.is_draining and "up" in conditions
        status = "draining" if self.is_draining else "ok" if is_fine else "no replica is up"
        content = {"status": status, "up": conditions.count("up"), "replicas": len(conditions)}
        return JSONResponse(content, 200 if is_fine else 503, headers=None if is_fine else {"retry-after": "1"})

    async def metrics(self, request: HttpRequest) -> Response:
        """Everything counted."""
        return Response(self.counts.exposition(), media_type="text/plain; version=0.0.4")

    async def replicas(self, request: HttpRequest) -> Response:
        """What is known of the replicas."""
        return self._refused(request) or JSONResponse(
            [dataclasses.asdict(replica) for replica in self.balancer.replicas.values()]
        )

    async def drain_replica(self, request: HttpRequest) -> Response:
        """POST /admin/drain?replica=URL: nothing new for it."""
        return self._refused(request) or self._changed(self.balancer.drain, request)

    async def resume_replica(self, request: HttpRequest) -> Response:
        """POST /admin/resume?replica=URL: it takes requests again once its health is good."""
        return self._refused(request) or self._changed(self.balancer.resume, request)

    def _changed(self, change: Callable[[str], None], request: HttpRequest) -> Response:
        name = request.query_params.get("replica", "").rstrip("/")
        try:
            change(name)
        except ValueError as error:
            return JSONResponse(problem(str(error), "invalid_request_error", "no_replica"), 404)
        return JSONResponse(dataclasses.asdict(self.balancer.replicas[name]))

    def _refused(self, request: HttpRequest) -> Response | None:
        """A refusal, unless who asks has the admin key."""
        if self._admin_key is None:
            message = "this router has no admin key; start it with MESHLIGHT_ADMIN_KEY in its environment"
            return JSONResponse(problem(message, "invalid_request_error", "no_admin_key"), 403)
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        if not hmac.compare_digest(given, self._admin_key.encode()):
            return JSONResponse(problem("the admin key is wrong", "invalid_request_error", "invalid_api_key"), 401)
        return None


def app(router: Router) -> Starlette:
    """All paths of a router."""
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    return Starlette(
        routes=[
            Route("/v1/{rest:path}", Forwarding(router), methods=methods),
            Route("/health", router.health),
            Route("/metrics", router.metrics),
            Route("/admin/replicas", router.replicas),
            Route("/admin/drain", router.drain_replica, methods=["POST"]),
            Route("/admin/resume", router.resume_replica, methods=["POST"]),
        ]
    )


class Forwarding:
    """`Router.forward` as an ASGI application, which a route takes as it is where it is no function."""

    def __init__(self, router: Router):
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        await self._router.forward(scope, receive, send)


def serve(router: Router, bound: socket.socket) -> int:
    """Answer at the socket till SIGTERM or SIGINT; what runs then may end. -> exit status."""
    asyncio.run(_serve(router, bound))
    return 0


async def _serve(router: Router, bound: socket.socket) -> None:
    host, port, *_ = bound.getsockname()
    at = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    async with router.looking_after():
        print(f"{at} stands before {len(router.balancer.replicas)} replicas", flush=True)
        await listen(app(router), bound, drain=router.drain, patience=router.config.stall, say=say)


def say(line: str) -> None:
    """Tell whoever runs the router."""
    print(line, file=sys.stderr, flush=True)


# Bytes and headers.


class WholeEvents:
    """The whole events of an answer, one piece after the other."""

    def __init__(self, pieces: AsyncIterator[bytes]):
        self.events, self._pieces, self._is_over = Events(), pieces, False

    def __aiter__(self) -> "WholeEvents":
        return self

    async def __anext__(self) -> bytes:
        """At least one event."""
        while not self._is_over:
            piece = await anext(self._pieces, None)
            self._is_over = piece is None
            whole = self.events.rest() if piece is None else self.events.take(piece)
            if whole:
                return whole
        raise StopAsyncIteration


def pieces_of(response: httpx.Response) -> AsyncIterator[bytes]:
    """A body as it comes; of an event stream only whole events."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_plain = response.headers.get("content-encoding", "identity") == "identity"
    pieces = response.aiter_raw()
    return WholeEvents(pieces) if kind == "text/event-stream" and is_plain else pieces


async def read(receive: Receive, limit: int) -> bytes:
    """A request's body, or RefusedError where it is larger than the limit."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client left")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > limit:
            text = f"the body is larger than {limit} bytes; send less, or start the router with a larger --body-limit"
            raise RefusedError("invalid", 413, text, code="too_large", headers=[(b"connection", b"close")])
    return b"".join(parts)


async def left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def refused(response: httpx.Response) -> RefusedError:
    """A replica's own refusal, as it is."""
    content = b""
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > REFUSAL_LIMIT:
            break
    status = response.status_code
    found = RefusedError("refused", status, f"a replica answered {status}", code="refused")
    if len(content) <= REFUSAL_LIMIT:
        found.content = content
        found.headers = passed_on(response.headers.raw, without={b"content-length", b"content-type"})
    if "retry-after" not in response.headers:
        found.headers.append((b"retry-after", b"1"))
    return found


def passed_on(headers: Sequence[tuple[bytes, bytes]], *, without: set[bytes]) -> Headers:
    """The headers that go on to the other side."""
    named = {
        name.strip().lower() for key, value in headers if key.lower() == b"connection" for name in value.split(b",")
    }
    return [(key, value) for key, value in headers if key.lower() not in ONE_HOP | without | named]


def parsed(body: bytes) -> Any:
    """The JSON of a body, or None; the replica says what is wrong with it."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def problem(message: str, kind: str, code: str) -> dict[str, Any]:
    """An error as OpenAI's clients know it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join((str(error) or type(error).__name__).split())
