"""Traces follow from their seeds, and are as long, as frequent and as alike as they say."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf import workload
from perf.workload import Lengths, Workload

MIXES = ("sharegpt", "fixed", "prefix", "chat")


@given(
    mix=st.sampled_from(MIXES),
    seed=st.integers(0, 2**31),
    requests=st.integers(1, 40),
    rate=st.sampled_from([0.5, 10.0, math.inf]),
)
@settings(max_examples=30, deadline=None)
def test_the_same_seed_gives_the_same_trace_and_another_gives_another(mix, seed, requests, rate):
    work = Workload(mix=mix, seed=seed, requests=requests, rate=rate)
    trace = workload.trace(work)
    assert trace == workload.trace(work)
    assert trace != workload.trace(dataclasses.replace(work, seed=seed + 1))
    assert len(trace) == requests
    for place, arrival in enumerate(trace):
        assert arrival.time >= 0
        assert min(arrival.max_tokens, len(arrival.prompt)) >= 1
        assert all(0 <= token < work.vocab for token in arrival.prompt)
        assert -1 <= arrival.follows < place


@given(mean=st.floats(20, 300), sigma=st.floats(0, 1.3), scale=st.sampled_from([0.125, 1.0]))
@settings(max_examples=20, deadline=None)
def test_lengths_have_the_mean_that_they_say(mean, sigma, scale):
    lengths = Lengths(mean=mean, sigma=sigma, low=4, high=1024).scaled(scale)
    drawn = np.asarray(lengths.draw(np.random.default_rng(0), 20_000))
    assert lengths.low <= drawn.min() <= drawn.max() <= lengths.high
    assert abs(drawn.mean() - lengths.expected) <= 0.5 + 4 * drawn.std() / math.sqrt(len(drawn))  # 0.5 is rounding


def test_clipping_keeps_most_of_sharegpts_means():
    assert workload.SHAREGPT_PROMPTS.expected == pytest.approx(161.31, rel=0.06)
    assert workload.SHAREGPT_ANSWERS.expected == pytest.approx(337.99, rel=0.06)


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_arrivals_are_a_poisson_process(rate):
    times = np.asarray(workload.arrivals(np.random.default_rng(1), rate, 20_000))
    gaps = np.diff(times, prepend=0)
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.04)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.04)  # exponential: as its mean
    counts = np.bincount((times * rate / 10).astype(int))[:-1]  # ten expected in each
    assert counts.var() == pytest.approx(counts.mean(), rel=0.15)


def test_a_rate_changes_times_alone():
    slow, quick = (workload.trace(Workload(rate=rate)) for rate in (1.0, math.inf))
    assert [a._replace(time=0.0) for a in slow] == quick
    assert [a.time for a in slow] == sorted(a.time for a in slow)


def test_prompts_with_a_prefix_share_just_that():
    work = Workload(mix="prefix", requests=6, prefix=64)
    prompts = [arrival.prompt for arrival in workload.trace(work)]
    assert len({prompt[:64] for prompt in prompts}) == 1
    assert len({prompt[64:72] for prompt in prompts}) == 6


def test_every_turn_of_a_chat_follows_the_one_before():
    trace = workload.trace(Workload(mix="chat", requests=6, turns=3, rate=1.0))
    assert [arrival.follows for arrival in trace] == [-1, -1, 0, 1, 2, 3]
    assert [arrival.time for arrival in trace[2:]] == [1.0] * 4


def test_a_copying_task_shows_what_is_to_be_copied():
    trace = workload.copying([[1, 2, 3, 4, 5], [1, 2]], answer=9, begun=2)
    assert trace == [workload.Arrival(0.0, (1, 2, 3, 4, 5, 1, 2), 3)]
