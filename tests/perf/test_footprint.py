"""perf/footprint.py against the TPU compiler's word in perf/compiled_memory.csv, and against what must hold of it."""

import dataclasses
import time

import pytest

from model.families import llama3_1_8b
from parallel.chips import find as find_chip
from parallel.config import MeshConfig
from parallel.topology import find
from perf.footprint import KINDS, footprint, serve_footprint, tiled, train_footprint, usable
from perf.footprint_fit import cross_validated, error, predicted, score, scored
from perf.footprint_truth import case_of, changed, read
from perf.work import Job, Layout
from training.config import TrainConfig

CASES = [case for case in read() if case.fits is not None]
STEPS = scored(CASES)
FITTING = [case for case in STEPS if case.fits]
MODEL = dataclasses.replace(llama3_1_8b(), compute_dtype="bfloat16", remat="full")
TRAIN = TrainConfig(steps=1, batch_size=64, seq_len=4096)
HBM = find("v5p:4x4x4").hbm_bytes


def train(**changes):
    settings = {"sizes": {"fsdp": 64}, "train": TRAIN, "hbm": HBM, "model": MODEL} | changes
    model, sizes = settings.pop("model"), settings.pop("sizes")
    return train_footprint(model, sizes, **settings)


def test_the_table_is_wide_enough():
    assert len(CASES) >= 44
    assert {case.topology.generation.name for case in CASES} == {"v5e", "v5p", "v6e", "tpu7x"}
    assert {case.step for case in CASES} == {"train", "prefill", "decode"}
    assert sum(not case.fits for case in CASES) >= 4


def test_peaks_are_the_compilers():
    found = score([error(case) for case in STEPS])
    assert found.rows >= 40
    assert found.median <= 0.04
    assert found.worst <= 0.10


@pytest.mark.slow
def test_constants_hold_on_rows_that_they_were_not_fitted_to():
    found = score(cross_validated(STEPS))
    assert found.median <= 0.04
    assert found.worst <= 0.10


def test_what_the_compiler_refuses_is_never_said_to_fit():
    assert [case.name for case in CASES if not case.fits and predicted(case).fits] == []


def test_few_that_fit_are_refused():
    refused = [case.name for case in FITTING if not predicted(case).fits]
    assert len(refused) <= 0.1 * len(FITTING), refused


@pytest.mark.parametrize("case", CASES[::8], ids=lambda case: case.name)
def test_parts_add_up_to_the_total(case):
    found = predicted(case)
    assert sum(found.parts.values()) == found.total
    assert found.parts.keys() <= set(KINDS)


def test_a_search_over_many_meshes_takes_seconds():
    train()  # the model is traced once
    start = time.process_time()
    for _ in range(20):
        train()
    assert (time.process_time() - start) / 20 < 0.05


def test_less_is_kept_with_more_devices_and_stricter_remat():
    peaks = [
        train(sizes={"fsdp": fsdp}, train=dataclasses.replace(TRAIN, batch_size=2 * fsdp)).total
        for fsdp in (8, 16, 32, 64)
    ]
    assert peaks == sorted(peaks, reverse=True)
    kept = [
        train(model=dataclasses.replace(MODEL, remat=remat)).total for remat in ("none", "minimal", "attention", "full")
    ]
    assert kept == sorted(kept, reverse=True)


def test_weights_and_moments_are_counted_to_the_byte():
    """8.03 G parameters in float32 over 64 devices, norms whole on each, and twice as much of moments."""
    parts, norms = train().parts, 65 * 4096
    assert parts["weights"] == 4 * ((8_030_261_248 - norms) // 64 + norms)
    assert parts["moments"] == pytest.approx(2 * parts["weights"], rel=1e-6)


def test_a_cache_is_counted_to_the_byte():
    found = serve_footprint(MODEL, {"tensor": 8}, step="decode", batch=16, length=4096, hbm=HBM)
    blocks = 16 * 4096 // 32 + 1
    assert found.parts["cache"] == 2 * 32 * blocks * 1 * 32 * 128 * 2
    assert found.fits
    halved = serve_footprint(MODEL, {"tensor": 8}, step="decode", batch=16, length=4096, hbm=HBM, cache_bytes=1.0)
    assert halved.parts["cache"] == found.parts["cache"] // 2


def test_accumulation_trades_activations_for_sums_in_float32():
    once, parts = train(sizes={"fsdp": 8}), train(sizes={"fsdp": 8}, train=dataclasses.replace(TRAIN, accumulate=4))
    assert parts.parts["activations"] == once.parts["activations"] // 4
    assert parts.parts["gradients"] > once.parts["gradients"]


def test_tiles_are_counted_where_a_dim_is_narrow():
    assert tiled((256, 512), 2) == 256 * 512 * 2
    assert tiled((30, 576), 4) == 30 * 640 * 4 + 2 * 640 * 4  # 30 rows are four tiles of 8
    assert tiled((4096, 16), 4) == 4096 * 16 * 4  # the long dim lies along the lanes


@pytest.mark.parametrize(
    ("name", "gib"), [("TPU v5e", 15.75), ("TPU v5p", 95.74), ("TPU v6e", 31.25), ("TPU v7x", 94.75)]
)
def test_a_tpu_has_what_its_compiler_lets_a_program_use(name, gib):
    assert usable(find_chip(name)) == int(gib * 2**30)


def test_a_gpu_keeps_some_for_its_driver():
    chip = find_chip("H100-SXM-80GB")
    assert usable(chip) == int(0.94 * chip.hbm_bytes)


def test_a_job_is_a_step_of_its_layout():
    chip = find_chip("TPU v5p")
    job = Job(kind="train", model=MODEL, layout=Layout(fsdp=64), batch=64, length=4096, remat="full")
    assert footprint(job, chip) == train()
    served = Job(kind="decode", model=MODEL, layout=Layout(tensor=8), batch=16, length=4096, cache="int8")
    assert footprint(served, chip).parts["cache"] == 2 * 32 * 2049 * 32 * 128


def row(**changes):
    given = {
        "model": "deep", "topology": "v5e:1x1", "step": "train", "mesh": "", "batch": "4", "length": "1024",
        "settings": "remat=full", "effort": "-1", "fits": "", "peak_bytes": "",
    }  # fmt: skip
    return case_of(given | changes)


def test_a_row_is_what_its_words_say():
    case = row(mesh="fsdp=2 pipe=4", settings="remat_save=key|value accumulate=2 moments=bfloat16 pipeline=1f1b")
    assert case.mesh == MeshConfig(data=1, fsdp=2, pipe=4)
    assert case.model.remat_save == ("key", "value")
    assert (case.train.accumulate, case.optim.moments, case.execution.pipeline) == (2, "bfloat16", "1f1b")
    assert case.fits is None


def test_a_setting_that_is_none_is_said():
    with pytest.raises(ValueError, match="no fields"):
        row(settings="remta=full")


def test_settings_are_taken_by_the_record_that_has_them():
    given = {"accumulate": "4", "other": "1"}
    assert changed(TRAIN, given).accumulate == 4
    assert given == {"other": "1"}
