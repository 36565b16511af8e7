"""Strict mode for every test: eight CPU devices, no silent broadcasting of ranks or dtypes."""

import os
import pathlib

# Tests compile much and compute little: programs are compiled in haste, here and in the processes that tests start.
# Eight devices on busy cores may wait long for each other: XLA would end the process after 40 seconds.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
# An installed libtpu would look for a chip, here and in those processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from parallel.platforms import cut_cpu

cut_cpu(8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

PROGRAMS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 20_000  # Linux lets a process have 65,530; a compiled program takes some, and a worker that runs out dies


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of the modules before are given up once there are many."""
    yield
    if PROGRAMS.exists() and PROGRAMS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
