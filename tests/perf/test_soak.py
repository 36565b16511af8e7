"""A soak passes where a server stands, and says what failed where it does not."""

import json

import pytest

from perf.__main__ import main
from perf.soak import Answered, SoakConfig, body, is_loopback, report, run
from tests.inference.fake_engine import FakeEngine
from tests.inference.serving import serving


def test_a_server_that_stands_passes(capsys):
    with serving(FakeEngine(max_rows=4, max_length=2000), queue=16) as server:
        asked = ["--url", server.url, "--clients", "6", "--seconds", "1", "--tokens", "8"]
        assert main(["soak", *asked, "--json"]) in (0, 1)  # a busy machine may keep one waiting
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["requests"] >= 6
    assert found["failed"] == 0


def test_failures_are_counted_by_what_they_say(capsys):
    engine = FakeEngine(max_length=2000)
    engine.fails_with = RuntimeError("gone")
    with serving(engine) as server:
        found = run(SoakConfig(url=server.url, clients=2, seconds=1))
    assert found["failed"] == found["requests"] > 0
    assert any("gone" in failure for failure in found["failures"])
    assert not found["passed"]
    capsys.readouterr()


def test_a_wait_that_is_too_long_fails():
    config = SoakConfig(url="http://127.0.0.1:1", seconds=10)
    fine = [Answered(0.0, 1.0, 0.1, 5, "")] * 9
    assert report(config, [*fine, Answered(0.0, 2.9, 0.1, 5, "")], [], elapsed=10.0)["passed"]
    assert not report(config, [*fine, Answered(0.0, 3.1, 0.1, 5, "")], [], elapsed=10.0)["passed"]
    assert not report(config, [*fine, Answered(0.0, 1.0, 0.1, 5, "reset")], [], elapsed=10.0)["passed"]
    assert not report(config, [], [], elapsed=10.0)["passed"]


def test_memory_is_compared_after_the_warm_up():
    sizes = [10, 50, 60, 100, 100, 100, 100, 110, 110, 110, 110]
    memory = [(float(at), size) for at, size in enumerate(sizes)]
    found = report(SoakConfig(url="http://[::1]:1", seconds=10), [], memory, elapsed=10.0)
    assert found["memory_growth"] == pytest.approx(0.1)


def test_every_run_asks_the_same():
    config = SoakConfig(url="http://localhost:1", tokens=32)
    asked = [body(config, index, turn) for index in range(8) for turn in range(8)]
    assert asked == [body(config, index, turn) for index in range(8) for turn in range(8)]
    assert {each["max_tokens"] for each in asked} == {8, 16, 24, 32}
    assert len({each["prompt"] for each in asked}) == 64


def test_other_machines_are_left_alone():
    assert is_loopback("127.0.0.1")
    assert not is_loopback("10.0.0.1")
    with pytest.raises(ValueError, match="is not on this machine"):
        SoakConfig(url="http://example.com:8000")
