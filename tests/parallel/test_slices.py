"""Which chips stand together: shapes as Google lists them, hosts as racks have them."""

import math

import pytest

from parallel.chips import CHIPS, find
from parallel.slices import slice_shape, slice_sizes, topology_name, wraps
from parallel.topology import GENERATIONS
from parallel.topology import find as topology_of


@pytest.mark.parametrize(
    ("chip", "num_chips", "shape"),
    [
        ("v5e", 1, (1, 1)),
        ("v5e", 8, (2, 4)),
        ("v5e", 256, (16, 16)),
        ("v6e", 32, (4, 8)),
        ("v5p", 4, (2, 2, 1)),
        ("v5p", 64, (4, 4, 4)),
        ("v5p", 128, (4, 4, 8)),
        ("v5p", 512, (8, 8, 8)),  # not 4x4x32
        ("v5p", 2048, (8, 16, 16)),
        ("v5p", 6144, (16, 16, 24)),
        ("v4", 384, (4, 8, 12)),
        ("v4", 4096, (16, 16, 16)),
        ("v3", 1024, (32, 32)),
        ("v7x", 256, (4, 8, 8)),
        ("v7x", 9216, (16, 24, 24)),
        ("H100", 2, (2,)),
        ("H100", 8, (8,)),
        ("H100", 24, (3, 8)),
        ("A100", 2520, (315, 8)),
        ("GB200", 64, (64,)),  # one rack
        ("GB200", 72, (72,)),
        ("GB300", 256, (4, 64)),
        ("GH200", 3, (3,)),
        ("MI210", 8, (2, 4)),  # two hives of a host
        ("T4", 1, (1,)),
    ],
)
def test_chips_stand_as_they_are_sold(chip, num_chips, shape):
    assert slice_shape(find(chip), num_chips) == shape
    assert math.prod(shape) == num_chips


@pytest.mark.parametrize(
    ("chip", "num_chips", "message"),
    [
        ("v5e", 12, "12 chips form no slice of TPU v5e; the nearest are 8, 16"),
        ("v5e", 512, "512 chips form no slice of TPU v5e; the nearest are 256"),
        ("v5p", 100, "100 chips form no slice of TPU v5p; the nearest are 64, 128"),
        ("v5p", 8960, "8960 chips form no slice of TPU v5p; the nearest are 6144"),
        ("H100", 12, "neither whole hosts of 8 nor a power of two within one; the nearest are 8, 16"),
        ("H100", 3, "the nearest are 2, 4"),
        ("H100", 0, "num_chips=0 must be at least 1"),
    ],
)
def test_other_numbers_are_answered_with_the_nearest(chip, num_chips, message):
    with pytest.raises(ValueError) as error:
        slice_shape(find(chip), num_chips)
    assert message in str(error.value)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_every_size_has_a_shape_up_to_the_domain(chip):
    sizes = slice_sizes(chip, chip.domain)
    assert sizes[0] == 1
    assert sizes[-1] == chip.domain or chip.domain < chip.chips_per_host
    for size in sizes:
        shape = slice_shape(chip, size)
        assert math.prod(shape) == size
        assert len(wraps(chip, shape)) == len(shape) == {"torus2d": 2, "torus3d": 3}.get(chip.topology, 1)


@pytest.mark.parametrize("name", GENERATIONS)
def test_slices_are_those_that_the_compiler_takes(name):
    chip, largest = find(name), math.prod(GENERATIONS[name].shapes[-1])
    for num_chips in slice_sizes(chip, largest):
        topology = topology_name(chip, slice_shape(chip, num_chips))
        assert topology is not None
        assert topology_of(topology).num_devices == num_chips * chip.devices_per_chip


def test_libtpu_compiles_for_neither_old_chips_nor_gpus():
    for name, num_chips in (("v4", 64), ("v7x", 9216), ("H100", 8)):
        assert topology_name(find(name), slice_shape(find(name), num_chips)) is None


@pytest.mark.parametrize(
    ("chip", "shape", "rings"),
    [
        ("v5e", (8, 8), (False, False)),
        ("v5e", (8, 16), (False, True)),
        ("v6e", (16, 16), (True, True)),
        ("v5p", (2, 2, 4), (False, False, False)),  # less than a cube
        ("v5p", (4, 4, 4), (True, True, True)),
        ("v4", (4, 8, 12), (True, True, True)),
        ("v3", (16, 32), (False, True)),
        ("v3", (32, 32), (True, True)),
        ("H100", (8,), (True,)),
    ],
)
def test_rings(chip, shape, rings):
    assert wraps(find(chip), shape) == rings
