"""Logical names bind to mesh axes; what can't be bound is refused by name."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from parallel.config import AxisRules, MeshConfig
from parallel.mesh import AXES, make_mesh
from parallel.sharding import einsum, place, sharding, spec, use

RULES = AxisRules()
MESH = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("embed", "heads", "head"), P("fsdp", "tensor", None)),
        (("layers", "ffn", "embed"), P(None, "tensor", "fsdp")),
        (("batch", "seq", "act_ffn"), P(("data", "fsdp"), None, "tensor")),
        (("batch", "residual_seq", "act_embed"), P(("data", "fsdp"), "tensor", None)),
        ((None,), P(None)),
    ],
)
def test_spec(names, expected):
    assert spec(names, RULES, MESH) == expected


def test_an_axis_splits_one_dim_only():
    with pytest.raises(ValueError, match=r"'tensor' would split both 'heads' and 'ffn'"):
        spec(("heads", "ffn"), RULES, MESH)


def test_an_unbound_name_is_refused():
    with pytest.raises(ValueError, match="no rule binds the logical name 'hedas'"):
        spec(("hedas",), RULES, MESH)


def test_a_dim_that_does_not_divide_is_refused_with_both_numbers():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(ValueError, match=r"'heads' of size 3 .* does not divide over 2 devices"):
        sharding(("embed", "heads", "head"), (8, 3, 4), mesh, RULES)


def test_place_constrains_under_a_layout_and_only_there():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = jnp.ones((4, 2, 6))

    def inside(x):
        with use(mesh, RULES):
            return place(x, ("batch", "seq", "act_ffn"))

    assert jax.jit(inside)(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
    assert place(x, ("batch", "seq", "act_ffn")) is x


def test_einsum_reduces_over_a_split_dim():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    h, w = jnp.arange(24.0).reshape(4, 1, 6), jnp.ones((6, 2))

    def inside(h, w):
        with use(mesh, RULES):
            return einsum("BTF,FD->BTD", place(h, ("batch", "seq", "act_ffn")), w, out=("batch", "seq", "act_embed"))

    assert jnp.array_equal(jax.jit(inside)(h, w), h @ w)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), {"data": 8}),
        (MeshConfig(data=2, fsdp=-1, tensor=2), {"data": 2, "fsdp": 2, "tensor": 2}),
        (MeshConfig(data=1, fsdp=4, tensor=2), {"fsdp": 4, "tensor": 2}),
    ],
)
def test_every_axis_always_exists(config, sizes):
    shape = dict(make_mesh(config).shape)
    assert tuple(shape) == AXES
    assert {axis: size for axis, size in shape.items() if size > 1} == sizes


@pytest.mark.parametrize("config", [MeshConfig(data=3, fsdp=-1), MeshConfig(data=2, fsdp=2)])
def test_a_mesh_of_another_size_is_refused(config):
    with pytest.raises(ValueError, match=r"asks for \d devices but 8 are here"):
        make_mesh(config)
