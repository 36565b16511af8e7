"""A MeshConfig made real: devices in a grid whose axes lie along the dims of the machine. Knows no model.

On a TPU the devices are a torus, and a mesh axis wants to be one of its dims: then a collective over it is a ring.
The axis `fsdp` is mostly larger than that, so it is three mesh axes, one for each dim of the torus that it covers; XLA
makes a reduce-scatter over one dim at a time, but an all-reduce of what spans two (docs/design/fsdp.md).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from parallel.config import MeshConfig

FSDP = ("fsdp", "fsdp_y", "fsdp_z")
AXES = ("pipe", "data", *FSDP, "expert", "context", "tensor")
# Dims of the machine are slices, x, y, z, cores. What talks most is placed first, on a dim of its own where one fits.
PLACED = {"tensor": (4, 3, 2, 1, 0), "context": (3, 2, 1, 4, 0), "expert": (3, 2, 1, 4, 0)}
PLACED |= {"data": (0, 1, 2, 3, 4), "pipe": (0, 1, 2, 3, 4)}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Grid of `devices` (all, by default) with the axes of `config`, under automatic partitioning.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    grid = _on_torus(config.sizes(len(devices)), torus(devices))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def called(axis: str) -> str:
    """What a mesh axis is called in a config: `fsdp` is several here."""
    return FSDP[0] if axis in FSDP else axis


def mesh_sizes(mesh: Mesh) -> dict[str, int]:
    """Devices along each axis as a config calls it."""
    found: dict[str, int] = {}
    for axis, size in mesh.shape.items():
        found[called(axis)] = found.get(called(axis), 1) * size
    return found


def torus(devices: Sequence[Any]) -> np.ndarray:
    """The devices as [slices, x, y, z, cores]; those without coordinates stand in one line along x."""
    if not hasattr(devices[0], "coords"):
        return np.asarray(devices, object).reshape(1, -1, 1, 1, 1)
    slices = sorted({getattr(device, "slice_index", 0) for device in devices})
    places = [(slices.index(getattr(d, "slice_index", 0)), *d.coords, d.core_on_chip) for d in devices]
    low, high = np.min(places, axis=0), np.max(places, axis=0)
    grid = np.full(high - low + 1, None, object)
    for place, device in zip(places, devices, strict=True):
        grid[tuple(np.asarray(place) - low)] = device
    if grid.size != len(devices):
        return np.asarray(devices, object).reshape(1, -1, 1, 1, 1)  # no whole box
    return grid


def _on_torus(sizes: dict[str, int], machine: np.ndarray) -> np.ndarray:
    """The grid in the order of AXES; each dim of the machine is cut into factors, each given to one axis."""
    cuts = factors(sizes, machine.shape)
    owners = [axis for dim in cuts for axis, _ in dim]
    order = [place for axis in AXES for place, owner in enumerate(owners) if owner == axis]
    shape = [math.prod(size for dim in cuts for owner, size in dim if owner == axis) for axis in AXES]
    return machine.reshape([size for dim in cuts for _, size in dim]).transpose(order).reshape(shape)


def factors(sizes: dict[str, int], machine: Sequence[int]) -> list[list[tuple[str, int]]]:
    """For each dim of the machine the axes that share it, the slowest first.

        factors({"tensor": 4, "fsdp": 64, …}, (1, 16, 16, 1, 1))
            -> [[], [("fsdp", 16)], [("fsdp_y", 4), ("tensor", 4)], [], []]

    Where a size has a factor that no dim has, the machine is taken as one line.
    """
    left, cuts = list(machine), [[] for _ in machine]
    for axis, order in PLACED.items():
        size = sizes[axis]
        for dim in sorted(order, key=lambda dim: (left[dim] != size, order.index(dim))):
            factor = math.gcd(size, left[dim])
            if factor > 1:
                cuts[dim].append((axis, factor))
                left[dim], size = left[dim] // factor, size // factor
        if size > 1:
            return [[], [(axis, sizes[axis]) for axis in AXES if sizes.get(axis, 1) > 1], [], [], []]
    rest = [dim for dim, size in enumerate(left) if size > 1]
    for place, dim in enumerate(rest):
        cuts[dim].append((FSDP[min(place, len(FSDP) - 1)], left[dim]))
    return [sorted(cut, key=lambda part: AXES.index(part[0])) for cut in cuts]
