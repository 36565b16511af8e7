"""What must hold of any prediction."""

import dataclasses

import pytest

from model import families
from parallel.chips import find
from perf.constants import Constants, family, load, prior
from perf.predict import predict, predict_all
from perf.work import Job, Layout

LLAMA = families.llama3_1_8b()
JOB = Job(kind="train", model=LLAMA, layout=Layout(fsdp=64), batch=128, length=4096)


@pytest.mark.parametrize("job", [
    JOB,
    dataclasses.replace(JOB, layout=Layout(pipe=4, fsdp=4, tensor=4), microbatch=1),
    Job(kind="prefill", model=LLAMA, batch=1, length=2048),
    Job(kind="decode", model=LLAMA, layout=Layout(tensor=4), batch=8, length=2048),
    Job(kind="generate", model=LLAMA, batch=8, length=100, output=50),
])  # fmt: skip
@pytest.mark.parametrize("chip", ["v5p", "H100"])
def test_parts_sum_to_the_step(job, chip):
    found = predict(job, find(chip))
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.seconds, rel=1e-6)
    assert all(part.seconds >= 0 for part in found.parts)
    assert 0 < found.mfu < 1


def test_many_are_as_one():
    jobs = [JOB, dataclasses.replace(JOB, batch=64), Job(kind="decode", model=LLAMA, batch=4, length=99)]
    together = predict_all(jobs, [find("v5p")] * 3)
    assert [found.seconds for found in together] == pytest.approx([predict(job, find("v5p")).seconds for job in jobs])
    assert predict_all([], []) == []


def test_more_work_takes_longer_and_more_chips_less():
    seconds = lambda **more: predict(dataclasses.replace(JOB, **more), find("v5p")).seconds  # noqa: E731
    assert seconds(batch=256) > 1.5 * seconds()
    assert seconds(remat="full") > 1.15 * seconds()
    assert seconds(layout=Layout(fsdp=128)) < 0.7 * seconds()


def test_decoding_one_sequence_is_bound_by_memory_and_a_large_batch_of_training_by_compute():
    assert predict(Job(kind="decode", model=LLAMA, batch=1, length=128), find("v5p")).bound == "memory"
    assert predict(JOB, find("v5p")).bound == "compute"


def test_narrow_weights_decode_quicker():
    plain = Job(kind="decode", model=LLAMA, batch=1, length=128)
    half = dataclasses.replace(plain, weights="int8")
    assert predict(half, find("v5e")).seconds < 0.65 * predict(plain, find("v5e")).seconds


def test_a_pipeline_waits_as_the_textbook_says():
    """(p - 1) / (v M) of the busy time: arXiv:2104.04473, section 2.2."""
    job = dataclasses.replace(JOB, layout=Layout(pipe=4, fsdp=16), microbatch=1)
    found = predict(job, find("v5p"))
    bubble = next(part for part in found.parts if part.kind == "bubble")
    assert job.microbatches == 8
    busy = sum(part.seconds for part in found.parts if part.kind in ("matmul", "attention", "vector"))
    assert bubble.seconds == pytest.approx(3 / 8 * busy, rel=0.1)


def test_constants_fall_back_to_what_is_alike_and_to_priors():
    made = Constants({"launch/maxtext": 2e-6}, {})
    assert made.value("launch/meshlight") == 2e-6
    assert made.value("matmul/NEW/16") == prior("matmul/NEW/16").value
    assert family("A100-SXM-80GB") == family("A100-PCIe-40GB") == "A100"
    assert family("H200") == "H100"


def test_shipped_constants_are_possible():
    for name, value in load().fitted.items():
        assert value > 0, name
        assert load().spread[name] >= 0, name
        if name.startswith("memory/"):
            assert 0.2 < value <= 1.3, name
