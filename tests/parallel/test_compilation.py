"""A second process finds what the first compiled, and says nothing on the way."""

import os
import pathlib
import subprocess
import sys

import jax

from parallel.compilation import cache_compilations, default_folder, machine, sweep

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp
from jax._src import monitoring
from parallel.compilation import cache_compilations

events = []
monitoring.register_event_listener(lambda name, **_: events.append(name))
folder = cache_compilations(pathlib.Path(sys.argv[1]))
print(float(jax.jit(lambda x: jnp.cumsum(jnp.tanh(x)) @ x)(jnp.ones(8))))
print(events.count("/jax/compilation_cache/cache_hits"), events.count("/jax/compilation_cache/cache_misses"), folder)
"""


def run(folder: pathlib.Path) -> tuple[str, int, int, str]:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    value, counts = done.stdout.splitlines()
    hits, misses, where = counts.split(" ", 2)
    return value, int(hits), int(misses), where


def test_the_second_process_compiles_nothing(tmp_path):
    first, hits, misses, folder = run(tmp_path)
    assert misses > 0
    assert hits == 0
    assert pathlib.Path(folder) == tmp_path / machine()
    second, hits_again, misses_again, _ = run(tmp_path)
    assert (hits_again, misses_again) == (misses, 0)
    assert first == second


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    *_, folder = run(tmp_path / "file")
    assert folder == "None"


def test_a_cpu_of_several_devices_keeps_nothing(monkeypatch, tmp_path):
    """Here are eight. Read back, the second run of a program with two all-reduces hung in two processes of two."""
    monkeypatch.setattr(jax.config, "update", lambda name, value: changed.update({name: value}))
    changed = {}
    assert cache_compilations(tmp_path) is None
    assert changed == {"jax_enable_compilation_cache": False}
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    for name in ("whole-cache", "whole-atime", "half-cache", "begun-cache"):
        (tmp_path / name).write_bytes(b"program")
    for name in ("whole-cache", "half-cache"):
        os.utime(tmp_path / name, (1e9, 1e9))
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun-cache", "whole-atime", "whole-cache"]


def test_the_folder_follows_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "meshlight" / "xla"
