"""Command lines become questions: a config file's own settings, a model's name, and errors with the way out."""

import pathlib

import pytest

from configs import case_a1
from configs.planning import Wishes, as_planned, asked, of_model, run_of
from perf.candidates import Precision
from perf.plan import search

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CASE = str(CONFIGS / "case_a1.py")


@pytest.mark.parametrize("name", ["llama3_1_405b", "Llama-3.1-405B", "llama3.1-405b"])
def test_a_published_model_is_found_however_it_is_spelled(name):
    run, is_bare = run_of([name, "optim.moments=bfloat16"], CONFIGS / "quickstart.py")
    assert is_bare
    assert (run.name, run.model.num_layers, run.model.compute_dtype) == ("llama3_1_405b", 126, "bfloat16")
    assert run.optim.moments == "bfloat16"


def test_a_config_file_is_what_train_takes():
    run, is_bare = run_of([CASE, "train.batch_size=512"], CONFIGS / "quickstart.py")
    assert not is_bare
    assert run.train.batch_size == 512
    assert run_of([], CONFIGS / "quickstart.py")[0].name == "quickstart"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no config file and no published model; did you mean llama3_1_405b"):
        run_of(["llama-3.1-406b"], CONFIGS / "quickstart.py")
    with pytest.raises(ValueError, match=r"did you mean .*case_a"):
        run_of(["configs/case_a9.py"], CONFIGS / "quickstart.py")


def test_a_run_brings_its_batch_length_numbers_and_slices():
    question, _ = asked(case_a1.run, False, Wishes())
    assert (question.batches, question.length, question.chips) == ((256,), 2048, (256,))
    assert question.chip.name == "TPU v5e"
    assert question.precisions == (Precision("fp32", "bf16", "bf16"),)
    other, _ = asked(case_a1.run, False, Wishes(topology="v5p:4x4x4", length=4096, batches=(64, 128)))
    assert (other.batches, other.length, other.chips, other.chip.name) == ((64, 128), 4096, (64,), "TPU v5p")


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(chip="v5z", chips=8), "there is no chip v5z; the nearest are "),
        (Wishes(chip="v5p", chips=65), "65 chips form no slice of TPU v5p; the nearest are 64, 128"),
        (Wishes(chip="v5p"), "--chip v5p of how many\\? give --chips N"),
        (Wishes(topology="v5p:4x4x5"), "there is no topology v5p:4x4x5; the nearest are v5p:4x4x4"),
        (Wishes(topology="v5p:4x4x4", chips=64), "says chip and number"),
        (Wishes(), "names no topologies; give --chip C --chips N"),
        (Wishes(chip="v5e", chips=8, length=2**20), "--length 1048576 is more than model.max_length=131072"),
        (Wishes(chip="v5e", chips=8, precisions=("int9",)), "int9 is none of fp32, bf16, int8, fp8; did you mean int8"),
        (Wishes(chip="v5e", chips=8, precisions=("bf16/int8",)), "after / stands a number of the cache"),
        (Wishes(chip="v5e", chips=8, slices=3), "8 chips are not a multiple of 3 slices"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_one_line(wishes, message):
    with pytest.raises(ValueError, match=message) as error:
        asked(of_model("llama3_2_1b"), True, wishes)
    assert "\n" not in str(error.value)


def test_numbers_of_weights_and_caches():
    wishes = Wishes(step="decode", chip="v5e", chips=8, precisions=("bf16", "int8", "int4/int8"))
    question, _ = asked(of_model("llama3_2_1b"), True, wishes)
    assert question.precisions == (
        Precision("bf16", "bf16", "bf16"), Precision("int8", "bf16", "bf16"), Precision("int4", "bf16", "int8")
    )  # fmt: skip
    assert not set(question.precisions) & set(question.others)


def test_a_plan_is_compiled_as_it_would_run():
    run = case_a1.run
    question, check = asked(run, False, Wishes(topology="v5e:4x4", batches=(32,)))
    best = search(question, check).plans[0]
    planned, topology = as_planned(run, question, best)
    assert topology.name == "v5e:4x4"
    assert (planned.mesh, planned.train.batch_size, planned.model.remat) == (
        best.candidate.mesh,
        32,
        best.candidate.remat,
    )
    planned.check_devices(16)
    question, check = asked(run, False, Wishes(step="decode", chip="v5e", chips=16))
    best = search(question, check).plans[0]
    planned, topology = as_planned(run, question, best)
    assert topology.num_devices == planned.mesh.tensor, "one replica is compiled"
    question, check = asked(run, False, Wishes(step="decode", chip="v5e", chips=16, precisions=("int8",)))
    with pytest.raises(ValueError, match="not of int8; leave it out"):
        as_planned(run, question, search(question, check).plans[0])
    question, check = asked(run, False, Wishes(chip="H100", chips=16))
    with pytest.raises(ValueError, match="knows no H100"):
        as_planned(run, question, search(question, check).plans[0])
