"""libtpu for compiling must not keep a laptop from starting at once."""

import importlib.util

import pytest

from parallel import platforms


@pytest.mark.parametrize(
    ("installed", "chips", "expected"),
    [
        ({"libtpu"}, [], "cpu"),
        ({"libtpu"}, ["accel0"], None),
        ({"libtpu"}, ["vfio/0"], None),
        ({"libtpu", "jax_cuda12_plugin"}, [], None),
        (set(), [], None),
    ],
)
def test_the_cpu_is_chosen_where_there_is_libtpu_and_no_chip(monkeypatch, tmp_path, installed, chips, expected):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    for chip in chips:
        (tmp_path / chip).parent.mkdir(exist_ok=True)
        (tmp_path / chip).touch()
    platforms.look_only_where_chips_are(tmp_path)
    assert platforms.os.environ.get("JAX_PLATFORMS") == expected


def test_what_the_user_said_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    platforms.look_only_where_chips_are(tmp_path)
    assert platforms.os.environ["JAX_PLATFORMS"] == "tpu,cpu"
