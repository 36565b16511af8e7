"""Devices of a TPU that is not here, to compile for."""

import pytest

ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def tpu_devices(topology: str, monkeypatch) -> list:
    """Of a topology such as v5p:2x2x1; the test is skipped where there is no TPU compiler."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return topologies.get_topology_desc(topology, "tpu").devices
