import json
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from parallel import checkpoint
from parallel.checkpoint import Checkpoints, load, newest
from parallel.config import MeshConfig
from parallel.mesh import make_mesh


def tree(seed: int, sharding=None) -> dict:
    """A small state: parameters, a tuple as optax makes, a scalar, a random key, nothing."""
    w = np.random.default_rng(seed).normal(size=(64, 128)).astype(np.float32)
    return {
        "parameters": {"w": jax.device_put(w, sharding), "layers": {0: {"b": jnp.full((4,), seed, jnp.bfloat16)}}},
        "optimizer": ({"count": jnp.int32(seed)}, None),
        "key": jax.random.key(seed),
    }


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_equal(got, want):
    got, want = checkpoint.named(got), checkpoint.named(want)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]), err_msg=name)


@pytest.fixture
def saved(tmp_path):
    """Steps 1, 2 and 3, each with its own numbers."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {"cursor": {"row": 10 * step}})
    checkpoints.wait()
    return tmp_path


def no_report(line):
    raise AssertionError(line)


def test_what_is_saved_comes_back_bit_for_bit(saved):
    found = newest(saved, no_report)
    assert found is not None
    assert (found.step, found.note) == (3, {"cursor": {"row": 30}})
    assert found.shapes == {
        "key": (2,),
        "optimizer.0.count": (),
        "parameters.layers.0.b": (4,),
        "parameters.w": (64, 128),
    }
    assert_equal(load(found, shapes(tree(3))), tree(3))


def test_parameters_come_without_the_optimizer(saved):
    found = newest(saved, no_report)
    assert found is not None
    wanted = {"parameters": shapes(tree(3))["parameters"]}
    assert_equal(load(found, wanted), {"parameters": tree(3)["parameters"]})


def test_restores_onto_another_mesh(tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tree(5, split), {})
    checkpoints.wait()
    found = newest(tmp_path, no_report)
    assert found is not None
    one = {"parameters": {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32)}}
    other = NamedSharding(make_mesh(MeshConfig(data=1, fsdp=8)), PartitionSpec(None, "fsdp"))
    eight = {"parameters": {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=other)}}
    for abstract, devices in ((one, 1), (eight, 8)):
        w = load(found, abstract)["parameters"]["w"]
        assert len(w.sharding.device_set) == devices
        np.testing.assert_array_equal(np.asarray(w), np.asarray(tree(5)["parameters"]["w"]))


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda x: x * np.float32(2) + np.float32(1), donate_argnums=0)
    x = jax.device_put(np.arange(2**20, dtype=np.float32))
    before = np.array(x)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": x}, {})
    for _ in range(5):  # overwrites the buffer while it is being written
        x = step(x)
    x.block_until_ready()
    checkpoints.wait()
    found = newest(tmp_path, no_report)
    assert found is not None
    restored = load(found, {"x": jax.ShapeDtypeStruct(before.shape, before.dtype)})
    np.testing.assert_array_equal(np.asarray(restored["x"]), before)


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 9, 10):
        checkpoints.save(step, {"x": jnp.float32(step)}, {})
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["00000009", "00000010"]
    checkpoints.save(10, {"x": jnp.float32(11)}, {})  # written again, as after a damaged one
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["00000009", "00000010"]
    found = newest(tmp_path, no_report)
    assert found is not None
    assert load(found, {"x": jax.ShapeDtypeStruct((), jnp.float32)})["x"] == 11


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    """In the middle of the parameter w, in every file where Orbax has it."""
    w, found = np.asarray(tree(int(folder.name))["parameters"]["w"]), False
    for path in (path for path in folder.rglob("*") if path.is_file()):
        data = bytearray(path.read_bytes())
        at = data.find(w[4].tobytes())
        if at >= 0:
            data[at], found = data[at] ^ 1, True
            path.write_bytes(data)
    assert found, "no file holds w as it is in memory"


def cut_short(folder):
    path = largest(folder / "arrays")
    os.truncate(path, path.stat().st_size // 2)


def lose_a_file(folder):
    largest(folder / "arrays").unlink()


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def edit_the_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"row": 30', '"row": 31'))


def half_a_manifest(folder):
    os.truncate(folder / "manifest.json", 100)


DAMAGES = {
    flip_a_bit: "differs from its checksum",
    cut_short: "bytes, not",
    lose_a_file: "is missing",
    lose_the_manifest: "manifest.json is missing",
    edit_the_manifest: "manifest.json differs from its checksum",
    half_a_manifest: "manifest.json differs from its checksum",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_named_and_the_one_before_taken(saved, damage):
    damage(saved / "00000003")
    lines = []
    found = newest(saved, lines.append)
    assert found is not None
    assert found.step == 2
    assert_equal(load(found, shapes(tree(2))), tree(2))
    (line,) = lines
    assert str(saved / "00000003") in line
    assert DAMAGES[damage] in line
    assert "\n" not in line


def test_orbax_alone_would_read_a_flipped_bit(saved):
    """Why the manifest exists: when this fails, Orbax has learned to check and the manifest may go."""
    found = newest(saved, no_report)
    assert found is not None
    flip_a_bit(saved / "00000003")
    restored = load(found, shapes(tree(3)))
    assert not np.array_equal(np.asarray(restored["parameters"]["w"]), np.asarray(tree(3)["parameters"]["w"]))


def test_when_none_is_whole_nothing_is_begun_anew(saved):
    for step in (1, 2, 3):
        flip_a_bit(saved / f"{step:08d}")
    with pytest.raises(ValueError, match=r"none of the 3 checkpoints .* is whole"):
        newest(saved, lambda line: None)


def test_an_empty_folder_has_none(tmp_path):
    assert newest(tmp_path, no_report) is None
    assert newest(tmp_path / "missing", no_report) is None


def test_unfinished_and_half_removed_ones_are_not_seen_and_cleaned_up(saved):
    (saved / "00000003").rename(saved / "00000004.partial")
    (saved / "00000001").rename(saved / "00000001.old")
    found = newest(saved, no_report)
    assert found is not None
    assert found.step == 2
    Checkpoints(saved, keep=3)
    assert os.listdir(saved) == ["00000002"]


def test_the_wrong_model_is_refused(saved):
    found = newest(saved, no_report)
    assert found is not None
    with pytest.raises(ValueError, match=r"parameters.w has shape \(64, 128\) .* needs \(64, 256\)"):
        load(found, {"parameters": {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}})
    with pytest.raises(ValueError, match=r"parameters.v is missing in checkpoint"):
        load(found, {"parameters": {"v": jax.ShapeDtypeStruct((64, 256), jnp.float32)}})


def test_a_disk_without_room_is_one_line_and_the_last_checkpoint_stays(saved, monkeypatch):
    usage = shutil.disk_usage(saved)._replace(free=100)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    checkpoints = Checkpoints(saved, keep=1)
    with pytest.raises(OSError, match=r"00000004 was not written: the disk has 0.0 MiB free .* are whole") as error:
        checkpoints.save(4, tree(4), {})
    assert "\n" not in str(error.value)
    found = newest(saved, no_report)
    assert found is not None
    assert found.step == 3


def test_a_disk_that_fills_up_meanwhile_is_one_line_too(tmp_path):
    """A limit on the size of files stands for the disk: Orbax meets it in the background, in another thread."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    x = {"x": jax.random.normal(jax.random.key(0), (256, 1024))}
    checkpoints.save(1, x, {})
    checkpoints.wait()
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(2, x, {})
        with pytest.raises(OSError, match=r"00000002 was not written: File too large; .* are whole") as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert [path.name for path in checkpoint.written(tmp_path)] == ["00000001"]
    checkpoints = Checkpoints(tmp_path, keep=2)  # the same command again, with room
    checkpoints.save(2, x, {})
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002"]


KILLED = """
import os, sys, threading, time
import jax, jax.numpy as jnp
from parallel.checkpoint import Checkpoints
import pathlib
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=2)
x = jnp.arange(2**20, dtype=jnp.float32)
checkpoints.save(1, {"x": x}, {"step": 1})
checkpoints.wait()
print("saved", flush=True)
for step in range(2, 10_000):
    checkpoints.save(step, {"x": x + step}, {"step": step})
"""


def test_a_kill_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path):
    """A process that does nothing but save is killed a few times at moments of its own choosing."""
    for delay in (0.05, 0.21):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "saved\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(delay)
        child.kill()
        child.communicate()
        found = newest(tmp_path, no_report)
        assert found is not None
        assert found.note == {"step": found.step}
        x = load(found, {"x": jax.ShapeDtypeStruct((2**20,), jnp.float32)})["x"]
        assert x[0] == (found.step if found.step > 1 else 0)
    assert json.loads((found.path / "manifest.json").read_text().partition("\n")[0])["step"] == found.step
