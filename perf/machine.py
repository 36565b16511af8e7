"""How many chips, as slices: what is for rent, how it is called, what room it leaves. Knows no model.

fewest(v5e, 512)     2 slices, since one has 256 chips at most
named(v5p, 1024, 1)  1,024 TPU v5p (8x8x16)
"""

import functools
from collections.abc import Iterator

from parallel.chips import Chip
from parallel.slices import slice_shape, slice_sizes, topology_name
from parallel.topology import Topology
from parallel.topology import find as find_topology

MOST = 2**15  # chips that are tried
MOST_SLICES = 64
DRIVER = 0.06  # of a GPU's memory: context, libraries and what fragments


def is_torus(chip: Chip) -> bool:
    """Whether it comes in slices, several of which the network joins."""
    return chip.topology.startswith("torus")


def fewest(chip: Chip, chips: int) -> int:
    """The fewest equal slices that so many chips are; ValueError with the nearest numbers where they are none."""
    if not forms(chip, chips) and is_torus(chip) and chips > slice_sizes(chip, MOST)[-1]:
        for count in range(2, MOST_SLICES + 1):
            if chips % count == 0 and forms(chip, chips // count):
                return count
    slice_shape(chip, chips)
    return 1


def forms(chip: Chip, chips: int) -> bool:
    """Whether so many are one slice, or whole hosts."""
    try:
        slice_shape(chip, chips)
    except ValueError:
        return False
    return True


def require(chip: Chip, chips: int, slices: int) -> None:
    """ValueError where so many equal slices do not hold so many chips."""
    if chips % slices:
        raise ValueError(f"{chips} chips are not a multiple of {slices} slices; slices are of one size")
    if slices > 1 and not is_torus(chip):
        raise ValueError(f"--slices {slices} is of TPUs; {chip.name} stand behind a switch and a network: leave it out")
    slice_shape(chip, chips // slices)


def more(chip: Chip, chips: int) -> Iterator[int]:
    """Larger numbers of chips, from the next one on: slices, then several of the largest; hosts by doubling."""
    if is_torus(chip):
        sizes = slice_sizes(chip, MOST)
        yield from (size for size in sizes if size > chips)
        yield from (sizes[-1] * count for count in (2, 4, 8, 16) if sizes[-1] * count > chips)
        return
    sizes = sorted({part * 2**power for power in range(MOST.bit_length()) for part in (1, 3)})
    yield from (size for size in sizes if size > chips and forms(chip, size))


def topology(chip: Chip, chips: int, slices: int) -> Topology | None:
    """Slices that can be compiled for; None where libtpu knows none."""
    name = topology_name(chip, slice_shape(chip, chips // slices))
    return find_topology(name, slices) if name else None


def named(chip: Chip, chips: int, slices: int) -> str:
    """1,024 TPU v5p (8x8x16); 512 TPU v5e (2 slices of 16x16); 16 H100-SXM-80GB."""
    form = "x".join(map(str, slice_shape(chip, chips // slices))) if is_torus(chip) else ""
    inside = f"{slices} slices of {form}" if slices > 1 else form
    return f"{chips:,} {chip.name}" + (f" ({inside})" if inside else "")


@functools.cache
def room(chip: Chip) -> int:
    """Bytes of a device that a program may use: as libtpu has it, else all but what a driver takes."""
    one = topology_name(chip, slice_shape(chip, 1)) if is_torus(chip) else None
    if one:
        return find_topology(one).hbm_bytes
    return int((1 - DRIVER) * chip.hbm_bytes / chip.devices_per_chip)
