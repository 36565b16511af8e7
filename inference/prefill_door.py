"""POST /internal/blocks: a server computes a prompt for another one and hands over its KV blocks. Knows no API.

An ASGI application around the server's own. Only who knows the shared secret is answered.
"""

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import jax
import numpy as np
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from inference.blocks import block_names
from inference.engine import Engine, Exported
from inference.handover import (
    ASK,
    DIGEST,
    Ask,
    DamagedError,
    Head,
    Layout,
    Leaf,
    Sealing,
    StrangerError,
    read_ask,
    written_blocks,
)
from inference.responses import unless_gone
from inference.service import FullError, Service, TimedOutError, UnavailableError
from inference.steps import over_blocks

PATH = "/internal/blocks"
AT_ONCE = 8  # blocks of a frame: the engine reads or writes so many between two steps
KNOWN_TEXT = 33  # tokens of the text that shows whether two servers have one model
SALT_LIMIT = 4096  # bytes
PATIENCE = 30.0  # seconds for a question to come


class About(NamedTuple):
    """What two servers have to have in common."""

    layout: Layout
    structure: Any  # the tree that a block's arrays are leaves of
    block_size: int
    fingerprint: tuple[float, ...]  # how the model sees a known text


class PrefillDoor:
    """The path, in front of an application that has all the others."""

    def __init__(self, app: ASGIApp, service: Service, about: About, *, secret: str, max_length: int):
        self._app, self._service, self._about, self._secret = app, service, about, secret
        self._limit = ASK.size + SALT_LIMIT + 4 * max_length + DIGEST

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] != PATH:
            return await self._app(scope, receive, send)
        request = HttpRequest(scope, receive)
        try:
            async with asyncio.timeout(PATIENCE):
                content = await self._read(request)
        except (ClientDisconnect, TimeoutError):
            return None
        response = await unless_gone(receive, self._answer(request.method, content))
        return None if response is None else await response(scope, receive, send)

    async def _read(self, request: HttpRequest) -> bytes | None:
        """The body; None where it is too large."""
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > self._limit:
                return None
        return bytes(content)

    async def _answer(self, method: str, content: bytes | None) -> Response:
        if method != "POST":
            return refused(405, "POST is the only method")
        if content is None:
            return refused(413, f"the question has more than {self._limit} bytes")
        try:
            return await self._computed(read_ask(content, self._secret))
        except StrangerError as error:
            return refused(401, str(error))
        except ValueError as error:  # damaged, or a prompt that no request can have
            return refused(400, str(error))
        except FullError as error:
            return refused(429, str(error))
        except (UnavailableError, TimedOutError) as error:
            return refused(503, str(error))

    async def _computed(self, ask: Ask) -> Response:
        """Let the engine read the prompt's full blocks, as it reads any prompt, then hand out what its cache has."""
        size = self._about.block_size
        full = ask.tokens[: len(ask.tokens) // size * size]
        if not full:
            raise DamagedError(f"the prompt has {len(ask.tokens)} tokens, fewer than the {size} of a block")
        start, before = time.monotonic(), await self._known(ask)
        if before * size < len(full):
            await self._service.read(full, ask.salt)
        seconds = time.monotonic() - start
        head = Head(
            layout=self._about.layout,
            blocks=max(0, await self._known(ask) - ask.have),
            fingerprint=self._about.fingerprint,
            computed=len(full) - before * size,
            seconds=seconds,
        )
        return StreamingResponse(self._frames(ask, head), media_type="application/octet-stream")

    async def _known(self, ask: Ask) -> int:
        """Blocks of the prompt that the cache has."""
        return await self._service.call(lambda engine: len(engine.known_blocks(ask.tokens, ask.salt)))

    async def _frames(self, ask: Ask, head: Head) -> AsyncIterator[bytes]:
        """The head, then a few blocks at a time, so that the engine's own work goes on between them."""
        sealing = Sealing(self._secret, ask)
        yield sealing.seal(head.written())
        for start, end in parts(ask.have, ask.have + head.blocks):
            part = await self._service.call(functools.partial(exported, ask=ask, start=start, most=end - start))
            if len(part.names) < end - start:  # others needed the room meanwhile; the answer ends too early
                return
            content = written_blocks(part.names, jax.tree.leaves(part.contents), head.layout)
            yield await asyncio.to_thread(sealing.seal, content)


def exported(engine: Engine, *, ask: Ask, start: int, most: int) -> Exported:
    """Some blocks of a prompt."""
    return engine.export_blocks(ask.tokens, ask.salt, start=start, most=most)


def about(engine: Engine) -> About:
    """What this engine's blocks look like, and how its model sees the known text."""
    shapes = engine.block_shapes()
    axes = jax.tree.leaves(over_blocks(lambda axis, leaf: axis, shapes))
    layout = tuple(
        Leaf(shape=tuple(leaf.shape), axis=axis, dtype=str(leaf.dtype))
        for leaf, axis in zip(jax.tree.leaves(shapes), axes, strict=True)
    )
    num, size = engine.program.num_tokens, min(KNOWN_TEXT, engine.max_length)
    tokens = tuple((7 + 7919 * place) % num for place in range(size))
    return About(layout, jax.tree.structure(shapes), engine.options.block_size, tuple(engine.logprobs([tokens])[0]))


def compile_parts(engine: Engine) -> None:
    """Compile reading and writing of as many blocks as frames have, with blocks that no prompt ever finds."""
    size, shapes = engine.options.block_size, engine.block_shapes()
    for most in (1 << i for i in range(AT_ONCE.bit_length())):
        count = min(most, engine.max_length // size)
        tokens, salt = (0,) * (count * size), secrets.token_hex(16)
        names = list(block_names(tokens, size, salt=salt))
        zeros = over_blocks(lambda axis, leaf, count=count: np.zeros(of(leaf.shape, axis, count), leaf.dtype), shapes)
        engine.import_blocks(Exported(names, zeros))
        engine.export_blocks(tokens, salt)


def of(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    """The shape of so many blocks."""
    return (*shape[:axis], count, *shape[axis + 1 :])


def parts(start: int, end: int) -> list[tuple[int, int]]:
    """Which blocks come in which frame.  2, 20 -> [(2, 10), (10, 18), (18, 20)]"""
    return [(first, min(first + AT_ONCE, end)) for first in range(start, end, AT_ONCE)]


def refused(status: int, message: str) -> Response:
    """A refusal in the form that all have."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": None}}, status)
