"""What every HTTP request passes first: its key, its size, the time it may take to come. Knows no API.

An ASGI application around another. The body is read here, up to a bound, so that nothing inside waits for a client.
"""

import asyncio
import json
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.config import ServerConfig
from inference.keys import Keys
from inference.metrics import Metrics
from inference.openai_api import ApiError

OPEN = ("/", "/health", "/metrics", "/metrics.json", "/openapi.json")  # to everybody
SAFE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class GoneError(Exception):
    """The client hung up."""


class Gate:
    """Lets requests through to the application, or refuses them."""

    def __init__(self, app: ASGIApp, *, keys: Keys, config: ServerConfig, metrics: Metrics):
        self._app, self._keys, self._config, self._metrics = app, keys, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responded(path_label(scope["path"]), message["status"])
                name = (b"x-request-id", secrets.token_hex(8).encode())
                message = {**message, "headers": [*message.get("headers", []), *SAFE, name]}
            await send(message)

        try:
            scope.setdefault("state", {})["salt"] = self._salt(scope)
            body = await self._body(scope, receive)
        except GoneError:
            return None
        except ApiError as refusal:
            return await refuse(refusal, sending)
        return await self._app(scope, replayed(body, receive), sending)

    def _salt(self, scope: Scope) -> str:
        """What the caches of this asker are told apart by; ApiError for a wrong key."""
        shown = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = shown.partition(b" ")
        key = key.strip() if kind.lower() == b"bearer" else b""
        if scope["path"] not in OPEN and not self._keys.admits(key):
            message = "the API key is wrong" if key else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")
        return self._keys.salt(key) if self._config.isolate_keys else ""

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """All of the body."""
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self._check_size(int(told) if told.isdigit() else 0)
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.patience):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise GoneError
                    body += message.get("body", b"")
                    self._check_size(len(body))
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            message = f"the request did not arrive within {self._config.patience:g} s"
            raise ApiError(408, message, code="timeout", Connection="close") from None

    def _check_size(self, size: int) -> None:
        if size > self._config.max_body:
            message = f"the request has {size} bytes or more; {self._config.max_body} are the most"
            raise ApiError(413, message, code="request_too_large", Connection="close")


def path_label(path: str) -> str:
    """The path, if it is one that exists: no client may make up new ones."""
    known = (*OPEN, "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings")
    return path if path in known else "other"


def replayed(body: bytes, receive: Receive) -> Receive:
    """The body again, then what comes after it."""
    told = False

    async def receiving() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


async def refuse(refusal: ApiError, send: Send) -> None:
    """Answer with the refusal."""
    content = json.dumps(refusal.body).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in (refusal.headers or {}).items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": content})
