"""Strict mode for every test: eight CPU devices, no silent broadcasting of ranks or dtypes."""

import os

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

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
