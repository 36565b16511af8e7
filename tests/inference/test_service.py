"""Many askers and one engine: order, bounds, ends, slow readers, failures. Nothing here computes."""

import asyncio
import threading

import pytest

from inference.config import SamplingConfig
from inference.metrics import Metrics
from inference.request import Request
from inference.service import CutOffError, FullError, Reading, Service, TimedOutError, UnavailableError
from inference.turnover import Turnover
from tests.inference.fake_engine import FakeEngine


def request(text=b"abc", max_tokens=6, **more) -> Request:
    return Request(prompt=tuple(text), sampling=SamplingConfig(), max_tokens=max_tokens, **more)


def with_service(engine, test, *, capacity=8, **reading):
    """Run the test's coroutine beside a service around the engine."""

    async def run():
        service = Service(engine, Metrics(), capacity=capacity, reading=Reading(**reading))
        service.start()
        try:
            return await asyncio.wait_for(test(service), 60)
        finally:
            engine.gate.set()
            await service.close()
            assert not service._thread.is_alive()

    return asyncio.run(run())


async def read(stream) -> list[tuple[list[int], str | None]]:
    """Tokens and the end of each answer."""
    found: dict[int, tuple[list[int], str | None]] = {}
    async for index, output in stream:
        tokens, _ = found.setdefault(index, ([], None))
        tokens += output.tokens
        found[index] = (tokens, output.finish)
    return [found[index] for index in sorted(found)]


async def until(happened) -> None:
    while not happened():
        await asyncio.sleep(0.001)


def test_answers_come_whole_and_in_order():
    async def test(service):
        streams = [service.submit([request(bytes([65 + i, 97 + i]), 5 + i)]) for i in range(6)]
        found = await asyncio.gather(*map(read, streams))
        for i, [(tokens, finish)] in enumerate(found):
            assert bytes(tokens) == (bytes([65 + i, 97 + i]) * 9)[: 5 + i]
            assert finish == "length"
        assert service.num_open == 0

    with_service(FakeEngine(max_rows=2), test)


def test_requests_of_one_stream_come_through_it_together():
    async def test(service):
        found = await read(service.submit([request(b"a", 2), request(b"b", 4)]))
        assert found == [([97] * 2, "length"), ([98] * 4, "length")]

    with_service(FakeEngine(), test)


def test_no_more_are_taken_than_there_are_places_and_the_refusal_says_when():
    engine = FakeEngine()

    async def test(service):
        engine.gate.clear()
        streams = [service.submit([request()]) for _ in range(3)]
        with pytest.raises(FullError) as refused:
            service.submit([request(), request()])  # one place is left
        assert 1 <= refused.value.wait <= 60
        streams.append(service.submit([request()]))
        with pytest.raises(FullError):
            await service.embed([(1, 2)])
        engine.gate.set()
        for stream in streams:
            assert (await read(stream))[0][1] == "length"
        await read(service.submit([request()] * 4))

    with_service(engine, test, capacity=4)


def test_a_closed_stream_frees_its_place_and_its_request():
    engine = FakeEngine(pace=0.001)

    async def test(service):
        streams = [service.submit([request(max_tokens=10**6)]) for _ in range(4)]
        for stream in streams:
            await anext(stream)
            stream.close()
        await until(lambda: service.num_open == 0)
        assert engine.num_cancelled == 4
        assert not engine.has_work

    with_service(engine, test, capacity=4)


def test_what_is_closed_before_the_engine_saw_it_never_runs():
    engine = FakeEngine()

    async def test(service):
        engine.gate.clear()
        busy = service.submit([request(max_tokens=1)])
        await until(lambda: engine.is_held)
        for _ in range(3):
            service.submit([request()]).close()
        engine.gate.set()
        await read(busy)
        await until(lambda: service.num_open == 0)
        assert len(engine.requests) == 1

    with_service(engine, test)


def test_one_of_several_answers_can_be_stopped():
    async def test(service):
        stream, ends = service.submit([request(b"a", 10**6), request(b"b", 3)]), {}
        async for index, output in stream:
            if output.finish:
                ends[index] = output.finish
            if index == 0:
                stream.stop(0)
        assert ends == {0: "cancelled", 1: "length"}

    with_service(FakeEngine(pace=0.001), test)


def test_a_request_that_can_never_fit_fails_alone():
    async def test(service):
        good = service.submit([request()])
        with pytest.raises(ValueError, match="the prompt has 600 tokens"):
            await read(service.submit([request(bytes(600))]))
        assert (await read(good))[0][1] == "length"
        await until(lambda: service.num_open == 0)

    with_service(FakeEngine(), test)


def test_who_reads_too_little_is_cut_off_and_others_go_on():
    engine = FakeEngine(pace=0.001)

    async def test(service):
        lazy, eager = service.submit([request(max_tokens=10**6)]), service.submit([request(max_tokens=100)])
        assert len((await read(eager))[0][0]) == 100
        with pytest.raises(CutOffError, match="21 tokens came and were not read"):
            await read(lazy)
        await until(lambda: service.num_open == 0)

    with_service(engine, test, buffer=20)


def test_who_does_not_read_for_long_is_cut_off_but_waiting_is_no_idleness():
    engine = FakeEngine(pace=0.001)

    async def test(service):
        engine.gate.clear()
        patient = asyncio.create_task(read(service.submit([request(max_tokens=3), request(max_tokens=3)])))
        await asyncio.sleep(0.3)  # longer than the patience, but nothing has come
        engine.gate.set()
        assert [len(tokens) for tokens, _ in await patient] == [3, 3]
        lazy = service.submit([request(max_tokens=10**6)])
        await until(lambda: service.num_open == 0)
        with pytest.raises(CutOffError):
            await read(lazy)

    with_service(engine, test, buffer=10**9, patience=0.2)


def test_an_answer_that_takes_too_long_ends():
    engine = FakeEngine(pace=0.001)

    async def test(service):
        with pytest.raises(TimedOutError, match=r"more than 0\.05 s"):
            await read(service.submit([request(max_tokens=10**6)]))
        await until(lambda: service.num_open == 0)
        assert engine.num_cancelled == 1

    with_service(engine, test, timeout=0.05)


def test_when_the_engine_fails_every_asker_hears_why(capsys):
    engine = FakeEngine(max_rows=2)

    async def test(service):
        engine.gate.clear()
        streams = [service.submit([request()]) for _ in range(4)]
        await until(lambda: engine.is_held)
        call = asyncio.create_task(service.embed([(1, 2)]))
        await asyncio.sleep(0)
        engine.fails_with = RuntimeError("no device any more")
        engine.gate.set()
        for stream in streams:
            with pytest.raises(UnavailableError, match="no device any more"):
                await read(stream)
        with pytest.raises(UnavailableError):
            await call
        assert "RuntimeError: no device any more" in service.trouble
        with pytest.raises(UnavailableError):
            service.submit([request()])
        assert service.num_open == 0

    with_service(engine, test)
    assert "no device any more" in capsys.readouterr().err


def test_draining_ends_what_runs_and_refuses_what_is_new():
    engine = FakeEngine(pace=0.001)

    async def test(service):
        running = asyncio.create_task(read(service.submit([request(max_tokens=50)])))
        await asyncio.sleep(0)
        drained = asyncio.create_task(service.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="shutting down"):
            service.submit([request()])
        assert await drained
        assert len((await running)[0][0]) == 50
        return True

    assert with_service(engine, test)


def test_a_drain_gives_up_after_its_patience():
    async def test(service):
        stream = service.submit([request(max_tokens=10**6)])
        assert not await service.drain(0.05)
        await service.close()
        with pytest.raises(UnavailableError, match="has shut down"):
            await read(stream)

    with_service(FakeEngine(pace=0.001), test)


def test_a_call_that_takes_too_long_ends():
    engine = FakeEngine()

    async def test(service):
        engine.gate.clear()
        stream = service.submit([request()])  # holds the engine up
        await until(lambda: engine.is_held)
        with pytest.raises(TimedOutError):
            await service.embed([(1, 2)])
        stream.close()

    with_service(engine, test, timeout=0.05)


def test_calls_run_between_steps_and_their_mistakes_are_theirs(capsys):
    async def test(service):
        assert await service.logprobs((1, 2, 3)) == [-0.5, -0.5]
        assert (await service.embed([(3, 4)])).shape == (1, 3)
        with pytest.raises(ValueError, match="mine"):
            await service.call(lambda engine: exec('raise ValueError("mine")'))
        with pytest.raises(UnavailableError, match="could not do this: MemoryError"):
            await service.call(lambda engine: exec("raise MemoryError"))
        assert await service.call(lambda engine: threading.current_thread().name) == "engine"
        assert not service.trouble

    with_service(FakeEngine(), test)


def test_an_engine_without_work_rests():
    engine = FakeEngine()

    async def test(service):
        await read(service.submit([request()]))
        await asyncio.sleep(0.05)
        before = engine.num_looks
        await asyncio.sleep(0.1)
        assert engine.num_looks == before

    with_service(engine, test)


def test_a_thousand_cancelled_requests_leave_nothing_behind():
    engine = FakeEngine(max_rows=8)

    async def test(service):
        for _ in range(50):
            streams = [service.submit([request(max_tokens=10**6)]) for _ in range(20)]
            for place, stream in enumerate(streams):
                if place % 2:
                    await anext(stream)
                stream.close()
            await until(lambda: service.num_open == 0)
        assert not service._streams
        assert not service._open
        assert not engine.has_work

    with_service(engine, test, capacity=20)


def test_turnover_tells_when_places_come_free():
    turnover = Turnover()
    assert turnover.wait(1, left=100, now=0.0) == 1  # nothing is known
    for second in range(1, 101):
        turnover.stepped(float(second) / 10)
    assert turnover.wait(1, left=100, now=10.0) == 10  # 100 tokens, a tenth of a second each
    for second in range(10, 20):
        turnover.ended(float(second))
    assert turnover.wait(1, left=100, now=20.0) == 1  # one a second
    assert turnover.wait(7, left=100, now=20.0) == 7
    assert turnover.wait(1000, left=1, now=20.0) == 60  # nobody is told to wait for longer
    assert turnover.wait(2, left=1, now=1000.0) == 1  # ends of long ago say nothing
