"""A decode server that has prompts computed elsewhere answers as one that computes all itself, whatever happens."""

import asyncio
import contextlib
import dataclasses

import httpx
import pytest

from inference.disaggregation import DisaggregationConfig
from inference.handover import Ask
from inference.metrics import Metrics
from inference.prefill_away import PrefillAway
from inference.prefill_door import PATH, PrefillDoor, about, compile_parts
from inference.service import Service
from tests.inference.small import LLAMA, engine, row

SECRET = "a secret of both servers"
PROMPT = tuple(range(3, 93)) + tuple(range(3, 60))  # 147 tokens: 18 blocks of 8 and 3 more
OTHER = tuple(range(90, 3, -1)) + tuple(range(3, 60))


@pytest.fixture(scope="module")
def alone():
    """The answers of an engine that nobody helps."""
    one = engine(LLAMA)
    return {prompt: [out[0].tokens[0] for out in one.run([row(prompt, 8)]) if out] for prompt in (PROMPT, OTHER)}


class Pair:
    """A prefill and a decode engine in one process, with the door's bytes between them."""

    def __init__(self, prefill, decode, away, door, services):
        self.prefill, self.decode, self.away, self.door, self._services = prefill, decode, away, door, services
        self.said: list[str] = []

    async def answer(self, prompt, salt="") -> list[int]:
        """As the server does it."""
        await self.away.before(prompt, salt)
        stream = self._services[1].submit([row(prompt, 8, salt=salt)])
        return [token for _, output in [each async for each in stream] for token in output.tokens]


@contextlib.asynccontextmanager
async def pair(change=lambda app: app, *, prefill=LLAMA, told=lambda about: about, secret=SECRET, **options):
    """Both started; `change` stands between them, and `told` changes what the decode server thinks of itself."""
    there, here = engine(prefill, **options), engine(LLAMA)
    abouts = [about(there), about(here)]
    compile_parts(here)
    services = [Service(each, Metrics(), capacity=8) for each in (there, here)]
    for service in services:
        service.start()
    door = PrefillDoor(nothing, services[0], abouts[0], secret=SECRET, max_length=there.max_length)
    said: list[str] = []
    away = PrefillAway(
        services[1], told(abouts[1]), url="http://prefill", secret=secret, say=said.append,
        config=DisaggregationConfig(min_away=1, prefill_when="always"),
        transport=httpx.ASGITransport(change(door)),
    )  # fmt: skip
    made = Pair(there, here, away, door, services)
    made.said = said
    try:
        yield made
    finally:
        await away.close()
        for service in services:
            await service.close()


async def nothing(scope, receive, send):
    """The application behind the door."""
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_the_tokens_are_those_of_one_server_and_only_the_rest_is_computed(alone):
    async def run():
        async with pair() as two:
            assert await two.answer(PROMPT) == alone[PROMPT]
            assert two.decode.stats().cached_tokens == 144
            assert (two.away.tally.away, two.away.tally.blocks) == (1, 18)
            # The next turn of the conversation sends only what is new.
            longer = PROMPT + tuple(alone[PROMPT]) + OTHER[:20]
            before = two.away.tally.bytes
            expected = [out[0].tokens[0] for out in engine(LLAMA).run([row(longer, 8)]) if out]
            assert await two.answer(longer) == expected
            have = 19  # blocks of prompt and answer, which the decode server computed itself
            assert two.away.tally.blocks - 18 == len(longer) // 8 - have
            assert (
                two.away.tally.bytes - before
                == (len(longer) // 8 - have) * two.away.tally.bytes // two.away.tally.blocks
            )
            assert await two.answer(OTHER) == alone[OTHER]
            # What the prefill server has read already, it does not read again.
            await two.away._fetch(Ask(tokens=OTHER, salt=""))
            blocks, steps = two.away.tally.blocks, two.prefill.stats().steps
            await two.away._fetch(Ask(tokens=OTHER, salt="", have=10))
            assert two.prefill.stats().steps == steps
            assert two.away.tally.blocks - blocks == 8
            await two.away._fetch(Ask(tokens=OTHER[1:41], salt=""))  # full to the last token
            assert two.away.tally.blocks - blocks == 8 + 5

    asyncio.run(run())


def test_salts_keep_prompts_apart_on_both_sides(alone):
    async def run():
        async with pair() as two:
            assert await two.answer(PROMPT, "one") == alone[PROMPT]
            cached = two.decode.stats().cached_tokens
            assert two.decode.known_blocks(PROMPT) == []
            assert two.prefill.known_blocks(PROMPT) == []
            assert len(two.decode.known_blocks(PROMPT, "one")) == 18
            assert await two.answer(PROMPT, "two") == alone[PROMPT]
            assert two.prefill.stats().cached_tokens == 0
            assert two.decode.stats().cached_tokens == 2 * cached

    asyncio.run(run())


def damaged(app, *, at: int, cut: bool):
    """The application, whose answers change or end on the way after so many bytes."""

    async def changing(scope, receive, send):
        passed = 0

        async def sending(message):
            nonlocal passed
            body = message.get("body", b"")
            if message["type"] == "http.response.body" and passed <= at < passed + len(body):
                place = at - passed
                rest = b"" if cut else bytes([body[place] ^ 1]) + body[place + 1 :]
                message = {**message, "body": body[:place] + rest}
            elif cut and passed > at:
                message = {**message, "body": b""} if "body" in message else message
            passed += len(body)
            await send(message)

        await app(scope, receive, sending)

    return changing


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("at", [2, 40, 700, 5000, 20_000])
def test_damaged_and_cut_answers_are_refused_and_the_prompt_is_computed_here(alone, at, cut):
    async def run():
        async with pair(lambda app: damaged(app, at=at, cut=cut)) as two:
            assert await two.answer(PROMPT) == alone[PROMPT]
            assert (two.away.tally.away, two.away.tally.failed) == (0, 1)
            assert "prompts are computed here for 2 s: http://prefill: " in two.said[0]
            assert await two.answer(OTHER) == alone[OTHER]  # without asking again so soon
            assert two.away.tally.failed == 1

    asyncio.run(run())


def other_numbers(about):
    return about._replace(layout=tuple(dataclasses.replace(leaf, dtype="int8") for leaf in about.layout))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"prefill": dataclasses.replace(LLAMA, init_scale=1.0)}, "it has another model, or other weights"),
        ({"told": lambda about: about._replace(fingerprint=())}, "it has another model, or other weights"),
        ({"told": other_numbers}, "its blocks are of another form"),
        ({"secret": "another secret"}, "it says 401"),
        ({"max_length": 64}, "it says 400"),
    ],
)
def test_a_server_that_is_none_of_ours_is_not_used(alone, options, why):
    async def run():
        async with pair(**options) as two:
            assert await two.answer(PROMPT) == alone[PROMPT]
            assert two.away.tally.failed == 1
            assert why in two.said[0]

    asyncio.run(run())


def test_a_server_that_cannot_be_reached_or_does_not_answer_is_left_alone_for_a_while(alone, monkeypatch):
    def gone(app):
        async def fail(scope, receive, send):
            raise httpx.ConnectError("nobody there")

        return fail

    def silent(app):
        async def wait(scope, receive, send):
            await asyncio.sleep(600)

        return wait

    monkeypatch.setattr("inference.prefill_away.AT_LEAST", 0.2)
    monkeypatch.setattr("inference.prefill_away.MARGIN", 1e-9)

    async def run(change):
        async with pair(change) as two:
            assert await two.answer(PROMPT) == alone[PROMPT]
            assert two.away.tally.failed == 1
            two.away._resting_until = 0.0
            assert await two.answer(OTHER) == alone[OTHER]
            assert "for 4 s" in two.said[1]  # twice as long as before

    asyncio.run(run(gone))
    asyncio.run(run(silent))


def test_a_short_prompt_stays_and_rates_are_measured():
    async def run():
        async with pair() as two:
            rates = await two.away.measure(two.decode.max_length)
            assert two.away.tally.failed == 0
            assert rates.here > 1
            assert rates.there > 1
            assert rates.link != 1e9
            told = two.away._service.metrics.text(two.decode.stats()).decode()
            assert f'meshlight_prefill_rate{{of="there"}} {rates.there}' in told
            two.away._config = DisaggregationConfig(min_away=64)
            assert len(await two.answer(PROMPT[:20])) == 8
            assert (two.away.tally.here, two.away.tally.away) == (1, 0)

    asyncio.run(run())


def test_no_more_than_so_many_are_away_at_once(alone):
    async def run():
        async with pair() as two:
            two.away._config = dataclasses.replace(two.away._config, at_once=1)
            found = await asyncio.gather(two.answer(PROMPT), two.answer(OTHER))
            assert found == [alone[PROMPT], alone[OTHER]]
            assert two.away.tally.away == 1

    asyncio.run(run())


def test_the_door_is_shut_to_strangers_and_lets_everything_else_through():
    async def run():
        async with (
            pair() as two,
            httpx.AsyncClient(transport=httpx.ASGITransport(two.door), base_url="http://x") as http,
        ):
            sealed = Ask(tokens=PROMPT, salt="").sealed(SECRET)
            for method, path, content, status in [
                ("POST", PATH, b"", 401),
                ("POST", PATH, b"x" * 60, 401),
                ("POST", PATH, Ask(tokens=PROMPT, salt="").sealed("guess"), 401),
                ("POST", PATH, Ask(tokens=(), salt="").sealed(SECRET), 400),
                ("POST", PATH, Ask(tokens=tuple(range(255)) * 2, salt="").sealed(SECRET), 400),
                ("POST", PATH, b"x" * 20_000, 413),
                ("GET", PATH, b"", 405),
                ("POST", "/v1/completions", b"", 404),
                ("POST", PATH, sealed, 200),
            ]:
                response = await http.request(method, path, content=content)
                assert response.status_code == status, (method, path, content[:20])

    asyncio.run(run())
