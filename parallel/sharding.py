"""Logical names to shardings: the one place where "heads" becomes a mesh axis. Knows no model.

A layout (mesh and rules) is ambient while a function is traced: `with use(mesh, rules):` inside the jitted function.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ops.slabs import Slabs
from parallel.config import AxisRules, MeshAxes

Names = tuple[str | None, ...]

_LAYOUT: contextvars.ContextVar[tuple[Mesh, AxisRules] | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """Make `mesh` and `rules` the layout of everything traced inside."""
    token = _LAYOUT.set((mesh, rules))
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def manual_axes(name: str) -> tuple[str, ...]:
    """Mesh axes of size > 1 bound to a logical name inside a shard_map over the mesh, else none."""
    return ()


def _axes(bound: MeshAxes) -> tuple[str, ...]:
    return () if bound is None else (bound,) if isinstance(bound, str) else bound


def spec(names: Names, rules: AxisRules) -> P:
    """Partition of an array whose dims have these logical names.

        spec(("embed", "heads", "head"), AxisRules()) == P("fsdp", "tensor", None)

    Raises ValueError for a name that no rule binds, or a mesh axis that would split two dims.
    """
    known = {field.name for field in dataclasses.fields(rules)}
    used: dict[str, str] = {}
    entries = []
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"no rule binds the logical name {name!r}; AxisRules has {sorted(known)}")
        axes = () if name is None else _axes(getattr(rules, name))
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"mesh axis {axis!r} would split both {used[axis]!r} and {name!r} of one array {names}; "
                    "bind one of the two rules to another axis or to none"
                )
            used[axis] = name or ""
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return P(*entries)


def sharding(names: Names, shape: tuple[int, ...], mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """Sharding of a parameter; raises ValueError where the mesh does not divide a dim."""
    partition = spec(names, rules)
    for name, dim, bound in zip(names, shape, partition, strict=True):
        parts = 1
        for axis in _axes(bound):
            parts *= mesh.shape[axis]
        if dim % parts:
            raise ValueError(
                f"dim {name!r} of size {dim} (shape {shape}) does not divide over {parts} devices of mesh axis "
                f"{bound!r}; make {parts} a divisor of {dim}, or set rules.{name}=none"
            )
    return NamedSharding(mesh, partition)


def place(x: Array, names: Names) -> Array:
    """Constrain an activation to the ambient layout; without one, or on one device, it is left alone."""
    layout = _LAYOUT.get()
    if layout is None or layout[0].size == 1:
        return x
    mesh, rules = layout
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, rules)))


def einsum(equation: str, x: Float[Array, "..."], w: Float[Array, "..."] | Slabs, *, out: Names) -> Float[Array, "..."]:
    """`jnp.einsum` with the weight cast to the activation's type and the result's layout named.

    A contraction over a split dim leaves partial sums; `out` says where they are reduced.
    """
    w = w.astype(x.dtype)
    return place(w.einsum(equation, x) if isinstance(w, Slabs) else jnp.einsum(equation, x, w), out)
