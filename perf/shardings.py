"""How each tensor of a run's state is split over a mesh, and which are whole by accident. Compiles nothing."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from model.parameters import abstract
from parallel.checkpoint import named
from parallel.config import AxisRules
from parallel.mesh import called, mesh_sizes
from parallel.sharding import Names, sharding
from perf.aot import Work, train_state
from perf.memory import leaf_bytes

LARGE = 2**20  # bytes on a device from which a whole tensor is worth a word


class Row(NamedTuple):
    """One tensor."""

    path: str  # parameters.layers.ffn.up
    names: Names  # logical; () for what belongs to no parameter
    shape: tuple[int, ...]
    type: str
    spec: tuple[str, ...]  # mesh axes of each dim, "" where it is whole: ("", "fsdp", "tensor")
    bytes: int  # on one device
    flag: str  # what is wrong with it, or ""


def report(work: Work, mesh: Mesh, *, large: int = LARGE) -> list[Row]:
    """Every tensor of a train state."""
    steps, shapes = train_state(work, mesh)
    leaves, places = named(shapes), jax.tree.leaves(steps.state)
    names = _names_by_path(work)
    rows = []
    for (path, leaf), where in zip(leaves.items(), places, strict=True):
        owner = next((own for own in names if path == own or path.endswith(f".{own}")), "")
        mine = names[owner] if owner and len(names[owner]) == len(leaf.shape) else ()
        spec = _spec(where.spec, len(leaf.shape))
        rows.append(Row(path, mine, leaf.shape, str(leaf.dtype), spec, _bytes(leaf, where), ""))
    return flagged(rows, mesh, work.rules, large=large)


def _names_by_path(work: Work) -> dict[str, Names]:
    """Logical names of each parameter by its dotted path, the longest path first."""
    paths = jax.tree.leaves_with_path(abstract(work.model).names, is_leaf=lambda leaf: isinstance(leaf, tuple))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): names for path, names in paths}
    return dict(sorted(found.items(), key=lambda row: -len(row[0])))


def _bytes(leaf: Any, where: Any) -> int:
    return leaf.size * leaf.dtype.itemsize if jnp.issubdtype(leaf.dtype, jnp.uint32) else leaf_bytes(leaf, where)


def _spec(spec: Any, num_dims: int) -> tuple[str, ...]:
    """Mesh axes of each dim as the config calls them."""
    entries = [*spec, *[None] * (num_dims - len(spec))]
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    return tuple(",".join(dict.fromkeys(called(axis) for axis in some)) for some in axes)


def flagged(rows: list[Row], mesh: Mesh, rules: AxisRules, *, large: int) -> list[Row]:
    """The rows, with a word where a large tensor is whole over an axis that could split it.

    `data` repeats parameters by design. An axis that splits nothing but layers (pipe) says nothing of a tensor
    without layers.
    """
    splitting = {axis for row in rows for axis in used(row, layers=False)}
    anywhere = {axis for row in rows for axis in used(row)}
    return [row._replace(flag=_flag(row, mesh_sizes(mesh), splitting, anywhere, mesh, rules, large)) for row in rows]


def used(row: Row, *, layers: bool = True) -> set[str]:
    """Mesh axes that split a tensor, those of its layers left out if asked."""
    names = row.names or (None,) * len(row.spec)
    return {
        axis
        for name, axes in zip(names, row.spec, strict=True)
        for axis in axes.split(",")
        if axis and (layers or name != "layers")
    }


def _flag(row: Row, devices: dict[str, int], splitting: set, anywhere: set, mesh: Mesh, rules, large: int) -> str:
    if row.bytes < large or sum(dim > 1 for dim in row.shape) < 2:
        return ""
    for axis, size in devices.items():
        if size == 1 or axis == "data" or axis in used(row):
            continue
        told = [name for name in row.names if name and axis in _bound(name, mesh, rules)]
        if told:
            return f"whole over {axis}={size}, although rules.{told[0]} splits it: its place does not follow its names"
        if axis in splitting and any(dim % size == 0 for dim in row.shape):
            return f"whole over {axis}={size}, which splits other tensors; none of its names is bound to {axis}"
        if axis not in anywhere:
            return f"whole over {axis}={size}, which splits no tensor; bind a rule to {axis} or give mesh.{axis}=1"
    return ""


def _bound(name: str, mesh: Mesh, rules: AxisRules) -> set[str]:
    """The axes, as the config calls them, that a logical name is split by."""
    spec = sharding((name,), (math.prod(mesh.shape.values()),), mesh, rules).spec
    return set(",".join(_spec(spec, 1)).split(",")) - {""}


def plain(row: Row) -> dict[str, Any]:
    """A row for JSON."""
    return {**row._asdict(), "names": list(row.names), "shape": list(row.shape), "spec": list(row.spec)}


def total(rows: list[Row]) -> int:
    """Bytes of the state on one device."""
    return sum(row.bytes for row in rows)
