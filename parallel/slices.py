"""Which numbers of chips stand together, and how: slices of a TPU torus, domains of a GPU's switch. Imports no jax.

slice_shape(find("v5p"), 128)     (4, 4, 8): a slice, the most cubic one of so many chips
slice_shape(find("H100"), 64)     (8, 8): eight hosts of eight
slice_shape(find("v5p"), 100)     ValueError: 100 chips form no slice of TPU v5p; the nearest are 64, 128
wraps(find("v5p"), (4, 4, 8))     (True, True, True): every dim is a ring
"""

import functools
import math

from parallel.chips import Chip
from parallel.topology import FLAT, GENERATIONS, SMALL, Shape, blocks, written

# Chips along each dimension, as docs.cloud.google.com/tpu/docs lists them: what libtpu compiles for, and for planning
# alone the older generations and the whole pod of v7x. v5e's shapes beyond a pod are the compiler's, not for rent.
_SHAPES = {
    "TPU v2": ((1, 1), (2, 2), (4, 4), (8, 8), (8, 16), (16, 16)),
    "TPU v3": ((1, 1), (2, 2), (4, 4), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)),
    "TPU v4": blocks(*SMALL, largest=(16, 16, 16)),
    "TPU v5e": FLAT,
    "TPU v5p": GENERATIONS["v5p"].shapes,
    "TPU v6e": GENERATIONS["v6e"].shapes,
    "TPU v7x": (*GENERATIONS["tpu7x"].shapes, (16, 24, 24)),
}
_COMPILED = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e", "TPU v7x": "tpu7x"}


def slice_shape(chip: Chip, num_chips: int) -> Shape:
    """How so many chips stand: sides of the most cubic TPU slice; (n,) in one domain or (domains, chips of each).

    GPUs come as a power of two within a host or as whole hosts. Several TPU slices are the caller's to divide.
    """
    if num_chips < 1:
        raise ValueError(f"num_chips={num_chips} must be at least 1")
    if chip.name in _SHAPES:
        shapes = [shape for shape in _SHAPES[chip.name] if math.prod(shape) == num_chips]
        if not shapes:
            raise ValueError(
                f"{num_chips} chips form no slice of {chip.name}; the nearest are {_near(chip, num_chips)}"
            )
        return min(shapes, key=sum)
    if not _is_hosts(chip, num_chips):
        raise ValueError(
            f"{num_chips} chips of {chip.name} are neither whole hosts of {chip.chips_per_host} nor a power of two "
            f"within one; the nearest are {_near(chip, num_chips)}"
        )
    if num_chips <= chip.domain:
        return (num_chips,)
    unit = min(chip.chips_per_host, chip.domain)
    each = max(n for n in range(unit, chip.domain + 1, unit) if num_chips % n == 0)
    return (num_chips // each, each)


def topology_name(chip: Chip, shape: Shape) -> str | None:
    """What `parallel.topology` calls that slice, None where libtpu does not compile for it: "v5p:4x4x8"."""
    generation = GENERATIONS.get(_COMPILED.get(chip.name, ""))
    return written(generation, shape) if generation and shape in generation.shapes else None


def slice_sizes(chip: Chip, most: int) -> tuple[int, ...]:
    """Every number of chips up to `most` that `slice_shape` takes, ascending."""
    if chip.name in _SHAPES:
        return tuple(size for size in _sizes(chip.name) if size <= most)
    return tuple(n for n in range(1, most + 1) if _is_hosts(chip, n))


def wraps(chip: Chip, shape: Shape) -> tuple[bool, ...]:
    """Whether each dim of a slice is a ring: it is a line where nothing joins its ends.

    In two dimensions a side wraps where it spans a pod's (16 chips of v5e and v6e); in three, cubes of 4x4x4 are
    joined by optical switches, so that slices of whole cubes wrap everywhere and smaller ones nowhere. Behind a switch
    everything is a ring (docs.cloud.google.com/tpu/docs; jax-ml/scaling-book tpus.md).
    """
    if chip.topology == "torus2d":
        pod = math.isqrt(chip.domain)
        return tuple(side >= pod for side in shape)
    if chip.topology == "torus3d":
        return (all(side % 4 == 0 for side in shape),) * len(shape)
    return (chip.topology != "none",) * len(shape)


def _is_hosts(chip: Chip, num_chips: int) -> bool:
    host = chip.chips_per_host
    return num_chips % host == 0 or (num_chips < host and num_chips.bit_count() == 1)


@functools.cache
def _sizes(name: str) -> tuple[int, ...]:
    return tuple(sorted({math.prod(shape) for shape in _SHAPES[name]}))


def _near(chip: Chip, num_chips: int) -> str:
    """The sizes just below and above."""
    sizes = slice_sizes(chip, num_chips + chip.domain * chip.chips_per_host)
    below, above = [n for n in sizes if n < num_chips], [n for n in sizes if n > num_chips]
    return ", ".join(str(n) for n in (*below[-1:], *above[:1]))
