"""Clients that stall are cut off, whichever of uvicorn's parsers is installed; who is slow but steady is not."""

import contextlib
import json
import time

import httpx
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference import connection
from tests.inference.fake_engine import FakeEngine
from tests.inference.serving import raw, serving

PARSERS = [pytest.param(connection.HTTP, id="installed"), pytest.param(H11Protocol, id="h11")]


def waits(happened) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(params=PARSERS, autouse=True)
def _parser(request, monkeypatch):
    monkeypatch.setattr(connection, "HTTP", request.param)


def asked(**more) -> bytes:
    return raw("/v1/completions", json.dumps({"prompt": "a" * 50, "stream": True, **more}).encode())


def read_to_the_end(client) -> bytes:
    """What comes till the connection is closed or cut."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while more := client.recv(1000):
            said += more
    return said


def test_a_client_that_never_reads_is_cut_off_and_others_are_served():
    engine = FakeEngine(max_length=10**7)
    with serving(engine, patience=0.3, timeout=100.0) as running, running.connect() as lazy:
        lazy.sendall(asked(max_tokens=10**6, logprobs=20))
        waits(lambda: running.service.num_open == 1)
        other = httpx.post(running.url + "/v1/completions", json={"prompt": "ab", "max_tokens": 4})
        assert other.json()["choices"][0]["text"] == "abab"
        waits(lambda: running.service.num_open == 0 and not engine.has_work)


def test_a_client_that_reads_slowly_but_steadily_stays():
    engine = FakeEngine(max_length=10**6)
    with serving(engine, patience=1.0, timeout=100.0, buffer=10**6) as running, running.connect() as slow:
        slow.sendall(asked(max_tokens=1500))
        said = b""
        while b"[DONE]" not in said:
            said += slow.recv(16384)
            time.sleep(0.01)  # much longer than the engine needs
        assert said.count(b'"text": "a"') == 1500


@pytest.mark.parametrize(
    "beginning", [b"", b"POST /v1/comp", b"POST / HTTP/1.1\r\nHost: x\r\n", raw("/v1/completions", b"{" * 9)[:-3]],
    ids=["nothing", "path", "headers", "body"],
)  # fmt: skip
def test_a_client_that_never_finishes_asking_is_cut_off(beginning):
    with serving(FakeEngine(), patience=0.2) as running, running.connect() as slow:
        slow.sendall(beginning)
        said = read_to_the_end(slow)
        assert said == b"" or said.startswith(b"HTTP/1.1 408")


def test_a_second_request_on_the_same_connection_has_to_come_whole_too():
    with serving(FakeEngine(), patience=0.3) as running, running.connect() as slow:
        slow.sendall(raw("/v1/completions", b'{"prompt": "ab", "max_tokens": 2}'))
        said = b""
        while not said.endswith(b"}}"):
            said += slow.recv(4000)
        assert said.startswith(b"HTTP/1.1 200")
        slow.sendall(b"POST /v1/comp")
        assert read_to_the_end(slow) == b""
