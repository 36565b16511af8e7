"""A rest is shared by jobs that are alike, and only by them."""

import dataclasses

import numpy as np
import pytest

from model import families
from perf import neighbours
from perf.work import Job, Layout

JOB = Job(kind="train", model=families.llama3_1_8b(), layout=Layout(fsdp=8), batch=64, length=4096, stack="megatron")
JOBS = [JOB, dataclasses.replace(JOB, length=8192), dataclasses.replace(JOB, stack="fsdp"), dataclasses.replace(
    JOB, model=families.gpt2(), batch=512)]  # fmt: skip


def settings(jobs, chips=None):
    return neighbours.settings(jobs, chips or ["H100-SXM-80GB"] * len(jobs), [0.0] * len(jobs))


def test_one_job_explains_itself_and_what_is_like_it_but_no_other_software():
    known = settings([JOB])
    inverted = neighbours.inverse(neighbours.covariance(known, known), np.array([0.05]))
    weights = neighbours.weights(inverted, np.array([0.05]), np.zeros(1, bool))
    same, longer, other, small = neighbours.covariance(settings(JOBS), known) @ weights
    assert 0.04 < same < 0.05
    assert 0 < longer < same
    assert other == 0
    assert small < longer


def test_leaving_out_by_the_inverse_is_solving_without():
    rng = np.random.default_rng(1)
    jobs = [dataclasses.replace(JOB, batch=8 * int(n)) for n in rng.integers(1, 60, 12)]
    K = neighbours.covariance(settings(jobs), settings(jobs))
    rest, left_out = rng.normal(0, 0.1, 12), np.arange(12) % 4 == 0
    inverted = np.linalg.inv(K + 0.01 * np.eye(12))
    kept = ~left_out
    expected = np.linalg.solve(K[np.ix_(kept, kept)] + 0.01 * np.eye(kept.sum()), rest[kept])
    found = neighbours.weights(inverted, rest, left_out)
    assert found[kept] == pytest.approx(expected)
    assert (found[left_out] == 0).all()


def test_an_odd_measurement_bends_little():
    known = settings([JOB] * 9)
    rest = np.array([0.05] * 8 + [3.0])
    inverted = neighbours.inverse(neighbours.covariance(known, known), rest)
    found = neighbours.covariance(settings([JOB]), known) @ neighbours.weights(inverted, rest, np.zeros(9, bool))
    assert 0.04 < found[0] < 0.08


@pytest.mark.parametrize(("source", "year"), [
    ("NVIDIA (26.06 NeMo Container; Pre-Training)", 2026.5), ("NVIDIA (25.09 NeMo Container)", 2025.75), ("x", 0.0),
])  # fmt: skip
def test_releases_are_read(source, year):
    assert neighbours.released(source) == pytest.approx(year)
