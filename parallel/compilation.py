"""Compiled programs kept on disk between processes, in the user's cache folder. Knows no program."""

import hashlib
import os
import pathlib
import platform
import time

import jax

LIMIT = 2 * 2**30  # bytes; the least recently used programs go first
TPU_OPTIONS: dict[str, str | bool | int | float] = {}  # of the TPU compiler, for every step
# Of the CPU compiler, for every step: its scheduler for concurrency lets collectives that do not depend on each other
# start in another order on each device, which then wait for each other for ever (pipe=2, fsdp=2, tensor=2 always did).
CPU_OPTIONS: dict[str, str | bool | int | float] = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
BEING_WRITTEN = 60.0  # seconds for which another process may still be writing a program


def cache_compilations(folder: pathlib.Path | None = None) -> pathlib.Path | None:
    """Keep every compiled program in `folder` (by default the user's cache folder) and find it there next time.

    -> the folder, or None where it cannot be written: then everything works as before, only slower to start.
    A folder that the user gave to jax itself (JAX_COMPILATION_CACHE_DIR) is left as it is.
    A CPU cut into several devices keeps nothing: a program read back by XLA:CPU has lost the order of its collectives,
    and its devices wait for each other until XLA ends the process (docs/design/checkpoints.md).
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    given = jax.config.values["jax_compilation_cache_dir"]
    if given:
        return pathlib.Path(given)
    folder = (folder or default_folder()) / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    sweep(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def sweep(folder: pathlib.Path) -> None:
    """Remove what a killed process left half written: jax writes a program, then the time of its last use beside it.

    It stumbles over a program without that time whenever it makes room, and over half a program whenever it reads it.
    """
    for program in folder.glob("*-cache"):
        last_use = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not last_use.exists() and time.time() - program.stat().st_mtime > BEING_WRITTEN:
            program.unlink(missing_ok=True)


def default_folder() -> pathlib.Path:
    """`meshlight/xla` in $XDG_CACHE_HOME, which is ~/.cache where it is not set."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "meshlight" / "xla"


def machine() -> str:
    """A name for this kind of processor: a home folder may be shared by machines that cannot run each other's code."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
