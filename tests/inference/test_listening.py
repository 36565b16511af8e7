"""A server's socket: had or refused, and its end after a signal."""

import asyncio
import os
import signal
import socket

import pytest

from inference.listening import check_free, listen, listening_socket


def test_a_signal_right_after_the_announcement_drains_and_ends():
    said = []

    async def drain():
        said.append("drained")

    async def app(scope, receive, send):
        raise AssertionError("nobody asked")

    def announce():
        os.kill(os.getpid(), signal.SIGTERM)

    bound = listening_socket("127.0.0.1", 0)
    asyncio.run(listen(app, bound, drain=drain, patience=1.0, say=said.append, announce=announce))
    assert said[-1] == "drained"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_does_not_wait_for_the_drain():
    async def drain():
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    async def app(scope, receive, send):
        raise AssertionError("nobody asked")

    def announce():
        os.kill(os.getpid(), signal.SIGTERM)

    bound = listening_socket("127.0.0.1", 0)
    listening = listen(app, bound, drain=drain, patience=1.0, say=lambda line: None, announce=announce)
    asyncio.run(asyncio.wait_for(listening, 30))


def test_a_port_in_use_and_a_strange_address_are_refused_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^port {port} of 127\.0\.0\.1 can not be had \(.*\); give another --port"
        ):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"^--host 999\.1\.1\.1 is no address of this machine"):
        check_free("999.1.1.1", 0)
