"""Paged attention on a mesh: each device's own heads together are one device's attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import paged_attention, paged_reference
from ops.ragged import Blocks, Ragged, quantized
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from parallel.paged_attention import attend, write
from parallel.sharding import use

Z, H, GROUPS = 8, 16, ((2, 1), (1, 4))


@pytest.mark.parametrize(
    ("K", "late"),
    [
        pytest.param(4, True, id="heads split, window known late"),
        pytest.param(1, False, id="heads that the mesh does not divide"),
    ],
)
def test_equals_one_device(K, late, monkeypatch):
    monkeypatch.setattr(paged_attention, "attend", functools.partial(paged_attention.attend, interpret=True))
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (6, 4, H))
    k, v = (Blocks(*quantized(jax.random.normal(key, (5, K, Z, H)))) for key in keys[1:])
    tables = [[1, 2], [3, 0], [4, 0]]
    rows = Ragged(*(jnp.asarray(x, jnp.int32) for x in (tables, [0, 1, 2], [1, 1, 3], [12, 5, 2])))
    window = jnp.int32(6) if late else 6
    knobs = {"groups": GROUPS, "scale": 0.3, "softcap": None}
    expected = paged_reference.attend(q, k, v, rows, window=window, **knobs)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])

    @jax.jit
    def on_mesh(q, k, v, rows):
        with use(mesh, AxisRules()):
            return attend(q, k, v, rows, window=window, **knobs)

    out = on_mesh(q, k, v, rows)
    assert out.sharding.shard_shape(out.shape) == (6, 4 if K == 1 else 2, H)
    np.testing.assert_allclose(out, expected, atol=1e-5)  # 13 terms of order one, each rounded by 2^-23


@pytest.mark.parametrize("scaled", [False, True], ids=["floats", "int8"])
def test_each_device_writes_its_own_heads(scaled):
    """As the plain twin, into rows of whole lanes: what is behind H and Z stays zero."""
    P, K, wide = 5, 4, 24
    empty = Blocks(
        jnp.zeros((P, K, Z, H), jnp.int8 if scaled else jnp.float32), jnp.zeros((P, K, Z)) if scaled else None
    )
    new = jax.random.normal(jax.random.key(0), (6, K, H))
    slots = jnp.asarray([8, 9, 10, 39, 0, 17], jnp.int32)
    expected = paged_reference.write(empty, new, slots)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])

    def widened(blocks):
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, wide - x.shape[-1])]), blocks)

    @jax.jit
    def on_mesh(blocks, new, slots):
        with use(mesh, AxisRules()):
            return write(blocks, new, slots)

    found = on_mesh(widened(empty), new, slots)
    assert found.values.sharding.shard_shape(found.values.shape) == (P, K // 2, Z, wide)
    jax.tree.map(np.testing.assert_array_equal, found, widened(expected))
