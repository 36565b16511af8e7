"""The loop in this process, on the eight virtual devices. What kills do to it is in test_resume.py."""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from configs.tiny import run as tiny
from parallel.config import MeshConfig
from parallel.mesh import make_mesh
from parallel.records import to_dict
from training import loop, metrics
from training.state import create_state
from training.subject import with_vocabulary

TIMINGS = {"tokens_per_second", "mfu", "data_wait"}
KEYS = ["step", "loss", "grad_norm", "learning_rate", *TIMINGS]


def mesh_of_its_size(config):
    """The mesh on as many of the eight devices as it asks for."""
    return make_mesh(config, jax.devices()[: math.prod(config.axes.values())])


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of one kind share one compiled step, which in processes of their own each would compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_steps", functools.cache(loop.make_steps))
        patch.setattr(loop, "make_mesh", functools.cache(mesh_of_its_size))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny run on a small text, with its own data cache."""
    data = dataclasses.replace(
        tiny.data, path=argparse.__file__, cache_dir=str(tmp_path_factory.mktemp("cache")), split="tail"
    )
    schedule = dataclasses.replace(tiny.train, max_skipped=3)
    return dataclasses.replace(
        tiny, data=data, mesh=MeshConfig(data=1), train=schedule, out=str(tmp_path_factory.mktemp("runs"))
    )


def folder_of(run):
    return pathlib.Path(run.out) / run.name


def train(run, sample=None):
    """What train.py does with a run."""
    folder = folder_of(run)
    status = loop.train(
        folder,
        config=to_dict(run),
        seed=run.seed,
        model=run.model,
        mesh=run.mesh,
        rules=run.rules,
        execution=run.execution,
        data=run.data,
        optim=run.optim,
        schedule=run.train,
        sample=sample,
    )
    assert status == 0
    return folder


def sample(model, parameters, tokenizer, *, prompt, num_tokens, seed):
    """Text that shows what it was made from."""
    assert parameters["embedding"]["tokens"].shape == (model.vocab_size, model.embed_dim)
    return f"{prompt!r} {num_tokens} {seed} {tokenizer.vocab_size}"


@pytest.fixture(scope="module")
def done(base):
    """A whole run, and what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        folder = train(base, sample)
    return folder, said.getvalue()


def repeated(records):
    """Records without what differs from one time to the next."""
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def test_a_step_is_a_record_and_so_is_an_evaluation(done):
    records = metrics.read(done[0])
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert all(record.keys() >= set(KEYS) for record in steps)
    assert all(record["tokens_per_second"] > 0 and record["mfu"] > 0 for record in steps)
    assert [record["step"] for record in records if "eval_loss" in record] == [5, 10]
    assert steps[-1]["loss"] < steps[0]["loss"] < 6.5
    assert [list(record) for record in records if "eval_loss" in record] == [["step", "eval_loss"]] * 2


def test_the_folder_holds_the_run(done, base):
    folder, _ = done
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.json",
        "events",
        "lock",
        "loss.png",
        "metrics.jsonl",
        "samples.txt",
        "tokenizer",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config == {**to_dict(base), "model": {**to_dict(base.model), "vocab_size": 320}}
    assert sorted(os.listdir(folder / "checkpoints")) == ["00000005", "00000010"]
    text = r"'\n' 8 0 258"
    assert (folder / "samples.txt").read_text() == f"=== step 5\n\n{text}\n\n=== step 10\n\n{text}\n\n"


def test_it_says_what_it_does(done):
    folder, said = done
    lines = said.splitlines()
    assert lines[0] == "1 cpu device, 30,880 parameters, 196,992 FLOPs a token"
    assert lines[2].startswith("step  1/10  loss 6.")
    assert lines[-1] == f"done: 10 steps; {folder}"
    assert sum("eval loss" in line for line in lines) == 2


def test_a_finished_run_is_left_as_it_is(done, base, capsys):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}
    train(base, sample)
    assert capsys.readouterr().out == f"{folder} is finished: all 10 steps are done; give name=NAME for a new run\n"
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}


def interrupt(number):
    """A sample function in the middle of which the signal comes."""

    def sample(model, parameters, tokenizer, **options):
        os.kill(os.getpid(), number)
        return ""

    return sample


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_saves_and_goes_on_to_the_same_numbers(done, base, capsys, number):
    run = dataclasses.replace(base, name=f"interrupted{number}")
    before = signal.getsignal(number)
    folder = train(run, interrupt(number))
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        f"interrupted by {number.name} at step 5 of 10, checkpoint saved in {folder}; the same command goes on"
    )
    assert os.listdir(folder / "checkpoints") == ["00000005"]
    assert signal.getsignal(number) == before
    train(run, sample)
    assert f"going on after step 5 of 10, from {folder / 'checkpoints' / '00000005'}" in capsys.readouterr().out
    assert repeated(metrics.read(folder)) == repeated(metrics.read(done[0]))


def test_another_mesh_goes_on_with_the_same_batches_and_losses(done, base, capsys):
    run = dataclasses.replace(base, name="moved")
    folder = train(run, interrupt(signal.SIGTERM))
    run = dataclasses.replace(run, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    train(run)
    said = capsys.readouterr().out
    assert "mesh.data was 1 and is 2, mesh.fsdp was 1 and is 2, mesh.tensor was 1 and is 2: the batches" in said
    moved, stayed = metrics.read(folder), metrics.read(done[0])
    assert [(record["step"], record.get("tokens")) for record in moved] == [
        (record["step"], record.get("tokens")) for record in stayed
    ]
    for name in ("loss", "eval_loss", "grad_norm"):
        np.testing.assert_allclose(metrics.latest(moved, name)[1], metrics.latest(stayed, name)[1], rtol=2e-5)
    assert json.loads((folder / "config.json").read_text())["mesh"] == to_dict(run.mesh)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(done, base, capsys):
    run = dataclasses.replace(base, name="damaged")
    folder = folder_of(run)
    shutil.copytree(done[0], folder)
    last = folder / "checkpoints" / "00000010"
    largest = max(last.rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    train(run, sample)
    said, warned = capsys.readouterr()
    assert re.fullmatch(rf"checkpoint {last} is damaged \(arrays/\S+ has \d+ bytes, not \d+\); .*\n", warned)
    assert f"going on after step 5 of 10, from {last.with_name('00000005')}" in said
    records = metrics.read(done[0])
    assert repeated(metrics.read(folder)) == repeated(records + [r for r in records if r["step"] > 5])
    assert loop.checkpoint.newest(folder / "checkpoints", pytest.fail).step == 10


def test_another_config_is_refused(done, base):
    folder, _ = done
    before = (folder / "metrics.jsonl").read_bytes()
    run = dataclasses.replace(base, optim=dataclasses.replace(base.optim, peak_lr=1.0))
    with pytest.raises(
        ValueError, match=r"holds a run with another config: optim\.peak_lr is 0\.003 there and 1\.0 here"
    ):
        train(run)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_it_stops_when_no_step_is_finite(base, monkeypatch):
    def poisoned(*args, **options):
        state = create_state(*args, **options)
        return dataclasses.replace(state, parameters=jax.tree.map(lambda w: w * np.float32(np.nan), state.parameters))

    monkeypatch.setattr(loop, "create_state", poisoned)
    run = dataclasses.replace(base, name="diverged")
    with pytest.raises(ValueError, match=r"were not finite in 3 steps in a row, 1 to 3 \(train\.max_skipped=3\)"):
        train(run)
    records = metrics.read(folder_of(run))
    assert [(record["loss"], record["skipped"]) for record in records] == [(None, 1), (None, 2), (None, 3)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "is 0 tokens long"), ("x" * 70, "is 70 tokens long and model.max_length=64"), ("\N{SNOWMAN}", "character")],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_the_first_step(base, prompt, message):
    run = dataclasses.replace(
        base,
        name="prompt",
        data=dataclasses.replace(base.data, tokenizer="char"),
        train=dataclasses.replace(base.train, sample_prompt=prompt),
    )
    with pytest.raises(ValueError, match=message):
        train(run, sample)
    assert os.listdir(folder_of(run)) == ["lock"]


def test_the_vocabulary_is_the_tokenizers_rounded_up():
    assert with_vocabulary(tiny.model, 258).vocab_size == 320
    assert with_vocabulary(tiny.model, 64).vocab_size == 64
    large = dataclasses.replace(tiny.model, vocab_size=1000)
    assert with_vocabulary(large, 258) == large
    with pytest.raises(ValueError, match=r"model\.vocab_size=1000 is smaller than the tokenizer's 1001 tokens"):
        with_vocabulary(large, 1001)
