"""Server-sent events as bytes: whole events out of the pieces that the network makes. Knows no event's meaning."""

import json
import re
from typing import Any

LONGEST = 2**20  # bytes held back in wait for the end of an event; beyond, they are passed on as they are
MARKS = (b"\n\n", b"\r\n\r\n", b"\r\r")  # ends of an event
LAST = re.compile(rb'(?:\A|[\r\n])data: ?(?:\[DONE\]|\{\s*"error")')


class Events:
    """What of a stream can be passed on: nothing of an event before its end, so that a stream can end clearly."""

    def __init__(self):
        self._held = b""
        self.has_ended = False  # with [DONE] or an error that the sender told

    def take(self, piece: bytes) -> bytes:
        """One more piece in, all events that are whole now out."""
        held = self._held + piece
        end = max(held.rfind(mark) + len(mark) if mark in held else 0 for mark in MARKS)
        if not end and len(held) > LONGEST:
            end = len(held)
        whole, self._held = held[:end], held[end:]
        self.has_ended = self.has_ended or LAST.search(whole) is not None
        return whole

    def rest(self) -> bytes:
        """The stream has ended: an event that says so. Any other that lacks its end is void, by the standard."""
        rest, self._held = self._held, b""
        return self.take(rest + MARKS[0]) if LAST.search(rest) else b""


def event(data: Any) -> bytes:
    """An event with JSON for data."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
