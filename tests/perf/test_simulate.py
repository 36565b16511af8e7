"""Servers that do not exist answer every token that was asked for, by the real scheduler, never beyond their memory."""

import dataclasses
import math
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.balancing import BalancingConfig
from inference.scheduler import Kind, Limits, Scheduler
from perf import workload
from perf.replica import Part, Replica, Step
from perf.simulate import Deployment, Handover, simulate
from perf.workload import Arrival, Workload

LIMITS = Limits(max_rows=4, block_size=8, tile=8, max_tiles=4, max_length=512)
SERVERS = Deployment(kinds=(Kind("global", None, 65),), limits=LIMITS)
HANDOVER = Handover(replicas=1, bytes_per_token=100.0, link=1e4, delay=0.05, min_away=16)


def usual(step: Step) -> float:
    """A pace like a real one's: so much for a step, more with all that it computes."""
    return 0.01 + 1e-3 * len(step.contexts) + 1e-5 * sum(step.contexts) + 2e-4 * sum(part.tokens for part in step.parts)


def work(**more) -> Workload:
    return Workload(**{"requests": 12, "scale": 0.125, "rate": 5.0} | more)


def same_length(count: int, *, prompt: int, answer: int, time: float = 0.0) -> list[Arrival]:
    draw = random.Random(0)
    return [Arrival(place * time, tuple(draw.choices(range(99), k=prompt)), answer) for place in range(count)]


@given(
    mix=st.sampled_from(["sharegpt", "fixed", "chat", "prefix"]),
    seed=st.integers(0, 2**31),
    rate=st.sampled_from([0.5, 20.0, math.inf]),
    replicas=st.integers(1, 3),
    blocks=st.sampled_from([65, 129]),
    is_handed_over=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_every_token_is_told_once_and_no_cache_overflows(mix, seed, rate, replicas, blocks, is_handed_over):
    trace = workload.trace(work(mix=mix, seed=seed, rate=rate, prefix=64))
    servers = dataclasses.replace(
        SERVERS,
        kinds=(Kind("global", None, blocks),),
        replicas=replicas,
        handover=HANDOVER if is_handed_over else None,
    )
    lengths = []
    for arrival in trace:
        before = lengths[arrival.follows] if arrival.follows >= 0 else 0
        lengths.append(before + len(arrival.prompt) + arrival.max_tokens)
    if max(lengths) > (blocks - 1) * LIMITS.block_size:
        return  # refused by the scheduler, as the test below says
    found = simulate(trace, servers, usual)
    assert [answer.tokens for answer in found.played.answers] == [arrival.max_tokens for arrival in trace]
    assert sum(tick.tokens for tick in found.played.ticks) == sum(arrival.max_tokens for arrival in trace)
    assert all(answer.due < answer.first <= answer.last for answer in found.played.answers)
    assert all(load.fullest <= 1 and load.busy <= 1 + 1e-9 for load in found.loads)
    assert found.played.counted["prompt_tokens"] == sum(
        length - arrival.max_tokens for length, arrival in zip(lengths, trace, strict=True)
    )
    assert found.refused == 0
    assert simulate(trace, servers, usual) == found


def test_a_step_takes_what_it_is_said_to_and_the_next_is_planned_meanwhile():
    seen = []

    def note(step: Step) -> float:
        seen.append(step)
        return 1.0

    trace = [Arrival(0.0, tuple(range(20)), 3), Arrival(0.5, tuple(range(50, 60)), 2)]
    found = simulate(trace, SERVERS, note)
    assert seen == [
        Step((), (Part(0, 20),)),  # all of the first prompt
        Step((21,), ()),  # planned at once: the second comes while the first step runs, and waits for its end
        Step((22,), (Part(0, 10),)),
        Step((11,), ()),
    ]
    first, second = found.played.answers
    assert (first.first, first.last, second.first, second.last) == (1.0, 3.0, 3.0, 4.0)
    assert (first.first_token, second.first_token) == (1.0, 2.5)
    assert (first.per_token, second.per_token) == (1.0, 1.0)


def test_servers_that_take_no_time_answer_at_once():
    trace = workload.trace(work(rate=2.0))
    found = simulate(trace, SERVERS, lambda step: 0.0)
    assert set(found.played.first_tokens) == {0.0}
    assert [answer.last for answer in found.played.answers] == [arrival.time for arrival in trace]
    assert found.loads[0].busy == 0


@pytest.mark.parametrize("mix", ["sharegpt", "fixed"])
def test_more_requests_a_second_wait_longer(mix):
    waits = []
    for rate in (0.2, 2.0, 5.0, 20.0, math.inf):
        found = simulate(workload.trace(work(mix=mix, rate=rate, requests=40)), SERVERS, usual)
        waits.append(sum(found.played.first_tokens) / 40)
    assert waits == sorted(waits)
    assert waits[-1] > 20 * waits[0]


def test_a_trickle_sees_an_empty_server():
    (found,) = simulate(same_length(1, prompt=32, answer=9), SERVERS, usual).played.answers
    assert found.first_token == pytest.approx(0.01 + 32 * 2e-4)
    assert found.per_token == pytest.approx(sum(0.011 + 1e-5 * (33 + n) for n in range(8)) / 8)


def test_more_servers_answer_more():
    trace = same_length(24, prompt=20, answer=30)
    speeds = []
    for replicas in (1, 2, 3):
        found = simulate(trace, dataclasses.replace(SERVERS, replicas=replicas), usual)
        speeds.append(found.played.throughput)
        assert min(load.busy for load in found.loads) > 0.4
    assert 1.4 < speeds[1] / speeds[0] <= 2.05  # twice the servers, were it not for who hashes where
    assert 2.2 < speeds[2] / speeds[0] <= 3.05


def test_the_real_scheduler_decides_and_preempts_where_blocks_run_out(monkeypatch):
    planned = []
    plan = Scheduler.next
    monkeypatch.setattr(Scheduler, "next", lambda self: planned.append(self) or plan(self))
    trace = same_length(6, prompt=30, answer=60)
    tight = dataclasses.replace(SERVERS, kinds=(Kind("global", None, 25),))
    found = simulate(trace, tight, usual)
    assert planned
    assert found.loads[0].preemptions == found.played.counted["preemptions"] > 0
    assert found.loads[0].fullest > 0.9
    assert [answer.tokens for answer in found.played.answers] == [60] * 6
    assert found.played.seconds > simulate(trace, SERVERS, usual).played.seconds


def test_a_request_that_no_cache_holds_is_an_error():
    with pytest.raises(ValueError, match="need 75 blocks of 8 tokens but the KV cache has 64"):
        simulate(same_length(1, prompt=200, answer=400), dataclasses.replace(
            SERVERS, limits=LIMITS._replace(max_length=4096)), usual)  # fmt: skip


def test_a_shared_beginning_is_computed_once_and_stays_with_one_server():
    trace = workload.trace(work(mix="prefix", prefix=200, rate=1.0, requests=10))
    trace = [arrival._replace(max_tokens=4) for arrival in trace]
    servers = dataclasses.replace(SERVERS, replicas=3, balancing=BalancingConfig(beginning=200))
    found = simulate(trace, servers, usual)
    assert found.played.counted["cached_tokens"] == 9 * 200
    assert sum(load.busy > 0 for load in found.loads) == 1
    apart = simulate(trace, dataclasses.replace(servers, prefix_cache=False), usual)
    assert apart.played.counted["cached_tokens"] == 0
    assert sum(apart.played.first_tokens) > 1.5 * sum(found.played.first_tokens)


def test_servers_with_enough_requests_refuse_more_and_what_follows():
    trace = same_length(3, prompt=8, answer=20)
    trace += [Arrival(0.1, (1, 2), 3, follows=0), Arrival(0.1, (1, 2), 3, follows=2)]
    found = simulate(trace, dataclasses.replace(SERVERS, balancing=BalancingConfig(max_running=2)), usual)
    assert found.refused == 2
    assert [answer.tokens for answer in found.played.answers] == [20, 20, 3]


def test_prompts_come_from_the_prefill_server_block_by_block():
    trace = same_length(1, prompt=44, answer=5)
    alone = simulate(trace, SERVERS, usual)
    found = simulate(trace, dataclasses.replace(SERVERS, handover=HANDOVER), usual)
    (answer,) = found.played.answers
    prefill = usual(Step((), (Part(0, 32),))) + usual(Step((), (Part(32, 8),)))  # the five full blocks
    assert answer.first_token == pytest.approx(prefill + 0.05 + 40 * 100 / 1e4 + usual(Step((), (Part(40, 4),))))
    assert answer.first_token > alone.played.answers[0].first_token
    assert found.played.counted["cached_tokens"] == 40
    assert found.figures()["prefill_busy"] > 0
    short = simulate(same_length(1, prompt=12, answer=5), dataclasses.replace(SERVERS, handover=HANDOVER), usual)
    assert short.figures()["prefill_busy"] == 0


def test_long_prompts_elsewhere_let_answers_flow():
    """What disaggregation is for: no step of an answer is held up by a prompt."""
    trace = [Arrival(0.0, (1, 2, 3), 300)]
    trace += [arrival._replace(time=0.3 + place) for place, arrival in enumerate(same_length(4, prompt=200, answer=2))]
    here = simulate(trace, SERVERS, usual).played.answers[0]
    away = simulate(trace, dataclasses.replace(SERVERS, handover=HANDOVER), usual).played.answers[0]
    assert away.first == here.first
    assert away.last < here.last - 0.1


def test_blocks_of_several_kinds_are_not_handed_over():
    kinds = (Kind("global", None, 65), Kind("window", 16, 65))
    with pytest.raises(ValueError, match="2 kinds"):
        Deployment(kinds=kinds, limits=LIMITS, handover=HANDOVER)
    found = simulate(same_length(5, prompt=40, answer=30), Deployment(kinds=kinds, limits=LIMITS), usual)
    assert [answer.tokens for answer in found.played.answers] == [30] * 5


def test_a_replica_takes_in_no_more_than_it_has_room_for():
    replica = Replica("one", (Kind("global", None, 5),), LIMITS, reuse=True, seconds=usual)
    assert replica.take_in(tuple(range(48)), "") == 4
    assert replica.known(tuple(range(48)), "") == 4
    assert replica.known(tuple(range(48)), "another") == 0
    assert replica.take_in(tuple(range(32)), "") == 0


def test_it_needs_no_device():
    code = "import sys, perf.simulate; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
