"""A weight in slabs multiplies and looks up as the array that it was cut from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.slabs import slabs

KEY = jax.random.key(0)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "summed"),
    [
        ("BTD,DNH->BTNH", (2, 3, 8), (8, 5, 2), (0,)),
        ("BTNH,NHD->BTD", (2, 3, 5, 2), (5, 2, 8), (0, 1)),
        ("BTD,DF->BTF", (2, 3, 8), (8, 7), (0,)),
        ("BTD,VD->BTV", (2, 3, 8), (11, 8), (1,)),
    ],
)
def test_products(equation, x_shape, w_shape, summed, num_parts):
    x, w = jax.random.normal(KEY, x_shape), jax.random.normal(KEY, w_shape)
    np.testing.assert_allclose(
        slabs(w, summed, num_parts).einsum(equation, x), jnp.einsum(equation, x, w), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_look_up(num_parts):
    table, ids = jax.random.normal(KEY, (11, 4)), jnp.asarray([[0, 5, 10], [3, 4, 7]])
    np.testing.assert_array_equal(slabs(table, (1,), num_parts).take(ids), table[ids])
