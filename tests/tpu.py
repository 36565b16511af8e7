"""Devices of a TPU that is not here, to compile for."""

import importlib.util

import pytest

from parallel.topology import topology_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: uv sync --group tpu"
)


def tpu_devices(topology: str) -> list:
    """Of a topology such as v5p:2x2x1; the test is skipped where there is no TPU compiler."""
    pytest.importorskip("libtpu")
    return list(topology_devices(topology))
