"""Initial parameters: the same on every mesh, split as their names say, of the spread that keeps activations even."""

import functools

import jax
import numpy as np
import pytest

from model.parameters import abstract, initialize, shardings, summed_dims, unrolled
from model.weights import leaves
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from tests.model.test_decoder import LEARNED, MIXED, MIXTURE, PLAIN

RULES = AxisRules()


@functools.cache
def initial(mesh_config, num_devices=8):
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    return initialize(PLAIN, mesh, RULES, key=jax.random.key(1))


def test_every_mesh_begins_with_the_same_bits():
    one = initial(MeshConfig(), 1)
    for mesh_config in (MeshConfig(fsdp=8, data=1), MeshConfig(data=2, fsdp=2, tensor=2)):
        many = initial(mesh_config)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            np.testing.assert_array_equal(a, b)


def test_parameters_are_split_as_their_names_say():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = dict(leaves(shardings(PLAIN, mesh, RULES)))
    shapes = dict(leaves(abstract(PLAIN).shapes))
    held = {path: split[path].shard_shape(shapes[path].shape) for path in shapes}
    assert held["embedding.tokens"] == (20, 8)  # V over tensor, D over fsdp
    assert held["layers.attention.q"] == (3, 8, 2, 8)  # L whole, D over fsdp, N over tensor
    assert held["layers.ffn.down"] == (3, 12, 8)  # F over tensor, D over fsdp
    assert held["norm.scale"] == (16,)


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"'heads' of size 2 .* does not divide over 8 devices"):
        shardings(PLAIN, make_mesh(MeshConfig(data=1, tensor=8)), RULES)


@pytest.mark.parametrize("config", [PLAIN, MIXED, LEARNED, MIXTURE], ids=["plain", "mixed", "learned", "mixture"])
def test_layers_apart_have_the_leaves_of_their_own_config(config):
    parameters = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract(config).shapes)
    apart, split = unrolled(config, parameters)
    assert not apart.scan_layers
    expected = {path: leaf.shape for path, leaf in leaves(abstract(apart).shapes)}
    assert {path: leaf.shape for path, leaf in leaves(split)} == expected
    assert unrolled(apart, split) == (apart, split)


def test_initial_spread_is_one_over_the_root_of_the_inputs():
    parameters = dict(leaves(initial(MeshConfig(), 1)))
    spread = {path: float(np.std(leaf)) / PLAIN.init_scale for path, leaf in parameters.items()}
    assert spread["layers.ffn.up"] == pytest.approx(16**-0.5, rel=0.1)
    assert spread["layers.attention.q"] == pytest.approx(16**-0.5, rel=0.1)
    assert spread["layers.ffn.down"] == pytest.approx(24**-0.5 * 6**-0.5, rel=0.1)  # and of twice the depth
    up = np.asarray(parameters["layers.ffn.up"])
    assert not np.array_equal(up[0], up[1])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("layers", "embed", "heads", "head"), (1,)),
        (("heads", "head", "embed"), (0, 1)),
        (("vocab", "embed"), (1,)),
        (("embed", "rank"), (0,)),
        (("rank", "heads", "head"), (0,)),
        (("layers", "experts", "expert_embed", "expert_ffn"), (2,)),
        (("experts", "expert_ffn", "expert_embed"), (1,)),
        (("embed", None), None),
        (("layers", "heads", "head"), None),
        (("ffn",), None),
    ],
)
def test_a_product_sums_over_its_inputs(names, expected):
    assert summed_dims(names) == expected
