"""The roofs of this machine, measured: float32 matmul FLOP/s and memory bandwidth. Knows no model."""

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Roof(NamedTuple):
    """What nothing on this machine can pass."""

    flops_per_second: float  # of a large float32 matmul
    bytes_per_second: float  # of reading memory that no cache holds


def measure(*, rounds: int = 5, size: int = 2048, megabytes: int = 256) -> Roof:
    """Best of some rounds of each; a second or two in all."""
    return Roof(_matmul(size, rounds), _read(megabytes, rounds))


def _matmul(size: int, rounds: int) -> float:
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    return 2 * size**3 / best(lambda: multiply(x).block_until_ready(), rounds)


def _read(megabytes: int, rounds: int) -> float:
    """One matrix-vector product a core, all at once: every byte is read once and nothing of size is written."""
    cores = os.cpu_count() or 1
    rows = megabytes * 2**20 // (4 * 4096 * cores)
    parts = [jnp.full((rows, 4096), i, jnp.float32) for i in range(cores)]
    vector = jnp.ones((4096,), jnp.float32)
    read = jax.jit(lambda parts, vector: [part @ vector for part in parts])
    seconds = best(lambda: jax.block_until_ready(read(parts, vector)), rounds)
    return sum(part.nbytes for part in parts) / seconds


def best(run: Callable[[], object], rounds: int) -> float:
    """Least seconds of `rounds`, after one that compiles."""
    return min(times(run, rounds))


def times(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each of `rounds`, after one that compiles and is not counted."""
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


median = statistics.median
