"""A server that speaks as OpenAI's does and misbehaves when told: `python -m tests.inference.fake_upstream PORT`.

What a request may ask for besides its prompt: `words` (events or words), `pause` (seconds between them), `first`
(seconds before anything is sent), `die` (end the process after so many events), `stop` (end the stream so, without
[DONE]), `hold` (wait for POST /release after so many events), `bulk` (bytes of each event's text).
"""

import asyncio
import collections
import json
import os
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

seen = collections.Counter()
control = {"status": 200, "health": 200, "die": False}  # of all requests from now on
release = asyncio.Event()
arrivals: list[dict] = []


async def complete(scope, receive, send):
    """Both kinds of completions, as plain ASGI, so that it is known what was sent when."""
    request = Request(scope, receive)
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        await JSONResponse({"error": {"message": "no JSON"}}, 400)(scope, receive, send)
        return
    seen["came"] += 1
    arrivals.append({"headers": dict(request.headers), "query": scope["query_string"].decode(), "body": body})
    if control["status"] != 200:
        answer = JSONResponse({"error": {"message": "as told"}}, control["status"], headers={"retry-after": "7"})
        await answer(scope, receive, send)
        return
    working = asyncio.create_task(answer_with(body, scope, send))
    leaving = asyncio.create_task(left(receive))
    await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        seen["cancelled"] += 1
        working.cancel()
    leaving.cancel()
    await asyncio.gather(working, leaving, return_exceptions=True)


async def left(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer_with(body, scope, send):
    await asyncio.sleep(body.get("first", 0))
    if control["die"]:
        os._exit(9)
    is_chat, name = "messages" in body, scope["server"][1]
    words = [f"{name}-{index} " + "x" * body.get("bulk", 0) for index in range(body.get("words", 3))]
    if not body.get("stream"):
        await asyncio.sleep(body.get("pause", 0) * len(words))
        text = "".join(words)
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        answer = {"id": "x", "object": "x", "created": 0, "model": "fake", "choices": [choice]}
        await JSONResponse(answer, headers={"x-fake": "yes"})(scope, None, send)
        seen["finished"] += 1
        return
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-fake", b"yes")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for index, word in enumerate(words):
        await wait_or_die(body, index)
        if body.get("stop") == index:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        choice = {"index": 0, "finish_reason": None}
        choice |= {"delta": {"content": word}} if is_chat else {"text": word}
        event = {"id": "x", "object": "x", "created": 0, "model": "fake", "choices": [choice]}
        data = f"data: {json.dumps(event)}\n\n".encode()
        for piece in (data[:9], data[9:]):  # the network cuts where it likes
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            seen["sent"] += len(piece)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
    seen["finished"] += 1


async def wait_or_die(body, index):
    if body.get("die") == index:
        await asyncio.sleep(0.05)  # so that what was sent is on its way
        os._exit(9)
    if body.get("hold") == index:
        await release.wait()
    await asyncio.sleep(body.get("pause", 0) if index else 0)


async def health(request: Request) -> Response:
    return JSONResponse({}, control["health"])


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model", "created": 0, "owned_by": "x"}]})


async def tell(request: Request) -> Response:
    control.update(await request.json())
    return JSONResponse(control)


async def let_go(request: Request) -> Response:
    release.set()
    return JSONResponse({})


async def report(request: Request) -> Response:
    return JSONResponse({"seen": seen, "arrivals": arrivals[-20:]})


async def secret(request: Request) -> Response:
    return PlainTextResponse("internal")


class Completing:
    """An ASGI application, since a route takes functions for something else."""

    async def __call__(self, scope, receive, send):
        await complete(scope, receive, send)


app = Starlette(
    routes=[
        Route("/v1/completions", Completing(), methods=["POST"]),
        Route("/v1/chat/completions", Completing(), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/control", tell, methods=["POST"]),
        Route("/release", let_go, methods=["POST"]),
        Route("/report", report),
        Route("/internal/blocks", secret),
    ]
)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
