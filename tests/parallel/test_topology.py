"""Names of TPU slices: what is there, what is near, and that libtpu agrees."""

import math

import pytest

from parallel.topology import GENERATIONS, find, topology_devices
from tests.tpu import needs_libtpu


@pytest.mark.parametrize(
    ("name", "num_devices", "gib"),
    [
        ("v5e:1x1", 1, 15.75),
        ("v5e:2x4", 8, 15.75),
        ("v5e:16x16", 256, 15.75),
        ("v6e:4x8", 32, 31.25),
        ("v5p:2x2x1", 4, 95.74),
        ("v5p:4x4x8", 128, 95.74),
        ("v5p:16x16x24", 6144, 95.74),
        ("tpu7x:4x4x4", 128, 94.75),  # two devices a chip
        ("v5p:4x4x4*2", 128, 95.74),
    ],
)
def test_a_name_is_devices_with_memory(name, num_devices, gib):
    topology = find(name)
    assert topology.name == name
    assert topology.num_devices == num_devices
    assert topology.hbm_bytes == int(gib * 2**30)


def test_slices_are_said_once():
    assert find("v5e:2x2", slices=2) == find("v5e:2x2*2")
    for name, slices in (("v5e:2x2*2", 2), ("v5e:2x2*0", 1), ("v5e:2x2*", 1)):
        with pytest.raises(ValueError, match="say the number of slices once"):
            find(name, slices)
    with pytest.raises(ValueError, match="slices=0 must be at least 1"):
        find("v5e:2x2", slices=0)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5e:3x3", "v5e:2x4, v5e:4x4"),
        ("v5e:4x2", "v5e:2x4"),  # the same chips, written otherwise
        ("v5e:64x64", "v5e:32x32"),
        ("v5p:4x4", "v5p:2x2x4"),
        ("v5p:4x8x4", "v5p:4x4x8"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5p-128", "v5p:4x4x4"),  # counts TensorCores
        ("v7x:4x4x4", "tpu7x:4x4x4"),
        ("v4:2x2x1", "two devices, which no v4 slice shows; of those checked, near are v5p:2x2x1"),
        ("v3:4x4", "v3 is not checked here"),
        ("tpu7:2x2x1", "tpu7x:"),
        ("a laptop", "v5e:8x8, v5p:4x4x4"),
        ("", "v5e:8x8, v5p:4x4x4"),
    ],
)
def test_another_name_is_answered_with_near_ones(name, near):
    with pytest.raises(ValueError) as error:
        find(name)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_shapes_are_written_small_to_large():
    for generation in GENERATIONS.values():
        chips = [math.prod(shape) for shape in generation.shapes]
        assert chips == sorted(chips)
        assert len(set(generation.shapes)) == len(chips)


@needs_libtpu
@pytest.mark.parametrize(
    "name", ["v5e:1x1", "v5e:2x4", "v5e:16x16", "v6e:2x2", "v5p:2x2x1", "v5p:4x4x8", "tpu7x:2x2x1", "v5e:2x2*2"]
)
def test_libtpu_has_these_devices(name):
    topology, devices = find(name), topology_devices(name)
    assert len(devices) == topology.num_devices
    assert {device.platform for device in devices} == {"tpu"}
    if topology.slices > 1:
        assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
    if topology.shape in ((1, 1), (2, 4)):
        assert {device.process_index for device in devices} == {0}, "one machine"


@needs_libtpu
def test_every_shape_is_known_to_libtpu():
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            if math.prod(shape) <= 1024:
                topology_devices(f"{generation.name}:{'x'.join(map(str, shape))}")
