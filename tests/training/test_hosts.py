"""`train.py` as several processes on this machine: the numbers are those of one, and what is saved is everybody's."""

import argparse
import os
import pathlib
import shutil
import signal
import socket

import numpy as np
import pytest

from parallel import checkpoint
from tests.processes import free_port, running
from training import metrics

STEPS = 6
GLOO_SAYS = "Rank is connected to peer ranks. Expected number of connected peer ranks is :"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder of runs, with their text."""
    return tmp_path_factory.mktemp("runs")


def settings(out: pathlib.Path, name: str, **changes) -> list[str]:
    """A tiny run on four devices, however many processes have them."""
    values = {
        "name": name,
        "out": out,
        "data.path": argparse.__file__,
        "data.split": "tail",
        "data.cache_dir": out / "cache",
        "mesh.fsdp": 2,
        "mesh.tensor": 1,
        "train.steps": STEPS,
        "train.save_every": 3,
        "train.eval_every": 3,
        "train.sample_tokens": 0,
        "optim.ema_decay": 0.9,
        "hosts.devices": 4,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in values.items()]


def start(out: pathlib.Path, name: str, count: int = 1, devices: int = 4, odd: tuple[str, ...] = (), **changes):
    """`python train.py …` in `count` processes, the last with `odd` settings; -> as tests/processes.py has them."""
    changes["hosts__devices"] = devices // count
    commands = [["train.py", "configs/tiny.py", *settings(out, name, **changes)]]
    if count > 1:
        common = [*commands[0], f"hosts.coordinator=localhost:{free_port()}", f"hosts.count={count}", "hosts.timeout=8"]
        commands = [[*common, f"hosts.index={index}"] for index in range(count)]
        commands[-1] += odd
    return running(commands, out / f"{name}.said")


def is_of_gloo(line: str) -> bool:
    """Whether the network library wrote a line, or a piece of one: its threads cut each other's."""
    return "[Gloo]" in line or all(word.isdigit() or word in GLOO_SAYS.split() for word in line.split())


def train(out: pathlib.Path, name: str, count: int = 1, **changes) -> pathlib.Path:
    """A run from where it is to its end."""
    with start(out, name, count, **changes) as processes:
        statuses = [process.ends() for process in processes]
        assert statuses == [0] * count, [process.said + process.errors for process in processes]
        assert f"done: {changes.get('train__steps', STEPS)} steps" in processes[0].said
        for process in processes[1:]:  # only the first one speaks
            assert not [line for line in process.said.splitlines() if not is_of_gloo(line)]
    return out / name


def values(folder: pathlib.Path, name: str) -> dict[int, float]:
    """The last value that was measured for each step."""
    return {record["step"]: float(record[name]) for record in metrics.read(folder) if name in record}


def assert_same(folder: pathlib.Path, other: pathlib.Path) -> None:
    """The same batches, losses and evaluations, step by step; sums may have been rounded in another order."""
    for name, bound in (("tokens", 0.0), ("learning_rate", 0.0), ("loss", 2e-5), ("eval_loss", 2e-5)):
        ours, theirs = values(folder, name), values(other, name)
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose([ours[step] for step in theirs], list(theirs.values()), rtol=bound, err_msg=name)


@pytest.fixture(scope="module")
def alone(out):
    """One process, undisturbed."""
    return train(out, "alone")


@pytest.fixture(scope="module")
def pair(out):
    """Two processes, undisturbed."""
    return train(out, "pair", 2)


def test_two_processes_are_as_one(alone, pair):
    assert_same(pair, alone)
    assert {path.name for path in pair.iterdir()} == {path.name for path in alone.iterdir()}
    assert [path.name for path in checkpoint.written(pair / "checkpoints")] == ["00000003", "00000006"]


def shortened(folder: pathlib.Path, name: str) -> str:
    """A copy of a run as it was when its last checkpoint did not exist."""
    copy = shutil.copytree(folder, folder.with_name(name))
    shutil.rmtree(copy / "checkpoints" / "00000006")
    (copy / "metrics.jsonl").write_text("".join((copy / "metrics.jsonl").read_text().splitlines(keepends=True)[:4]))
    return name


def test_what_two_saved_one_goes_on_with(out, alone, pair):
    folder = train(out, shortened(pair, "pair_then_one"))
    assert [record["step"] for record in metrics.read(folder)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert_same(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (4, {"mesh__fsdp": 2}),
        (4, {"mesh__fsdp": 1, "mesh__tensor": 2, "mesh__data": 2}),
        (2, {"mesh__fsdp": 1, "mesh__context": 4}),
    ],
    ids=lambda value: " ".join(f"{k[6:]}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_any_number_of_processes_and_any_mesh_is_as_one(out, alone, count, mesh):
    name = f"{count}_" + "_".join(f"{key[6:]}{value}" for key, value in mesh.items())
    assert_same(train(out, name, count, **mesh), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(4, {"mesh__fsdp": 4}), (2, {"mesh__fsdp": 1, "mesh__tensor": 2})])
def test_what_two_saved_others_go_on_with(out, alone, pair, count, mesh):
    folder = train(out, shortened(pair, f"pair_then_{count}"), count, **mesh)
    assert [record["step"] for record in metrics.read(folder)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert_same(folder, alone)


@pytest.mark.slow
def test_what_one_saved_two_go_on_with_past_a_damaged_checkpoint(out, alone):
    folder = shutil.copytree(alone, alone.with_name("one_then_two"))
    largest = max((folder / "checkpoints" / "00000006").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    assert_same(train(out, "one_then_two", 2), alone)
    assert len([record for record in metrics.read(folder) if record["step"] == 6]) == 4


@pytest.mark.slow
def test_a_signal_to_one_saves_and_stops_all_and_they_go_on(out, alone):
    with start(out, "stopped", 2, train__steps=2000, train__eval_every=2000) as processes:
        processes[0].waits(lambda: metrics.read(out / "stopped") != [])
        processes[1].handle.send_signal(signal.SIGTERM)
        assert [process.ends() for process in processes] == [0, 0], [process.errors for process in processes]
        assert "interrupted by SIGTERM at step " in processes[0].said
    (saved,) = checkpoint.written(out / "stopped" / "checkpoints")[-1:]
    found = checkpoint.verified(saved)
    assert f"at step {found.step} of 2000, checkpoint saved" in processes[0].said
    assert metrics.read(out / "stopped")[-1]["step"] == found.step


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_one_is_named_and_what_is_saved_is_whole(out, victim):
    name = f"killed{victim}"
    with start(out, name, 2, train__steps=2000, train__eval_every=2000) as processes:
        processes[0].waits(lambda: len(checkpoint.written(out / name / "checkpoints")) >= 2)
        processes[victim].handle.kill()
        survivor = processes[1 - victim]
        assert survivor.ends() == 1
        assert survivor.errors.splitlines()[-1].startswith(f"error: process {victim} ({socket.gethostname()}) is gone")
    found = checkpoint.newest(out / name / "checkpoints", pytest.fail)
    assert found is not None
    with start(out, name, 2, train__steps=2000, train__eval_every=2000) as processes:
        processes[0].says(f"going on after step {found.step} of 2000")
        processes[0].waits(lambda: metrics.read(out / name)[-1]["step"] > found.step)


@pytest.mark.slow
def test_another_config_in_one_process_is_refused_by_its_first_key(out):
    with start(out, "odd", 2, odd=("optim.peak_lr=1.0", "seed=5")) as processes:
        assert sorted(process.ends() for process in processes) == [1, 2]
        line = "process 1 was started with another config than process 0: seed is 0 there and 5 here (and 1 more)"
        assert all(line in process.errors for process in processes)
    assert not (out / "odd" / "config.json").exists()
