"""Answers on their way to a client who may leave: whole ones, and streams of events. Knows no API but its errors."""

import asyncio
import json
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from inference.openai_api import ApiError
from inference.service import CutOffError, FullError, TimedOutError, UnavailableError

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Server-sent events, one an item, as they come. Whatever happens, `close` is called at the end."""

    media_type = "text/event-stream"

    def __init__(self, items: AsyncIterator[dict[str, Any]], close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._items, self._close = items, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send till the end, or till the client has gone."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for item in self._items:
                await send({"type": "http.response.body", "body": event(item), "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": event(refusal(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


def event(item: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(item, ensure_ascii=False).encode() + b"\n\n"


async def whole(receive: Receive, work: Coroutine[Any, Any, dict[str, Any]], close: Callable[[], None]) -> Response:
    """The answer when it is there; nothing where the client has gone meanwhile."""
    try:
        found = await unless_gone(receive, work)
        return Response(status_code=499) if found is None else JSONResponse(found)
    finally:
        close()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work gives; None as soon as the client has gone, and then the work ends."""
    tasks = working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def hang_up(receive: Receive) -> None:
    """Wait till the client goes."""
    while (await receive())["type"] != "http.disconnect":
        pass


def refusal(error: Exception) -> ApiError:
    """An error as the API words it. What nobody expected is told on stderr alone."""
    match error:
        case ApiError():
            return error
        case FullError():
            return ApiError(429, str(error), code="queue_full", Retry_After=str(error.wait))
        case UnavailableError():
            return ApiError(503, str(error), code="unavailable", Retry_After="5")
        case TimedOutError():
            return ApiError(503, str(error), code="timeout", Retry_After="1")
        case CutOffError():
            return ApiError(408, str(error), code="slow_reader")
        case ValueError():
            return ApiError(400, str(error))
        case _:
            traceback.print_exception(error, file=sys.stderr)
            return ApiError(500, "the server made a mistake; its log tells more")
