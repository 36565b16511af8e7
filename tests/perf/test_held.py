"""What a device holds, against the TPU compiler's peaks of docs/benchmarks/tpu_compile.md: never less."""

import dataclasses

import pytest

from configs import case_a1, case_a2, case_b, case_c, case_d, case_e
from configs.base import planned_candidate
from model.families import llama3_2_1b
from parallel.config import MeshConfig
from perf import held
from perf.candidates import Candidate, Precision

PEAKS = [(case_a1, 2.42), (case_a2, 3.67), (case_b, 38.77), (case_c, 36.81), (case_d, 20.83), (case_e, 1.64)]  # GiB


@pytest.mark.parametrize(("case", "peak"), PEAKS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_compilers_peaks_are_not_more(case, peak):
    run = case.run
    one = planned_candidate(run, run.mesh)
    found = held.train(run.model, one, length=run.train.seq_len, optim=run.optim, loss=run.train)
    assert peak <= sum(found.values()) / 2**30 < 1.5 * peak + 0.1


def test_served_weights_and_caches_are_counted():
    model = llama3_2_1b()
    one = Candidate(mesh=MeshConfig(data=2, tensor=4), batch=16, precision=Precision("bf16", "bf16"))
    found = held.serve(model, one, length=1024, tokens=1)
    assert found["weights"] == 1_235_814_400 * 2 // 4
    assert found["cache"] == 8 * 1024 * 2 * 8 * 64 * 16 * 2 // 4
    small = held.serve(
        model, dataclasses.replace(one, precision=Precision("int8", "bf16", "int8")), length=1024, tokens=1
    )
    assert small["weights"] == found["weights"] // 2
    assert found["cache"] // 2 < small["cache"] < found["cache"]
