"""What is done before the first step does not grow with the devices of a host: programs compiled, bytes read."""

import pathlib

import jax
import numpy as np
import pytest

from configs.tiny import run as tiny
from data.packing import Batch
from parallel import checkpoint
from parallel.checkpoint import Checkpoints
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from training.feed import Feed
from training.state import abstract_state, create_state
from training.step import make_steps
from training.subject import with_vocabulary

MODEL = with_vocabulary(tiny.model, 258)


class Count:
    """How much happens inside a `with`."""

    def __enter__(self):
        self.compiled, self._read = 0, bytes_read()
        jax.clear_caches()
        jax.monitoring.register_event_duration_secs_listener(self._saw)
        return self

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._saw)
        self.read = bytes_read() - self._read

    def _saw(self, event, seconds, **about):
        self.compiled += event == "/jax/core/compile/backend_compile_duration"


def bytes_read() -> int:
    """By this process, page cache included."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def started(mesh: MeshConfig, devices: int, folder: pathlib.Path) -> dict[str, int]:
    """Initialise, save, restore and place a batch on so many devices; -> what each cost."""
    grid = make_mesh(mesh, jax.devices()[:devices])
    steps = make_steps(MODEL, tiny.optim, tiny.train, grid, AxisRules())
    with Count() as init:
        state = create_state(MODEL, steps.optimizer, grid, AxisRules(), ema=False, seed=0)
        jax.block_until_ready(state)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    found = checkpoint.newest(folder, pytest.fail)
    assert found is not None
    shapes = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_state(MODEL, steps.optimizer, ema=False),
        steps.state,
    )
    with Count() as restore:
        jax.block_until_ready(checkpoint.load(found, shapes))
    feed = Feed(steps.batch, Batch, ((tiny.train.batch_size, tiny.train.seq_len),))
    rows = Batch._make(np.zeros(leaf.shape, leaf.dtype) for leaf in next(feed.abstract()))
    with Count() as place:
        jax.block_until_ready(feed.place(rows))
    return {
        "programs to initialise": init.compiled,
        "programs to restore": restore.compiled,
        "programs to place a batch": place.compiled,
        "bytes restored": restore.read,
    }


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=1, fsdp=-1)], ids=["data", "fsdp"])
def test_eight_devices_start_as_one_does(mesh, tmp_path):
    started(mesh, 1, tmp_path / "imports")
    one, eight = started(mesh, 1, tmp_path / "one"), started(mesh, 8, tmp_path / "eight")
    for name in one:
        assert eight[name] <= 1.5 * one[name] + 2 * name.startswith("bytes") * 2**16, f"{name}: {one} and {eight}"


def test_one_device_is_measured_for_all(monkeypatch):
    """The peak of a CPU takes 0.2 s to find; that of eight devices no more."""
    from training import loop

    asked = []
    monkeypatch.setattr(loop, "peak_flops", lambda device: asked.append(device) or 2.0)
    task = type("Task", (), {"mesh": make_mesh(MeshConfig())})()
    running = loop.Loop.__new__(loop.Loop)
    running.task = task
    assert running._peak == 16.0
    assert len(asked) == 1
