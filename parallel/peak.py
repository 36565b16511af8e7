"""What a device of this process computes at best: its chip's row, or a measurement. Knows no model."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel.chips import CHIPS

# Dense bfloat16 FLOP/s of one jax device, by `device_kind`. A chip of v2, v3 and v7x is two devices.
PEAK_FLOPS = {kind: chip.bf16_flops / chip.devices_per_chip for chip in CHIPS for kind in chip.kinds}

# TPUs with a unit for fp8: docs/design/quantized_training.md
FP8 = tuple(kind for chip in CHIPS if chip.vendor == "Google" and chip.fp8_flops for kind in chip.kinds)


def require_fp8(device: Any) -> None:
    """ValueError for a TPU that would multiply fp8 in another type; a CPU does, too, but there it is to try things."""
    if device.platform == "tpu" and device.device_kind not in FP8:
        raise ValueError(
            f"model.matmul=fp8 gains nothing on {device.device_kind}; "
            f"the chips that multiply fp8 are {', '.join(FP8)}: set int8 or float"
        )


def peak_flops(device: Any) -> float:
    """FLOP/s that one device reaches at best: from the table, else the best float32 matmul of 0.2 s.

    The devices of one CPU share its cores, so each has its part of the measured figure.
    """
    if device.device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device.device_kind]
    return measured_flops(device) / (jax.local_device_count() if device.platform == "cpu" else 1)


@functools.cache
def measured_flops(device: Any, *, size: int = 1024, seconds: float = 0.1) -> float:
    """The best float32 matmul of a device; a CPU's is the better of XLA's and NumPy's, each tried for `seconds`.

    Cached for the process, and only as quiet as the machine was.
    """
    x = jax.device_put(np.ones((size, size), np.float32), device)
    matmul = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    best = 2 * size**3 / _quickest(lambda: matmul(x).block_until_ready(), seconds)
    if device.platform != "cpu":
        return best
    rows = np.ones((size, size), np.float32)
    return max(best, 2 * size**3 / _quickest(lambda: rows @ rows, seconds))


def _quickest(run: Callable, seconds: float) -> float:
    """Shortest time of one call among those that fit in `seconds`, after one to warm up."""
    run()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
