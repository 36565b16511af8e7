"""`train.py` is killed at random moments and started again: nothing shows in what it leaves behind."""

import argparse
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.tiny import run as tiny
from parallel import checkpoint
from parallel.config import AxisRules
from parallel.mesh import make_mesh
from training import metrics
from training.state import abstract_state
from training.step import make_steps
from training.subject import with_vocabulary

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVE_EVERY = 200, 20
TIMINGS = {"tokens_per_second", "mfu", "data_wait"}


def start(name: str, out: pathlib.Path) -> subprocess.Popen:
    """`python train.py …`, a small run of many steps."""
    settings = {
        "name": name,
        "out": out,
        "data.path": argparse.__file__,
        "data.split": "tail",
        "data.cache_dir": out / "cache",
        "train.steps": STEPS,
        "train.save_every": SAVE_EVERY,
        "train.eval_every": 60,
        "train.sample_tokens": 0,
        "optim.ema_decay": 0.9,
    }
    command = [sys.executable, "train.py", "configs/tiny.py", *(f"{key}={value}" for key, value in settings.items())]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def stop(process: subprocess.Popen, folder: pathlib.Path, at_step: int, number: int) -> tuple[str, str]:
    """Send a signal as soon as the metrics show the step; -> what the process had said."""
    path = folder / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and f'"step": {at_step},' in path.read_text()):
        time.sleep(0.002)
    assert process.poll() is None, f"the run ended before step {at_step}: {process.communicate()}"
    process.send_signal(number)
    return process.communicate(timeout=600)


def values(folder: pathlib.Path) -> dict[str, list]:
    """Every distinct value that was measured for each step and evaluation, timings aside."""
    found: dict[str, list] = {}
    for record in metrics.read(folder):
        kind = "eval" if "eval_loss" in record else "step"
        value = {name: value for name, value in record.items() if name not in TIMINGS}
        seen = found.setdefault(f"{kind} {record['step']}", [])
        if value not in seen:
            seen.append(value)
    return found


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All numbers of the newest checkpoint, by name."""
    found = checkpoint.newest(folder / "checkpoints", pytest.fail)
    assert found is not None
    assert found.step == STEPS
    model = with_vocabulary(tiny.model, 258)
    steps = make_steps(model, tiny.optim, tiny.train, make_mesh(tiny.mesh), AxisRules())
    state = checkpoint.load(found, abstract_state(model, steps.optimizer, ema=True))
    return {name: np.asarray(jax.device_get(leaf)) for name, leaf in checkpoint.named(state).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("runs")
    process = start("whole", out)
    said, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, ""), errors
    assert said.splitlines()[-1].startswith(f"done: {STEPS} steps")
    return out / "whole"


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole):
    draw = random.Random()
    seed = draw.randrange(2**32)
    draw.seed(seed)  # shown where the test fails
    folder = whole.with_name("killed")
    killed = draw.randrange(2 * SAVE_EVERY + 5, 80)  # a save waits for the one before, so step 20 is surely kept
    process = start("killed", whole.parent)
    stop(process, folder, killed, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    interrupted = draw.randrange(100, 180)
    process = start("killed", whole.parent)
    said, errors = stop(process, folder, interrupted, signal.SIGTERM)
    assert process.returncode == 0, errors
    assert errors == "\nSIGTERM: saving as soon as this step is done; a second one quits at once\n"
    resumed = int(re.search(r"going on after step (\d+) of 200", said)[1])  # the last but one save may be unfinished
    assert killed - 2 * SAVE_EVERY < resumed
    assert resumed % SAVE_EVERY == 0
    saved = int(re.search(r"interrupted by SIGTERM at step (\d+) of 200, checkpoint saved", said)[1])
    assert (folder / "checkpoints" / f"{saved:08d}" / "manifest.json").exists()

    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')  # as a kill in the middle of a line would leave it
    process = start("killed", whole.parent)
    said, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, ""), errors
    assert f"going on after step {saved} of 200" in said

    assert values(folder) == values(whole), f"seed {seed}"
    assert list(values(folder)) == list(values(whole))
    mine, other = arrays(folder), arrays(whole)
    assert mine.keys() == other.keys()
    for name in other:
        assert mine[name].dtype == other[name].dtype
        assert mine[name].tobytes() == other[name].tobytes(), f"{name}, seed {seed}"
