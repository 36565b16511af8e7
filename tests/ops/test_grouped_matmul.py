"""The grouped product on every kernel equals the one-hot einsum, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from ops import reference
from ops.grouped_matmul import _looped_outer, _looped_product, _ragged_outer, grouped_matmul, grouped_outer
from tests.tpu import tpu_devices


def arrays(rows, D, F, E, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((rows, D), (E, D, F), (rows, F))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnames="product")
def gradients(sizes, x, w, d_y, product):
    y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
    return y, *pull(d_y)


plain = functools.partial(grouped_matmul, kernel="plain")
pallas = functools.partial(grouped_matmul, kernel="pallas")


def compare(sizes, x, w, d_y, product, bound):
    sizes = jnp.asarray(sizes, jnp.int32)
    ours, theirs = gradients(sizes, x, w, d_y, product), gradients(sizes, x, w, d_y, reference.grouped_matmul)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=bound, atol=bound)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 27), min_size=4, max_size=4))
def test_plain(ends):
    """27 rows in blocks of 8; some groups empty, some of several blocks."""
    compare(np.diff(sorted(ends), prepend=0), *arrays(27, 3, 5, 4), plain, 1e-5)


def test_ragged_dot():
    """What other platforms take where the CPU loops."""
    x, w, y = arrays(27, 3, 5, 4)
    sizes = jnp.asarray([3, 0, 20, 1])
    np.testing.assert_allclose(_looped_product(x, w, sizes)[:24], jax.lax.ragged_dot(x, w, sizes)[:24], atol=1e-5)
    np.testing.assert_allclose(_looped_outer(x, y, sizes, w), _ragged_outer(x, y, sizes, w), atol=1e-5)


@pytest.mark.parametrize("sizes", [(20, 0, 12, 8), (0, 0, 0, 0), (40, 0, 0, 0), (0, 0, 1, 39)])
def test_pallas(sizes):
    """44 rows: more than a tile's 16, not a multiple of it, and a tail of no group."""
    with pltpu.force_tpu_interpret_mode():
        compare(sizes, *arrays(44, 128, 256, 4), pallas, 2e-4)


def test_pallas_in_bfloat16():
    with pltpu.force_tpu_interpret_mode():
        compare((3, 9), *arrays(16, 128, 128, 2, jnp.bfloat16), pallas, 0.06)


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

    def slow(y, w):
        return reference.grouped_matmul(y, w.swapaxes(1, 2), jnp.asarray([3, 4]))

    theirs = jax.grad(lambda y, w: jnp.sum(jnp.sin(slow(y, w))), argnums=(0, 1))(y, w)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_tiles_fit_into_vmem(topology, dtype):
    here = SingleDeviceSharding(tpu_devices(topology)[0])
    shapes = (1024, 2048), (4, 2048, 2048), (1024, 2048)
    x, w, d_y = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=here)
    compiled = gradients.lower(sizes, x, w, d_y, pallas).compile()
    assert compiled.as_text().count("tpu_custom_call") == 3  # y, d_x, d_w
