"""Policies of model/remat.py on a TPU's compiler: less kept is a lower peak, and host memory holds what is named."""

import dataclasses

import pytest

from parallel.topology import find
from perf import aot
from perf.aot import LOW
from tests.perf.test_aot import MODEL, WORK
from tests.tpu import needs_libtpu

LONG = dataclasses.replace(WORK.train, batch_size=64, seq_len=256)
DEEP = dataclasses.replace(MODEL, kernels="pallas", num_layers=6)


def report(**change):
    work = dataclasses.replace(WORK, model=dataclasses.replace(DEEP, **change), train=LONG)
    return aot.compiled(work, find("v5e:2x2"), effort=LOW)


@needs_libtpu
@pytest.mark.slow
def test_less_kept_is_a_lower_peak():
    reports = {name: report(remat=name) for name in ("none", "dots", "minimal", "attention", "full")}
    peaks = [found.peak_bytes for found in reports.values()]
    assert peaks == sorted(peaks, reverse=True)
    again = {name: found.kernels["attention_forward"] // DEEP.num_layers for name, found in reports.items()}
    assert again == {"none": 1, "dots": 1, "minimal": 1, "attention": 1, "full": 2}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention_out", "middle"])
def test_host_memory_takes_what_is_named(name):
    kept, away = report(remat="full", remat_save=(name,)), report(remat="full", remat_offload=(name,))
    assert away.peak_bytes < kept.peak_bytes


@needs_libtpu
def test_the_state_is_donated():
    found = report(remat="full")
    state = found.breakdown["weights"] + found.breakdown["moments"]
    assert found.alias_bytes == pytest.approx(state, rel=0.01), "tiles"
