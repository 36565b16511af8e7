"""The closed form says what the simulator finds when requests never end, and never more than memory allows."""

import dataclasses
import random

import pytest

from inference.scheduler import Kind, Limits
from parallel.chips import Chip
from perf import saturation
from perf.saturation import Policy, saturated
from perf.simulate import Deployment, simulate
from perf.step_time import Split, StepTime
from perf.work import Job, Layout
from perf.workload import Arrival
from tests.perf.test_step_time import TINY

CHIP = Chip(
    name="pretended", vendor="nobody", bf16_flops=1e12, hbm_bytes=2**20, hbm_bandwidth=1e9, citations="made up"
)  # fmt: skip


def pace(job: Job) -> Split:
    """Seconds of a pretended machine."""
    tokens = job.batch * (job.length if job.kind == "prefill" else 1)
    pairs = job.batch * (job.length * (job.length + 1) / 2 if job.kind == "prefill" else job.length)
    return Split(0.01 + 2e-4 * tokens, 1e-6 * pairs)


def job(prompt: int, answer: int, **more) -> Job:
    return Job(kind="generate", model=TINY, batch=1, length=prompt, output=answer, **more)


@pytest.mark.parametrize(("prompt", "answer"), [(32, 32), (96, 16), (16, 128)])
def test_the_closed_form_is_what_the_simulator_finds(prompt, answer, monkeypatch):
    asked = job(prompt, answer, stack="vllm")
    monkeypatch.setitem(saturation.POLICIES, "vllm", Policy(0.9, 24, 256, False))
    steps = StepTime(asked, pace)
    found = saturated(asked, CHIP, steps)
    assert found.limit in ("rows", "tokens of a step")
    draw = random.Random(0)
    trace = [Arrival(0.0, tuple(draw.choices(range(64), k=prompt)), answer) for _ in range(24 * 12)]
    servers = Deployment(kinds=(Kind("global", None, 1001),), limits=Limits(24, 16, 32, 8, 256))
    played = simulate(trace, servers, steps).played
    begin, end = (played.ticks[len(played.ticks) * part // 10].time for part in (2, 8))
    steady = sum(tick.tokens for tick in played.ticks if begin < tick.time <= end) / (end - begin)
    assert found.tokens_per_second == pytest.approx(steady, rel=0.12)


def test_a_last_wave_wastes_rows():
    asked = job(32, 32)
    steps = StepTime(asked, pace)
    endless = saturated(asked, CHIP, steps)
    full, partly = (
        saturated(asked, CHIP, steps, requests=waves * endless.rows).tokens_per_second for waves in (2.0, 2.1)
    )
    assert full == pytest.approx(endless.tokens_per_second)
    assert 0.9 * full < partly < 0.99 * full
    assert saturated(asked, CHIP, steps, requests=3).rows == 3


def test_memory_limits_the_rows():
    token = saturation.token_bytes(job(1, 1))
    assert token == 2 * 2 * 1 * 8 * 2  # keys and values, layers, heads, width, bytes
    roomy = dataclasses.replace(CHIP, hbm_bytes=2**30)
    tight = dataclasses.replace(CHIP, hbm_bytes=2**17)
    for chip, limit in ((roomy, "rows"), (tight, "cache")):
        found = saturated(job(64, 64), chip, StepTime(job(64, 64), pace))
        assert found.limit == limit
        assert found.rows * (64 + 32) * token <= saturation.memory_of(chip) - saturation.parameter_bytes(job(64, 64))
    reserving = saturated(job(64, 64, stack="tensorrt"), tight, StepTime(job(64, 64), pace))
    assert reserving.rows < saturated(job(64, 64), tight, StepTime(job(64, 64), pace)).rows


def test_devices_share_parameters_and_keys_but_no_head():
    one, two = job(8, 8), job(8, 8, layout=Layout(tensor=2))
    assert saturation.parameter_bytes(two) == saturation.parameter_bytes(one) / 2
    assert saturation.token_bytes(two) == saturation.token_bytes(one)  # one key-value head, on both devices
    assert saturation.token_bytes(job(8, 8, cache="fp8")) == saturation.token_bytes(one) / 2


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="take more chips"):
        saturated(job(64, 64), dataclasses.replace(CHIP, hbm_bytes=2**14), StepTime(job(64, 64), pace))
