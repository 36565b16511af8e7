"""TPU slices by name, as devices to compile for on a machine that has none. Knows no model, and runs nothing.

    topology_devices("v5e:16x16")            256 devices of one slice
    topology_devices("v5p:4x4x4", slices=2)  128 devices of two slices, joined by the data centre's network

The compiler is libtpu, which runs on any x86-64 Linux machine. A name may end in `*2`: so many slices.
"""

import dataclasses
import difflib
import functools
import importlib.util
import itertools
import math
import os
import re
from typing import Any

Shape = tuple[int, ...]

# Read by libtpu when it loads: which machine to believe in, no search for a real one, no log files, no lock.
ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What the slices of one kind of chip look like."""

    name: str
    hbm_gib: float  # of a device, that the compiler lets a program use
    shapes: tuple[Shape, ...]  # chips along each dimension of the torus
    devices_per_chip: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Some slices of one shape."""

    generation: Generation
    shape: Shape
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written: v5e:16x16, v5p:4x4x4*2."""
        return written(self.generation, self.shape) + (f"*{self.slices}" if self.slices > 1 else "")

    @property
    def num_devices(self) -> int:
        """jax devices in all slices."""
        return math.prod(self.shape) * self.generation.devices_per_chip * self.slices

    @property
    def hbm_bytes(self) -> int:
        """Bytes that a program may use on each device."""
        return int(self.generation.hbm_gib * 2**30)


def blocks(*small: Shape, largest: Shape) -> tuple[Shape, ...]:
    """Shapes of a three-dimensional torus: the small ones, and every block of whole 4x4x4 cubes up to the largest."""
    sides = range(4, max(largest) + 1, 4)
    cubes = itertools.combinations_with_replacement(sides, 3)
    fitting = [cube for cube in cubes if all(side <= most for side, most in zip(cube, largest, strict=True))]
    return (*small, *sorted(fitting, key=lambda cube: (math.prod(cube), cube)))


FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# HBM as libtpu 0.0.42 says it when a program is too large. docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} for the
# shapes; v5e's last two are larger than a pod: for rent are 256 chips, but the compiler takes them.
GENERATIONS = {
    row.name: row
    for row in (
        Generation(name="v5e", hbm_gib=15.75, shapes=(*FLAT, (16, 32), (32, 32))),
        Generation(name="v5p", hbm_gib=95.74, shapes=blocks(*SMALL, largest=(16, 16, 24))),
        Generation(name="v6e", hbm_gib=31.25, shapes=FLAT),
        Generation(name="tpu7x", hbm_gib=94.75, shapes=blocks(*SMALL, largest=(16, 16, 16)), devices_per_chip=2),
    )
}
ALIASES = {
    "v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e", "v7": "tpu7x", "v7x": "tpu7x", "7x": "tpu7x",
    "ironwood": "tpu7x", "trillium": "v6e",
}  # fmt: skip

# Slices that are one machine, where libtpu would see a machine for every 2x2 chips.
_ONE_HOST = {(1, 1): (1, 1, 1), (2, 4): (2, 4, 1), (1, 1, 1): (1, 1, 1)}


def find(name: str, slices: int = 1) -> Topology:
    """The topology of that name; ValueError with the nearest ones where there is none. Imports no jax."""
    bare, star, count = name.partition("*")
    if star:
        if slices > 1 or not re.fullmatch(r"[1-9]\d*", count):
            raise ValueError(f"topology {name}: say the number of slices once, as in {bare}*2 or --slices 2")
        slices = int(count)
    if slices < 1:
        raise ValueError(f"slices={slices} must be at least 1")
    kind, colon, text = bare.partition(":")
    generation = GENERATIONS.get(kind)
    if generation is None:
        raise ValueError(f"there is no topology {bare}; {_hint(bare)}")
    shape = tuple(int(side) for side in text.split("x")) if re.fullmatch(r"\d+(x\d+)+", text) else ()
    if shape not in generation.shapes:
        raise ValueError(f"there is no topology {bare}; the nearest are {', '.join(_nearest(generation, text))}")
    return Topology(generation=generation, shape=shape, slices=slices)


def written(generation: Generation, shape: Shape) -> str:
    """v5p and (4, 4, 8) -> v5p:4x4x8"""
    return f"{generation.name}:{'x'.join(map(str, shape))}"


def _hint(name: str) -> str:
    """What to ask for instead of a generation that is not here."""
    kind, rest = re.fullmatch(r"([^:\-]*)[:\-]?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if kind == "v4":
        near = ", ".join(_nearest(GENERATIONS["v5p"], rest))
        return f"libtpu describes a v4 chip as two devices, which no v4 slice shows; of those checked, near are {near}"
    if kind in ("v2", "v3"):
        return f"{kind} is not checked here; the oldest generation is v5e, e.g. v5e:16x16"
    if kind in GENERATIONS or kind in ALIASES:
        near = _nearest(GENERATIONS[ALIASES.get(kind, kind)], rest)
        return f"the nearest are {', '.join(near)}"
    near = difflib.get_close_matches(kind, GENERATIONS, n=1)
    examples = {written(row, row.shapes[len(SMALL)]): row for row in GENERATIONS.values()}
    known = ", ".join(example for example, row in examples.items() if not near or row.name in near)
    return f"names are a generation and its chips: {known}"


def _nearest(generation: Generation, text: str) -> list[str]:
    """Up to three shapes with a number of chips near the one asked for, in whatever way it was written."""
    sides = [int(side) for side in re.findall(r"\d+", text)]
    chips = max(math.prod(sides), 1)
    if len(sides) == 1 and generation.name == "v5p":
        chips = max(chips // 2, 1)  # v5p-128 counts TensorCores, two a chip
    distance = lambda shape: (  # noqa: E731
        sorted(shape) != sorted(sides),
        abs(math.log2(math.prod(shape) / chips)),
        sum(abs(a - b) for a, b in zip(sorted(shape), sorted(sides), strict=False)),
    )
    return [written(generation, shape) for shape in sorted(generation.shapes, key=distance)[:3]]


def prepare() -> None:
    """Set up this process for libtpu: it computes on the CPU and compiles for TPUs. Call it before jax has devices."""
    import jax

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")  # an installed libtpu would look for a chip, and complain


def topology_devices(name: str, slices: int = 1) -> tuple[Any, ...]:
    """Every device of some slices, in libtpu's order: to be compiled for, never to be run on.

    ValueError for a name that is none, OSError where libtpu is not installed.
    """
    return _devices(find(name, slices))


@functools.cache
def _devices(topology: Topology) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise OSError("compiling for TPUs needs libtpu, which is not installed: uv sync --group tpu")
    prepare()
    from jax.experimental import topologies

    one = written(topology.generation, topology.shape)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.shape in _ONE_HOST:
        options["chips_per_host_bounds"] = _ONE_HOST[topology.shape]
    try:
        devices = tuple(topologies.get_topology_desc(one, "tpu", **options).devices)
    except Exception as error:  # libtpu's own errors are of many kinds
        raise ValueError(f"libtpu does not describe {one}: {error}") from error
    assert len(devices) == topology.num_devices, f"{topology.name} has {len(devices)} devices"
    return devices
