"""A connection that does not wait forever: a client that sends no request, or reads no answer, is cut off.

uvicorn waits for both without end. The transport says when its buffer is full and when it has room again, so a reader
that is slow but steady stays.
"""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HTTP: Any = AutoHTTPProtocol  # one of two classes, by what is installed
BUFFER = 65_536  # bytes on their way to a client that does not read: here, and as many in the system's own buffer


def patient(seconds: float) -> type[asyncio.Protocol]:
    """The protocol with this patience."""

    class Connection(HTTP):
        """One client."""

        _cut: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """A client came: it has to ask."""
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=BUFFER)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            self._wait()

        def data_received(self, data: bytes) -> None:
            """More came, perhaps the beginning of another request: it has to go on."""
            if self._cut is None and not self._is_asked:
                self._wait()
            super().data_received(data)

        def on_headers_complete(self) -> None:
            """httptools has read a request's headers."""
            self._go_on()
            super().on_headers_complete()

        def handle_events(self) -> None:
            """h11 has read something."""
            super().handle_events()
            if self._is_asked:
                self._go_on()

        def pause_writing(self) -> None:
            """The buffer is full: the client has to read."""
            super().pause_writing()
            self._wait()

        def resume_writing(self) -> None:
            """It has read."""
            super().resume_writing()
            self._go_on()

        def connection_lost(self, exc: Exception | None) -> None:
            """It has gone."""
            self._go_on()
            super().connection_lost(exc)

        @property
        def _is_asked(self) -> bool:
            """Whether a request's headers came, and its answer has not ended."""
            return self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            self._go_on()
            self._cut = self.loop.call_later(seconds, self.transport.abort)

        def _go_on(self) -> None:
            if self._cut is not None:
                self._cut.cancel()
                self._cut = None

    return Connection
