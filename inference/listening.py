"""A socket that clients come to, from the first bind to the last answer after SIGTERM. Knows no API.

The first SIGTERM or SIGINT drains: what runs ends, what is new is refused. A second one ends the server at once.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from inference.connection import patient

Drain = Callable[[], Awaitable[None]]


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket at the address; ValueError in one line where there can be none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host {host} is no address of this machine: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"port {port} of {host} can not be had ({error.strerror or error}); "
            "give another --port, or 0 for a free one"
        ) from None
    return bound


def check_free(host: str, port: int) -> None:
    """ValueError where listening there would fail: before minutes are spent on loading."""
    listening_socket(host, port).close()


class Listener(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


async def listen(
    app: ASGIApp, bound: socket.socket, *, drain: Drain, patience: float, say: Callable[[str], None]
) -> None:
    """Serve till a signal comes, drain, and end."""
    config = uvicorn.Config(
        app, http=patient(patience), ws="none", lifespan="off", log_level="warning", access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=5, backlog=2048,
    )  # fmt: skip
    server = Listener(config)
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if asked.is_set():
            server.should_exit = server.force_exit = True
        asked.set()

    async def end() -> None:
        await asked.wait()
        say("draining: what runs ends, what is new is refused; a second signal ends it at once")
        await drain()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    ending = asyncio.create_task(end())
    try:
        await server.serve(sockets=[bound])
    finally:
        ending.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
