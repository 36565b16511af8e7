"""Which platforms jax looks for in this process, and a CPU cut into several devices. Imports no jax by itself."""

import importlib.util
import os
import pathlib

CHIPS = ("accel[0-9]*", "vfio/[0-9]*")  # what a TPU host has in /dev
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def look_only_where_chips_are(devices: pathlib.Path = pathlib.Path("/dev")) -> None:
    """Have jax start on the CPU where libtpu is installed, as for compiling, but no TPU is there; else do nothing.

    libtpu would ask the cloud's metadata server for its machine, for half a minute, and print errors. What the user
    said by JAX_PLATFORMS stands. Call it before jax looks for devices.
    """
    has_chip = any(next(devices.glob(pattern), None) for pattern in CHIPS)
    is_installed = importlib.util.find_spec("libtpu") is not None
    has_gpu = any(importlib.util.find_spec(plugin) for plugin in GPU_PLUGINS)
    if is_installed and not has_chip and not has_gpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def cut_cpu(num_devices: int) -> None:
    """Show the CPU as so many devices, which run one program at a time. Call it before jax looks for devices.

    Where a program is enqueued before the last has ended, devices of the one hold the threads that the other's wait
    for: about every second run of tests/training/test_meshes.py on two cores stood still for ever, none of three so.
    """
    import jax

    jax.config.update("jax_num_cpu_devices", num_devices)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
