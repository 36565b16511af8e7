"""A MeshConfig made real: devices in a grid with one named axis per parallelism. Knows no model."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from parallel.config import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Grid of `devices` (all, by default) with the axes of `config`, in that order, under automatic partitioning.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
