"""Mesh axes lie along the dims of the machine: checked on toruses of devices that are only coordinates."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from parallel.config import MeshConfig
from parallel.mesh import AXES, FSDP, factors, make_mesh, torus


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a TPU device; numbered as jax does: cores, x, y, z, slices, the fastest first."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int


def machine(x: int, y: int, z: int = 1, *, cores: int = 1, slices: int = 1) -> list[Device]:
    places = itertools.product(range(slices), range(z), range(y), range(x), range(cores))
    return [Device(id, s, (i, j, k), core) for id, (s, k, j, i, core) in enumerate(places)]


def sizes_of(num_devices: int, **axes: int) -> dict[str, int]:
    return MeshConfig(**{"data": 1, **axes}).sizes(num_devices)


V5E, V5P, TPU7X = (1, 16, 16, 1, 1), (1, 4, 4, 8, 1), (1, 4, 4, 4, 2)


@pytest.mark.parametrize(
    ("shape", "axes", "cuts"),
    [
        (V5E, {"fsdp": 256}, [[], [("fsdp", 16)], [("fsdp_y", 16)], [], []]),
        (V5P, {"fsdp": 128}, [[], [("fsdp", 4)], [("fsdp_y", 4)], [("fsdp_z", 8)], []]),
        (V5P, {"fsdp": 32, "tensor": 4}, [[], [("fsdp", 4)], [("tensor", 4)], [("fsdp_y", 8)], []]),
        (V5P, {"fsdp": 16, "tensor": 8}, [[], [("fsdp", 4)], [("fsdp_y", 4)], [("tensor", 8)], []]),
        (V5E, {"fsdp": 16, "context": 16}, [[], [("fsdp", 16)], [("context", 16)], [], []]),
        (V5E, {"fsdp": 64, "tensor": 4}, [[], [("fsdp", 16)], [("fsdp_y", 4), ("tensor", 4)], [], []]),
        ((2, 16, 16, 1, 1), {"data": 2, "fsdp": 256}, [[("data", 2)], [("fsdp", 16)], [("fsdp_y", 16)], [], []]),
        (
            (2, 4, 4, 4, 1),
            {"pipe": 2, "fsdp": 64},
            [[("pipe", 2)], [("fsdp", 4)], [("fsdp_y", 4)], [("fsdp_z", 4)], []],
        ),
        (TPU7X, {"fsdp": 64, "tensor": 2}, [[], [("fsdp", 4)], [("fsdp_y", 4)], [("fsdp_z", 4)], [("tensor", 2)]]),
        # four dims left: the last two share an axis
        (TPU7X, {"fsdp": 128}, [[], [("fsdp", 4)], [("fsdp_y", 4)], [("fsdp_z", 4)], [("fsdp_z", 2)]]),
        ((1, 8, 1, 1, 1), {"data": 2, "tensor": 4}, [[], [("data", 2), ("tensor", 4)], [], [], []]),
    ],
    ids=str,
)
def test_axes_lie_along_the_dims_of_a_torus(shape, axes, cuts):
    assert factors(sizes_of(math.prod(shape), **axes), shape) == cuts


def test_an_axis_that_no_dim_holds_spans_several():
    assert factors(sizes_of(16, tensor=16), (1, 4, 4, 1, 1)) == [[], [("tensor", 4)], [("tensor", 4)], [], []]
    spread = factors(sizes_of(12, fsdp=4, tensor=3), (1, 2, 6, 1, 1))
    assert spread == [[], [("fsdp", 2)], [("fsdp_y", 2), ("tensor", 3)], [], []]


def test_a_size_that_does_not_fit_takes_the_machine_as_one_line():
    sizes = {"pipe": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 3}
    assert factors(sizes, (1, 4, 4, 1, 1)) == [[], [("tensor", 3)], [], [], []]


def test_a_mesh_axis_is_a_ring_of_the_machine():
    mesh = make_mesh(MeshConfig(data=1, fsdp=32, tensor=4), machine(4, 4, 8))
    assert {axis: mesh.shape[axis] for axis in (*FSDP, "tensor")} == {"fsdp": 4, "fsdp_y": 8, "fsdp_z": 1, "tensor": 4}
    dims = {"fsdp": 0, "fsdp_y": 2, "tensor": 1}
    for axis, dim in dims.items():
        rings = np.moveaxis(mesh.devices, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
        for ring in rings:
            coords = np.array([device.coords for device in ring])
            assert list(coords[:, dim]) == list(range(mesh.shape[axis]))
            assert (np.delete(coords, dim, axis=1) == np.delete(coords[:1], dim, axis=1)).all()


def test_slices_are_apart_along_data_alone():
    mesh = make_mesh(MeshConfig(data=2, fsdp=16), machine(4, 4, slices=2))
    for number, replica in enumerate(np.moveaxis(mesh.devices, AXES.index("data"), 0)):
        assert {device.slice_index for device in replica.flat} == {number}


def test_the_cores_of_a_chip_are_next_to_each_other_along_tensor():
    mesh = make_mesh(MeshConfig(data=1, fsdp=64, tensor=2), machine(4, 4, 4, cores=2))
    for pair in np.moveaxis(mesh.devices, AXES.index("tensor"), -1).reshape(-1, 2):
        assert pair[0].coords == pair[1].coords
        assert [device.core_on_chip for device in pair] == [0, 1]


@pytest.mark.parametrize(
    ("devices", "axes"),
    [
        (machine(4, 4), {"fsdp": 4, "tensor": 4}),
        (machine(4, 4, 8), {"data": 2, "fsdp": 8, "context": 4, "tensor": 2}),
        (machine(4, 4, 4, cores=2), {"pipe": 2, "fsdp": 16, "expert": 4}),
        (machine(16, 16, slices=2), {"data": 4, "fsdp": 32, "expert": 2, "tensor": 2}),
        (machine(2, 3), {"fsdp": 2, "tensor": 3}),
        (machine(1, 9), {"fsdp": 3, "tensor": 3}),
    ],
    ids=lambda value: f"{len(value)} devices" if isinstance(value, list) else str(value),
)
def test_every_device_has_one_place(devices, axes):
    config = MeshConfig(**{"data": 1, **axes})
    mesh = make_mesh(config, devices)
    assert sorted(device.id for device in mesh.devices.flat) == list(range(len(devices)))
    sizes = {**mesh.shape, "fsdp": math.prod(mesh.shape[axis] for axis in FSDP)}
    assert {axis: sizes[axis] for axis in config.axes} == config.sizes(len(devices))


def test_devices_that_fill_no_box_or_have_no_place_stand_in_one_line():
    corner = machine(2, 2)[:3]  # an L
    assert torus(corner).shape == (1, 3, 1, 1, 1)
    assert torus([object()] * 4).shape == (1, 4, 1, 1, 1)
    assert torus(machine(2, 3, 2, cores=2, slices=2)).shape == (2, 2, 3, 2, 2)
