"""A step's seconds come from predictions of whole steps: exactly at their counts, on straight lines between."""

import pytest

from model.config import ModelConfig
from perf.replica import Part, Step
from perf.step_time import Split, StepTime, neighbours
from perf.work import Job

TINY = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, max_length=256,
    rope_theta=1e4, norm_eps=1e-6,
)  # fmt: skip
JOB = Job(kind="decode", model=TINY, batch=1, length=1)


def roofline(job: Job) -> Split:
    """A pretended machine: 10 s to read the weights or 1 s a token, whichever is more; 0.01 s a pair."""
    if job.kind == "decode":
        return Split(max(10.0, job.batch), 0.01 * job.batch * job.length)
    return Split(max(10.0, job.batch * job.length), 0.01 * job.batch * job.length * (job.length + 1) / 2)


@pytest.fixture
def steps() -> StepTime:
    return StepTime(JOB, roofline)


@pytest.mark.parametrize(
    ("x", "bits", "expected"),
    [
        (3, 3, (3, 3)),
        (2.5, 3, (2, 3)),
        (0, 3, (1, 1)),
        (11.5, 1, (8, 12)),
        (100, 3, (96, 104)),
        (96, 3, (96, 96)),
        (1000, 3, (960, 1024)),
    ],
)
def test_neighbours_hold_what_lies_between(x, bits, expected):
    assert neighbours(x, bits) == expected


def test_every_step_is_what_its_parts_take(steps):
    assert steps(Step((100,) * 4, ())) == pytest.approx(10 + 4 * 100 * 0.01)
    assert steps(Step((100, 300), ())) == pytest.approx(10 + 400 * 0.01)
    assert steps(Step((), (Part(0, 32),))) == pytest.approx(32 + 0.01 * 32 * 33 / 2)
    assert steps(Step((100,) * 4, (Part(0, 32),))) == pytest.approx(36 + 4 + 0.01 * 32 * 33 / 2)  # weights once


def test_a_prompt_in_chunks_has_the_attention_of_the_whole(steps):
    whole = steps.prompt_attention(0, 96)
    assert steps.prompt_attention(0, 64) + steps.prompt_attention(64, 32) == pytest.approx(whole, rel=0.02)
    assert whole == pytest.approx(0.01 * 96 * 97 / 2)


def test_a_prompt_beside_answers_costs_no_more_than_apart(steps):
    for rows, tokens in ((4, 4), (4, 64), (30, 5)):
        answers, part = (100,) * rows, (Part(0, tokens),)
        apart = steps(Step(answers, ())) + steps(Step((), part))
        assert max(steps(Step(answers, ())), steps(Step((), part))) <= steps(Step(answers, part)) <= apart


def test_predictions_are_asked_once(steps):
    asked = []
    counting = StepTime(JOB, lambda job: asked.append(job) or roofline(job))
    for context in range(2000, 3000):
        counting(Step((context,) * 9, (Part(0, 50),)))
    assert len(asked) < 12


def test_longer_is_never_quicker(steps):
    contexts = [steps.seconds(5, context) for context in range(64, 1000, 7)]
    tokens = [steps.seconds(5, 100, tokens) for tokens in range(0, 300, 3)]
    assert contexts == sorted(contexts)
    assert tokens == sorted(tokens)
