"""Logical names to shardings and to collectives: the one place where "heads" becomes a mesh axis. Knows no model.

A layout (mesh and rules) is ambient while a function is traced: `with use(mesh, rules):` inside the jitted function.
Under it the same model code runs in two ways. *Automatic*: arrays are whole, names become constraints, XLA finds the
communication (initialisation, inference). *Manual*, inside `shard_map`: arrays are one device's part, and the functions
here are the collectives (training). What is differentiated there is the sum of all devices' shares of the loss; every
collective is a linear map of all devices' numbers, and its derivative is that map transposed: a gather's is a
reduce-scatter, a sum's a sum.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num, Shaped

from ops.quantize import Quantized
from ops.slabs import Slabs
from parallel.config import AxisRules, MeshAxes
from parallel.mesh import FSDP

Names = tuple[str | None, ...]
Held = Slabs | Quantized  # weights that are no single array and multiply themselves
SMALL = 2**24  # bytes of a parameter
FEW = 4  # devices over which a reduce-scatter is better sent directly


class Layout(NamedTuple):
    """What names mean while a function is traced."""

    mesh: Mesh
    rules: AxisRules
    is_manual: bool


_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: AxisRules, *, manual: bool = False) -> Iterator[None]:
    """Make `mesh` and `rules` the layout of everything traced inside; `manual` inside a shard_map over all axes."""
    token = _LAYOUT.set(Layout(mesh, rules, manual))
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def _manual() -> Layout | None:
    """The ambient layout where it is a manual one."""
    layout = _LAYOUT.get()
    return layout if layout is not None and layout.is_manual else None


def axes_of(bound: MeshAxes) -> tuple[str, ...]:
    """The axes of the mesh itself, each once: `fsdp` is three of them."""
    named = () if bound is None else (bound,) if isinstance(bound, str) else bound
    return tuple(dict.fromkeys(part for axis in named for part in (FSDP if axis == "fsdp" else (axis,))))


def spec(names: Names, rules: AxisRules, mesh: Mesh) -> P:
    """Partition of an array whose dims have these logical names, over the axes of `mesh` that are larger than 1.

        spec(("embed", "heads", "head"), AxisRules(), mesh of fsdp=4, tensor=2) == P("fsdp", "tensor", None)

    Raises ValueError for a name that no rule binds, or a mesh axis that would split two dims.
    """
    known = {field.name for field in dataclasses.fields(rules)}
    used: dict[str, str] = {}
    entries = []
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"no rule binds the logical name {name!r}; AxisRules has {sorted(known)}")
        axes = () if name is None else axes_of(getattr(rules, name))
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"mesh axis {axis!r} would split both {used[axis]!r} and {name!r} of one array {names}; "
                    "bind one of the two rules to another axis or to none"
                )
            used[axis] = name or ""
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return P(*entries)


def sharding(names: Names, shape: tuple[int, ...], mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """Sharding of a parameter; raises ValueError where the mesh does not divide a dim."""
    partition = spec(names, rules, mesh)
    for name, dim, bound in zip(names, shape, partition, strict=True):
        parts = math.prod(mesh.shape[axis] for axis in axes_of(bound))
        if dim % parts:
            raise ValueError(
                f"dim {name!r} of size {dim} (shape {shape}) does not divide over {parts} devices of mesh axis "
                f"{bound!r}; make {parts} a divisor of {dim}, or set rules.{name}=none"
            )
    return NamedSharding(mesh, partition)


def fitting(names: Names, shape: tuple[int, ...], mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """Sharding of an array whose dims stay whole where the mesh does not divide them."""
    bound = zip(spec(names, rules, mesh), shape, strict=True)
    entries = [
        axes if size % math.prod(mesh.shape[axis] for axis in axes_of(axes)) == 0 else None for axes, size in bound
    ]
    return NamedSharding(mesh, P(*entries))


def located(shapes: Any, shardings: Any) -> Any:
    """A tree of arrays without their numbers, but with their places."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


# Automatic


def place(x: Shaped[Array, "..."], names: Names) -> Shaped[Array, "..."]:
    """Constrain an activation to the ambient automatic layout; otherwise, or on one device, it is left alone.

    A dim that its axes do not divide (one token decoded, not split over T) stays whole.
    """
    layout = _LAYOUT.get()
    if layout is None or layout.is_manual or layout.mesh.size == 1:
        return x
    mesh, rules, _ = layout
    return jax.lax.with_sharding_constraint(x, fitting(names, x.shape, mesh, rules))


def divides(name: str, size: int) -> bool:
    """Whether the ambient automatic layout splits a dim of this name and size evenly."""
    layout = _LAYOUT.get()
    return (
        layout is not None
        and size % math.prod(layout.mesh.shape[axis] for axis in axes_of(getattr(layout.rules, name))) == 0
    )


def by_device(function: Callable[..., Any], arguments: tuple[Any, ...], names: tuple[Names, ...], *, out: Names) -> Any:
    """Call a function on every device with its parts of the arguments: one that XLA cannot split, such as a kernel.

    `names` are of each argument's first dims, or of those of all arrays in it. On one device it is simply called.
    """
    layout = _LAYOUT.get()
    if layout is None or layout.is_manual or layout.mesh.size == 1:
        return function(*arguments)
    mesh, rules, _ = layout
    *parts, result = (spec(one, rules, mesh) for one in (*names, out))
    split = jax.shard_map(function, mesh=mesh, in_specs=tuple(parts), out_specs=result, check_vma=False)
    return split(*arguments)


# Both


def einsum(
    equation: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."] | Held,
    *,
    out: Names,
    sums: str | None = None,
    product: Callable = jnp.einsum,
) -> Float[Array, "..."]:
    """An einsum with the weight cast to the activation's type and the result's layout named.

    `sums` is the logical name of a summed dim that the mesh may split: the partial sums are added up here, and where
    `out` splits a dim over the same axis, each device gets its part alone (a reduce-scatter).
    `product`, of einsum's signature, is what training multiplies with; inference multiplies as it is written.
    """
    multiply = product if _manual() else jnp.einsum
    y = w.einsum(equation, x) if isinstance(w, Held) else multiply(equation, x, w.astype(x.dtype))
    return place(y, out) if sums is None else added(y, sums, out)


def added(x: Float[Array, "..."], sums: str, out: Names) -> Float[Array, "..."]:
    """Partial sums over the devices that split the name `sums`, added up and laid out as `out`."""
    layout, axes = _manual(), manual_axes(sums)
    if layout is None or not axes:
        return relaid(x, tuple("seq" if name == "residual_seq" else name for name in out), out)
    partition = spec(out, layout.rules, layout.mesh)
    for axis in axes:
        dims = [dim for dim, bound in enumerate(partition) if axis in axes_of(bound)]
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dims[0], tiled=True) if dims else jax.lax.psum(x, axis)
    return x


def relaid(x: Num[Array, "..."], was: Names, now: Names) -> Num[Array, "..."]:
    """An activation laid out as `was` becomes one laid out as `now`: gathered over axes that go, cut by new ones."""
    layout = _manual()
    if layout is None:
        return place(x, now)
    pairs = zip(spec(was, layout.rules, layout.mesh), spec(now, layout.rules, layout.mesh), strict=True)
    for dim, (old, new) in enumerate(pairs):
        old, new = axes_of(old), axes_of(new)
        shared = old[: len(new)] if old[: len(new)] == new else new[: len(old)]
        assert shared in (old, new), f"{was} -> {now}: dim {dim} would have to be reordered"
        for axis in reversed(old[len(shared) :]):
            x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
        for axis in new[len(shared) :]:
            size = x.shape[dim] // layout.mesh.shape[axis]
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, dim)
    return x


# Manual


def manual_axes(*names: str) -> tuple[str, ...]:
    """The mesh axes, larger than 1, that split these logical names in a manual layout; none elsewhere."""
    layout = _manual()
    if layout is None:
        return ()
    axes = dict.fromkeys(axis for name in names for axis in axes_of(getattr(layout.rules, name)))
    return tuple(axis for axis in axes if layout.mesh.shape[axis] > 1)


def num_parts(axes: tuple[str, ...]) -> int:
    """Devices along these mesh axes."""
    layout = _LAYOUT.get()
    return 1 if layout is None else math.prod(layout.mesh.shape[axis] for axis in axes)


def num_copies() -> int:
    """How many devices hold the same tokens: each takes that part of a sum over tokens as its own."""
    layout = _manual()
    if layout is None:
        return 1
    return layout.mesh.size // num_parts(manual_axes("batch", "seq"))


def part_index(axes: tuple[str, ...]) -> Int[Array, ""]:
    """Which part of a dim that these axes split is this device's."""
    index = jnp.int32(0)
    for axis in axes:
        index = index * num_parts((axis,)) + jax.lax.axis_index(axis)
    return index


def everywhere() -> tuple[str, ...]:
    """All mesh axes larger than 1 of a manual layout."""
    layout = _manual()
    if layout is None:
        return ()
    return tuple(axis for axis, size in layout.mesh.shape.items() if size > 1)


def whole(w: Float[Array, "..."], names: Names) -> Float[Array, "..."]:
    """A parameter gathered over the axes that split tokens, too: each device needs all of it for its own tokens.

    Experts stay where they are: their tokens come to them. The gradient is reduced and scattered the same way back.
    """
    for dim, name in enumerate(names):
        if name not in (None, "experts") and (axes := token_axes(name)):
            w = _gathered(w, axes, dim)
    return w


def token_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that split both a dim of parameters and the tokens."""
    return tuple(axis for axis in manual_axes(name) if axis in manual_axes("batch", "seq"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w: Float[Array, "..."], axes: tuple[str, ...], dim: int) -> Float[Array, "..."]:
    """All-gather along `dim`, over two mesh axes at a time: of three at once XLA makes all-reduces.

    Over one at a time where the whole is small, of which it makes all-reduces even over two.
    """
    together = 2 if w.nbytes * num_parts(axes) >= SMALL else 1
    for end in range(len(axes), 0, -together):
        w = jax.lax.all_gather(w, axes[max(end - together, 0) : end], axis=dim, tiled=True)
    return w


def _gathered_forward(w, axes, dim):
    return _gathered(w, axes, dim), None


def _gathered_backward(axes, dim, _, grad):
    """A reduce-scatter for each axis, so that each is one ring of the torus."""
    for axis in axes:
        grad = scattered(grad, axis, dim)
    return (grad,)


def scattered(x: Float[Array, "..."], axis: str, dim: int) -> Float[Array, "..."]:
    """The sum over a mesh axis, each device its part of `dim`: a reduce-scatter.

    Over few devices by an all-to-all and a sum at home, in float32: XLA makes a padded all-reduce of a reduce-scatter
    over 4. As many bytes are sent; around a ring of 4 they take 4 hops instead of 3 (docs/design/fsdp.md).
    """
    size = num_parts((axis,))
    if size > FEW:
        return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    parts = jax.lax.all_to_all(x, axis, split_axis=dim, concat_axis=dim, tiled=True)
    parts = parts.reshape(*x.shape[:dim], size, -1, *x.shape[dim + 1 :])
    return jnp.sum(parts, axis=dim, dtype=jnp.float32).astype(x.dtype)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def summed_gradient(grad: Float[Array, "..."], names: Names) -> Float[Array, "..."]:
    """A parameter's gradient, added up over all devices that hold the same part of the parameter."""
    held = manual_axes(*(name for name in names if name is not None))
    axes = tuple(axis for axis in everywhere() if axis not in held)
    return jax.lax.psum(grad, axes) if axes else grad
