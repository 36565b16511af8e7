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
from parallel.paged_attention import attend
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
