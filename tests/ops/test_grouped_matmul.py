"""The grouped product on every kernel equals the one-hot einsum, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from ops import reference
from ops.grouped_matmul import grouped_matmul, grouped_outer


def arrays(rows, D, F, E, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((rows, D), (E, D, F), (rows, F))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def compare(sizes, x, w, d_y, kernel, bound):
    sizes = jnp.asarray(sizes, jnp.int32)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, kernel=kernel), x, w)
    expected, expected_pull = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, sizes), x, w)
    for ours, theirs in zip((y, *pull(d_y)), (expected, *expected_pull(d_y)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=bound, atol=bound)


@settings(max_examples=5, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), tail=st.integers(0, 5), D=st.integers(1, 5))
def test_plain(sizes, tail, D):
    compare(sizes, *arrays(max(sum(sizes) + tail, 1), D, 3, len(sizes)), "plain", 1e-5)


@pytest.mark.parametrize("sizes", [(20, 0, 12, 8), (0, 0, 0, 0), (40, 0, 0, 0), (0, 0, 1, 39)])
def test_pallas(sizes):
    """44 rows: more than a tile's 16, not a multiple of it, and a tail of no group."""
    with pltpu.force_tpu_interpret_mode():
        compare(sizes, *arrays(44, 128, 256, 4), "pallas", 2e-4)


def test_pallas_in_bfloat16():
    with pltpu.force_tpu_interpret_mode():
        compare((3, 9), *arrays(16, 128, 128, 2, jnp.bfloat16), "pallas", 0.06)


@pytest.mark.parametrize("kernel", ["plain", "pallas"])
def test_transposed_and_added(kernel):
    x, w, y = arrays(16, 128, 128, 2)
    sizes = jnp.asarray([5, 8])
    with pltpu.force_tpu_interpret_mode():
        back = grouped_matmul(y, w, sizes, kernel=kernel, transposed=True)
        total = grouped_outer(x, y, sizes, jnp.ones_like(w), kernel=kernel)
    np.testing.assert_allclose(back, reference.grouped_matmul(y, w.swapaxes(1, 2), sizes), atol=1e-4)
    expected = [1 + x[:5].T @ y[:5], 1 + x[5:13].T @ y[5:13]]
    np.testing.assert_allclose(total, jnp.stack(expected), atol=1e-4)


def test_both_directions_differentiate():
    x, w, y = arrays(8, 3, 4, 2)
    product = functools.partial(grouped_matmul, sizes=jnp.asarray([3, 4]), kernel="plain", transposed=True)
    ours = jax.grad(lambda y, w: jnp.sum(jnp.sin(product(y, w))), argnums=(0, 1))(y, w)
    slow = lambda y, w: reference.grouped_matmul(y, w.swapaxes(1, 2), jnp.asarray([3, 4]))
    theirs = jax.grad(lambda y, w: jnp.sum(jnp.sin(slow(y, w))), argnums=(0, 1))(y, w)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
