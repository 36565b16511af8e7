"""Which platforms jax looks for in this process, and a CPU cut into several devices. Imports no jax by itself."""

import importlib.util
import os
import pathlib

CHIPS = ("accel[0-9]*", "vfio/[0-9]*")  # what a TPU host has in /dev
THREADS = 8  # of each device of a CPU that is cut into several
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
    """Show the CPU as so many devices, with threads enough for each. Call it before jax looks for devices.

    A device waits in a thread for each collective that it has come to, of several at once where they don't depend on
    each other. XLA makes as many threads as there are cores or devices; where all wait, the device that they wait for
    has none: of ten runs of tests/training/test_meshes.py on two cores five stood still for ever, with more threads
    none of eight. What the user said by NPROC stands.
    """
    import jax

    os.environ.setdefault("NPROC", str(THREADS * num_devices))
    jax.config.update("jax_num_cpu_devices", num_devices)
