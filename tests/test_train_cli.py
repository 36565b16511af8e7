"""The training door: what it prints, its exit status, and that neither help nor errors wait for jax."""

import dataclasses
import pathlib
import subprocess
import sys
import types

import pytest

import train
import training
from configs.base import RunConfig
from configs.tiny import run
from parallel.records import from_dict

ROOT = pathlib.Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")


def door(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    """`python train.py …` as a user runs it."""
    return subprocess.run([sys.executable, ROOT / "train.py", *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def loop(monkeypatch):
    """A training loop that only remembers what it was given."""
    fake = types.SimpleNamespace(calls=[], train=lambda folder, **pieces: fake.calls.append((folder, pieces)) or 0)
    monkeypatch.setitem(sys.modules, "training.loop", fake)
    monkeypatch.setattr(training, "loop", fake, raising=False)
    return fake


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesh.tensr=4"], "error: unknown key mesh.tensr (--help lists all); did you mean mesh.tensor?\n"),
        (["train.steps=many"], "error: train.steps=many must be int\n"),
        (
            [TINY, "train.seq_len=99"],
            "error: train.seq_len=99 is longer than model.max_length=64; shorten the sequences",
        ),
        (["nothing.py"], "error: nothing.py is no config file"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(tmp_path, arguments, message):
    done = door(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_values_of_the_config_asked_for(tmp_path):
    done = door(TINY, "train.steps=12", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "usage: train.py [CONFIG] [key=value ...]" in done.stdout
    assert "  name=tiny " in done.stdout
    assert "  train.steps=12 " in done.stdout


@pytest.mark.parametrize("argument", ["--help", "mesh.tensr=4"])
def test_help_and_errors_do_not_import_jax(argument):
    code = (
        f"import sys, train; train.main([{argument!r}]); sys.exit(bool({{'jax', 'numpy', 'flax'}} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_loop_gets_the_pieces_of_the_resolved_run(loop):
    assert train.main([TINY, "seed=5", "out=here"]) == 0
    ((folder, pieces),) = loop.calls
    assert folder == pathlib.Path("here/tiny")
    assert from_dict(RunConfig, pieces["config"]) == dataclasses.replace(run, seed=5, out="here")
    assert pieces["seed"] == 5
    assert pieces["schedule"] == run.train
    assert all(pieces[name] == getattr(run, name) for name in ("model", "mesh", "rules", "data", "optim"))


def test_the_loops_exit_status_is_the_doors(loop):
    loop.train = lambda folder, **pieces: 3
    assert train.main([TINY]) == 3


def test_a_mesh_that_does_not_fit_the_devices_is_refused_before_the_loop(loop, capsys):
    assert train.main([TINY, "mesh.data=16", "train.batch_size=16"]) == 2
    assert "asks for 16 devices but 8 are here" in capsys.readouterr().err
    assert loop.calls == []


@pytest.mark.parametrize("error", [ValueError("mesh\n  too large"), OSError("mesh too large")])
def test_what_the_loop_refuses_is_one_line(loop, capsys, error):
    def refuse(folder, **pieces):
        raise error

    loop.train = refuse
    assert train.main([TINY]) == 2
    assert capsys.readouterr().err == "error: mesh too large\n"


def test_our_own_mistakes_keep_their_traceback(loop):
    def fail(folder, **pieces):
        raise AssertionError("ours")

    loop.train = fail
    with pytest.raises(AssertionError, match="ours"):
        train.main([TINY])
