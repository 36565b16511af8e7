"""The OpenAI-compatible server: which path does what. Knows no tokens and no devices.

    asking (wire -> plan) -> service (one engine in its thread) -> pieces (tokens -> text) -> wire

Records of the wire are in openai_api, the two kinds of completion in completions and chats, refusals in responses.
"""

import asyncio
import base64
import concurrent.futures
import functools
import itertools
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from fastapi import FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from data import chat
from data.tokenizer import HuggingFaceTokenizer, Tokenizer
from inference import asking, chats, completions
from inference.asking import Served
from inference.completions import Echo
from inference.config import ServerConfig
from inference.exchange import Exchange
from inference.gate import Gate
from inference.keys import Keys, read_keys
from inference.listening import listen, listening_socket
from inference.metrics import Metrics
from inference.openai_api import (
    ApiError,
    AskedChat,
    AskedCompletion,
    AskedEmbedding,
    ChatCompletion,
    Completion,
    Embeddings,
    ErrorBody,
    Model,
    Models,
    error_body,
)
from inference.pieces import answers_of
from inference.request import Prompt
from inference.responses import EventStream, refusal, whole
from inference.service import CutOffError, FullError, Reading, Service, TimedOutError, TokenEngine, UnavailableError
from inference.spelling import Spelling

PAGE = pathlib.Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
REFUSALS = {
    400: "the request is wrong", 401: "no key, or a wrong one", 404: "no such model", 408: "too slow",
    413: "too large", 429: "the queue is full", 503: "no answer now",
}  # fmt: skip
TYPES = ("str", "int", "float", "bool", "none")  # pydantic names the type that it tried, behind the field
TEXTS_AT_ONCE, TOKENS_AT_ONCE = 8, 4096  # embedded between two steps of the engine, one text at least


Before = Callable[[Prompt, str], Awaitable[None]]


@runtime_checkable
class ServedEngine(TokenEngine, Protocol):
    """What the server needs of an engine."""

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer."""
        ...


class StrictRequest(HttpRequest):
    """A request whose JSON is JSON: no NaN, no half characters, nothing nested without end."""

    async def json(self) -> Any:
        """The body."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None


class StrictRoute(APIRoute):
    """A path whose requests are strict."""

    def get_route_handler(self) -> Callable[..., Any]:
        """FastAPI's own handler, given a strict request."""
        handle = super().get_route_handler()

        async def strict(request: HttpRequest) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


class Doors:
    """What each path does."""

    def __init__(self, service: Service, served: Served, config: ServerConfig, before: Before | None = None):
        self._service, self._served, self._config, self._before = service, served, config, before
        self._readers = concurrent.futures.ThreadPoolExecutor(2, "asking")  # tokenize and read grammars
        self._num_reading = 0  # requests there

    async def complete(self, asked: AskedCompletion, request: HttpRequest) -> Response:
        """Continue one prompt or several."""
        asking.check_model(asked.model, self._served)
        plan = await self._planned(completions.plan, asked, request)
        echoes = await self._echoes(asked, plan.prompts) if asked.echo else []
        wire = completions.Texts(asked, plan, self._served, id=f"cmpl-{secrets.token_hex(12)}", echoes=echoes)
        if not plan.requests:
            return JSONResponse(wire.only_echo())
        return await self._answered(wire, plan, is_stream=bool(asked.stream), request=request)

    async def converse(self, asked: AskedChat, request: HttpRequest) -> Response:
        """Answer a conversation."""
        asking.check_model(asked.model, self._served)
        plan = await self._planned(chats.plan, asked, request)
        wire = chats.Turns(asked, plan, self._served, id=f"chatcmpl-{secrets.token_hex(12)}")
        return await self._answered(wire, plan, is_stream=bool(asked.stream), request=request)

    async def embeddings(self, asked: AskedEmbedding, request: HttpRequest) -> Response:
        """A vector for each text."""
        asking.check_model(asked.model, self._served)
        if asked.dimensions is not None:
            raise ApiError(400, "dimensions is not supported: vectors are as wide as the model", param="dimensions")
        read = functools.partial(asking.prompts, asked.input, self._served, param="input", config=self._config)
        texts = await self._in_thread(read)
        most = self._served.max_length
        for text in texts:
            if len(text) > most:
                message = f"a text has {len(text)} tokens, but the model's context is {most}; shorten it"
                raise ApiError(400, message, param="input", code="context_length_exceeded")
        embedded = self._embedded(texts, is_base64=asked.encoding_format == "base64")
        return await whole(request.receive, embedded, lambda: None)

    async def _embedded(self, texts: Sequence[Prompt], *, is_base64: bool) -> dict[str, Any]:
        vectors = [vector for part in parts(texts) for vector in await self._service.embed(part)]
        data = [
            {"object": "embedding", "index": i, "embedding": written(vector, is_base64=is_base64)}
            for i, vector in enumerate(vectors)
        ]
        count = sum(map(len, texts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": self._served.name, "data": data, "usage": usage}

    async def models(self) -> Models:
        """What is served."""
        return Models(data=[self._model()])

    async def model(self, name: str) -> Model:
        """One model by its name."""
        asking.check_model(name, self._served)
        return self._model()

    async def health(self) -> Response:
        """Whether requests are taken."""
        service, status = self._service, "ok"
        if service.trouble:
            status = "failed" if service.failure else "draining"
        told = {
            "status": status, "detail": service.trouble, "model": self._served.name, "open": service.num_open,
            "capacity": service.capacity,
        }  # fmt: skip
        return JSONResponse(told, 503 if service.trouble else 200)

    async def metrics(self) -> Response:
        """Prometheus metrics."""
        return Response(self._service.metrics.text(self._service.stats), media_type="text/plain; version=0.0.4")

    async def metrics_json(self) -> Response:
        """The same of the engine alone, for the web page."""
        service = self._service
        told = {"time": time.monotonic(), "open": service.num_open, "capacity": service.capacity}
        about = {"model": self._served.name, "chats": self._served.template is not None, "detail": service.trouble}
        return JSONResponse({**told, **about, **service.stats._asdict()})

    async def page(self) -> Response:
        """A page to converse and to look at the engine."""
        headers = {"content-security-policy": POLICY, "x-frame-options": "DENY", "cache-control": "no-cache"}
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    def _model(self) -> Model:
        served = self._served
        return Model(id=served.name, created=served.created, max_model_len=served.max_length)

    async def _planned(self, make: Callable[..., asking.Plan], asked: Any, request: HttpRequest) -> asking.Plan:
        """The plan, made beside the event loop, which other answers need."""
        salt, capacity = request.scope["state"]["salt"], self._service.capacity
        return await self._in_thread(
            functools.partial(make, asked, self._served, self._config, salt=salt, capacity=capacity)
        )

    async def _echoes(self, asked: AskedCompletion, prompts: Sequence[Prompt]) -> list[Echo]:
        """The prompts as they are told again."""
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        echoes = []
        for i, prompt in enumerate(prompts):
            text = texts[i] if isinstance(texts[0], str) else self._served.tokenizer.decode(prompt)
            known = await self._service.logprobs(prompt) if asked.logprobs is not None and len(prompt) > 1 else []
            echoes.append(Echo(str(text), list(prompt), [None, *known]))
        return echoes

    async def _answered(
        self, wire: completions.Texts | chats.Turns, plan: asking.Plan, *, is_stream: bool, request: HttpRequest
    ) -> Response:
        """Hand the plan in, and its answers out."""
        if self._before is not None:
            prompts = {(each.prompt, each.salt) for each in plan.requests}
            await asyncio.gather(*(self._before(*prompt) for prompt in prompts))
        stream = self._service.submit(plan.requests)
        answers = answers_of(plan, self._served.tokenizer)
        if is_stream:
            return EventStream(wire.chunks(stream, answers), stream.close)
        return await whole(request.receive, wire.whole(stream, answers), stream.close)

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        """What the function gives, beside the event loop, where there is room for one more request."""
        self._service.check_room(1 + self._num_reading)
        self._num_reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, function)
        finally:
            self._num_reading -= 1


def parts(texts: Sequence[Prompt]) -> list[list[Prompt]]:
    """The texts in order, cut so that no part holds the engine up for long."""
    cut: list[list[Prompt]] = []
    for text in texts:
        longest = max(map(len, [text, *(cut[-1] if cut else [])]))
        if not cut or len(cut[-1]) == TEXTS_AT_ONCE or longest * (len(cut[-1]) + 1) > TOKENS_AT_ONCE:
            cut.append([])
        cut[-1].append(text)
    return cut


def written(vector: np.ndarray, *, is_base64: bool) -> list[float] | str:
    """A vector as it travels."""
    vector = vector.astype("<f4")
    return base64.b64encode(vector.tobytes()).decode() if is_base64 else vector.tolist()


def application(
    service: Service, served: Served, config: ServerConfig, keys: Keys, *, before: Before | None = None
) -> ASGIApp:
    """All paths, behind the gate. `before` is done with each prompt and its salt before the engine gets it."""
    doors = Doors(service, served, config, before)
    app = FastAPI(title="Meshlight", docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": why} for status, why in REFUSALS.items()
    }
    guarded: dict[str, Any] = {"responses": refusals, "dependencies": [Security(HTTPBearer(auto_error=False))]}

    def asked(path: str, door: Callable[..., Any], answer: type, **more: Any) -> None:
        told = {200: {"model": answer, **more}}
        app.add_api_route(path, door, methods=["POST"], **{**guarded, "responses": {**refusals, **told}})

    stream = {"content": {"text/event-stream": {}}}
    asked("/v1/completions", doors.complete, Completion, **stream)
    asked("/v1/chat/completions", doors.converse, ChatCompletion, **stream)
    asked("/v1/embeddings", doors.embeddings, Embeddings)
    app.add_api_route("/v1/models", doors.models, methods=["GET"], **guarded)
    app.add_api_route("/v1/models/{name:path}", doors.model, methods=["GET"], **guarded)
    app.add_api_route("/health", doors.health, methods=["GET"], responses={503: {"description": "no answer now"}})
    for path, door in (("/metrics", doors.metrics), ("/metrics.json", doors.metrics_json), ("/", doors.page)):
        app.add_api_route(path, door, methods=["GET"], include_in_schema=False)
    handle_errors(app)
    app.openapi = functools.partial(described, app)  # pyright: ignore[reportAttributeAccessIssue]
    return Gate(app, keys=keys, config=config, metrics=service.metrics)


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI adds: what is wrong in a request is told with 400."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version="1", routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = document
    return app.openapi_schema


def handle_errors(app: FastAPI) -> None:
    """Every refusal has the same form."""

    def sent(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status_code, error.headers)

    async def wrong(request: HttpRequest, error: RequestValidationError) -> Response:
        return sent(wrong_field(error))

    async def plain(request: HttpRequest, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            return sent(error)
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    async def other(request: HttpRequest, error: Exception) -> Response:
        return sent(refusal(error))

    app.add_exception_handler(RequestValidationError, wrong)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(HTTPException, plain)  # pyright: ignore[reportArgumentType]
    for kind in (FullError, UnavailableError, TimedOutError, CutOffError, ValueError, Exception):
        app.add_exception_handler(kind, other)


def wrong_field(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request; what was sent is not told again."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    named = ".".join(itertools.takewhile(lambda part: part not in TYPES and not set("[(-") & set(part), parts))[:200]
    return ApiError(400, f"{named or 'the body'}: {first['msg']}", param=named or None, code=first["type"])


def serve(
    engine: ServedEngine, tokenizer: Tokenizer, config: ServerConfig, *, name: str, max_rows: int,
    others: Exchange | None = None,
) -> int:  # fmt: skip
    """Serve till a signal comes; -> exit status."""
    keys = read_keys(config)
    bound = listening_socket(config.host, config.port)
    model = served(engine, tokenizer, config.name or name)
    return asyncio.run(_serve(engine, model, config, keys, bound, capacity=max_rows + config.queue, others=others))


def served(engine: ServedEngine, tokenizer: Tokenizer, name: str) -> Served:
    """The engine's model as the API shows it."""
    template = chat.template_of(tokenizer) if isinstance(tokenizer, HuggingFaceTokenizer) else None
    return Served(
        name=name, tokenizer=tokenizer, template=template, max_length=engine.max_length, created=int(time.time()),
        spelling=Spelling(tokenizer),
    )  # fmt: skip


async def _serve(
    engine: ServedEngine, served: Served, config: ServerConfig, keys: Keys, bound: socket.socket, *, capacity: int,
    others: Exchange | None,
) -> int:  # fmt: skip
    reading = Reading(buffer=config.buffer, patience=config.patience, timeout=config.timeout)
    service = Service(engine, Metrics(), capacity=capacity, reading=reading)
    service.start()
    away = await others.away(service, say) if others else None
    host, port, *_ = bound.getsockname()
    at = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{served.name} is served at {at}", flush=True)
    if not keys and not host.startswith("127.") and host != "::1":
        say(f"anybody who reaches {at} may ask; give --api-key to let in only those who know it")

    async def drain() -> None:
        if not await service.drain(config.drain):
            say(f"{service.num_open} answers did not end within {config.drain:g} s")

    app = application(service, served, config, keys, before=away.before if away else None)
    app = others.door(app, service) if others else app
    try:
        await listen(app, bound, drain=drain, patience=config.patience, say=say)
    finally:
        await service.close()
        if away:
            await away.close()
    return 0


def say(line: str) -> None:
    """Tell whoever runs the server."""
    print(line, file=sys.stderr, flush=True)
