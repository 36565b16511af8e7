"""A translation run in this process: scored, stopped early, its best parameters kept, resumed as if uninterrupted."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs.dates import run as dates
from data.tokenizer import load_tokenizer
from inference.weights import averaged_parameters, run_checkpoint, run_parameters, run_shape
from model.seq2seq_config import Seq2SeqConfig
from parallel import checkpoint
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from parallel.records import to_dict
from training import loop, metrics

ONE = MeshConfig(data=1)


def mesh_of(config):
    """The first device alone."""
    return make_mesh(config, jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of one kind share one compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_steps", functools.cache(loop.make_steps))
        patch.setattr(loop, "make_mesh", functools.cache(mesh_of))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Dates by a tiny model: four evaluations, each with a checkpoint."""
    return dataclasses.replace(
        dates,
        mesh=ONE,
        out=str(tmp_path_factory.mktemp("runs")),
        optim=dataclasses.replace(dates.optim, schedule="constant", warmup_steps=1),
        model=dataclasses.replace(dates.model, embed_dim=8, recurrent_dim=8, dropout=0.1),
        data=dataclasses.replace(dates.data, examples=300, valid_pairs=20, test_pairs=5, buckets=()),
        train=dataclasses.replace(dates.train, steps=8, batch_size=8, eval_every=2, save_every=2, keep=9),
    )


def train(run, scores):
    """What train.py does with a run whose evaluations are scored so, one after the other."""
    told = iter(scores)

    def score(model, parameters, corpus):
        return next(told), [target[::-1] for _, target in corpus.valid_texts]

    pieces = {name: getattr(run, name) for name in ("seed", "model", "mesh", "rules", "execution", "data", "optim")}
    folder = pathlib.Path(run.out) / run.name
    config = to_dict(run)
    assert loop.train(folder, config=config, schedule=run.train, sample=None, score=score, **pieces) == 0
    return folder


def numbers(folder, part="checkpoints"):
    """Everything in the newest checkpoint."""
    found = run_checkpoint(folder, part)
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in found.shapes.items() if "param" in name}
    return found.step, jax.device_get(checkpoint.load(found, shapes))


@pytest.fixture(scope="module")
def whole(base):
    return train(dataclasses.replace(base, name="whole"), [1.0, 7.0, 3.0, 5.0])


def test_every_evaluation_is_scored_and_shows_translations(whole):
    assert metrics.latest(metrics.read(whole), "eval_bleu") == ([2, 4, 6, 8], [1.0, 7.0, 3.0, 5.0])
    sample = (whole / "samples.txt").read_text().split("=== step ")[-1].splitlines()
    assert sample[0] == "8"
    assert sample[2].strip()[::-1] == sample[3].strip()
    assert len((whole / "test.source").read_text().splitlines()) == 5
    assert load_tokenizer(whole / "tokenizer").eos_id is not None


def test_the_best_parameters_are_kept(whole):
    step, best = numbers(whole, "best")
    assert step == 4
    at_4 = checkpoint.verified(whole / "checkpoints" / "00000004")
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in best.items()}
    for name, array in checkpoint.load(at_4, shapes).items():
        np.testing.assert_array_equal(array, best[name], err_msg=name)


def test_a_run_without_a_better_score_ends(base, capsys):
    run = dataclasses.replace(base, name="settled", train=dataclasses.replace(base.train, patience=2))
    folder = train(run, [2.0, 1.0, 1.5])
    assert "done after 6 of 8 steps: BLEU has been highest, 2.00, at step 2" in capsys.readouterr().out
    assert run_checkpoint(folder, "best").step == 2
    train(run, [])
    assert "is finished: BLEU has not risen for train.patience=2 evaluations" in capsys.readouterr().out


def test_a_resumed_run_is_the_uninterrupted_one(base, whole):
    """Dropout, order of batches, best score and all: the run stops after step 4 and goes on."""
    run = dataclasses.replace(base, name="resumed")
    folder = train(dataclasses.replace(run, train=dataclasses.replace(run.train, steps=4)), [1.0, 7.0])
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"steps": 4', '"steps": 8'))
    train(run, [3.0, 5.0])
    (step, resumed), (_, there) = numbers(folder), numbers(whole)
    assert step == 8
    assert run_checkpoint(folder, "checkpoints").note["best"] == run_checkpoint(whole, "checkpoints").note["best"]
    for name, array in resumed.items():
        np.testing.assert_array_equal(array, there[name], err_msg=name)


def test_where_the_best_are_damaged_the_newest_are_taken(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    largest = max(
        (file for file in (folder / "best").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    largest.write_bytes(b"")
    assert run_checkpoint(folder, "best", "checkpoints").step == 8
    assert "is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .*best is whole"):
        run_checkpoint(folder, "best")


def test_an_average_is_the_mean_of_the_last_checkpoints(whole):
    config, mesh, rules = run_shape(whole, Seq2SeqConfig), mesh_of(ONE), AxisRules()
    two = averaged_parameters(config, whole, 2, mesh, rules)
    parts = [
        run_parameters(config, checkpoint.verified(whole / "checkpoints" / name), mesh, rules)
        for name in ("00000006", "00000008")
    ]
    for mean, a, b in zip(*map(jax.tree.leaves, (two, *parts)), strict=True):
        np.testing.assert_allclose(mean, (a + b) / 2, atol=1e-7)
    with pytest.raises(ValueError, match=r"--average 5 asks for as many checkpoints but .* has 4; give --average 4"):
        averaged_parameters(config, whole, 5, mesh, rules)
