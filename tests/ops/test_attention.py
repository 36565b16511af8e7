"""Attention to own rows, to a cache and to keys in any order equals the reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import attention, reference
from ops.attention import HIDDEN, Places

B, T, N, K, H = 2, 140, 4, 2, 8  # T is no multiple of a block


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


SEGMENTS = jnp.asarray(np.repeat([[1, 0], [1, 2]], 70, axis=1), jnp.int32)
POSITIONS = jnp.asarray(np.tile(np.arange(70), (B, 2)), jnp.int32)


@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blocks_equal_the_reference(qkv, window, softcap):
    def fast(q, k, v):
        return attention.causal(q, k, v, SEGMENTS, window=window, scale=0.3, softcap=softcap)

    def slow(q, k, v):
        mask = reference.visible(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS, window=window)
        return reference.attention(q, k, v, mask, scale=0.3, softcap=softcap)

    def both(f):
        weighted = lambda *args: jnp.sum(jnp.sin(f(*args)))  # noqa: E731
        return jax.jit(lambda *args: (f(*args), jax.grad(weighted, (0, 1, 2))(*args)))(*qkv)

    for a, b in zip(jax.tree.leaves(both(fast)), jax.tree.leaves(both(slow)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5)


def test_a_window_known_late_equals_one_known_early(qkv):
    late = jax.jit(lambda w: attention.causal(*qkv, SEGMENTS, window=w, scale=0.3, softcap=None))
    early = attention.causal(*qkv, SEGMENTS, window=37, scale=0.3, softcap=None)
    np.testing.assert_allclose(late(jnp.int32(37)), early, atol=1e-6)


def test_a_query_depends_on_nothing_later_and_on_no_other_document(qkv):
    q, k, v = qkv

    def out(v):
        return attention.causal(q, k, v, SEGMENTS, window=None, scale=0.3, softcap=None)[1, 90].sum()

    touched = np.flatnonzero(np.abs(jax.grad(out)(v)[1]).sum((1, 2)))
    assert touched.tolist() == list(range(70, 91))


@pytest.mark.parametrize("window", [None, 5])
def test_cached_equals_the_reference(qkv, window):
    q, k, v = (x[:, :40] for x in qkv)
    positions = jnp.asarray([[7, 8, 9], [30, 31, 32]], jnp.int32)
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    fast = attention.cached(q[:, :3], heads_first(k), heads_first(v), positions, window=window, scale=0.3, softcap=None)
    slots, ones = jnp.tile(jnp.arange(40, dtype=jnp.int32)[None], (B, 1)), jnp.ones((B, 40), jnp.int32)
    mask = reference.visible(positions, slots, ones[:, :3], ones, window=window)
    np.testing.assert_allclose(fast, reference.attention(q[:, :3], k, v, mask, scale=0.3), atol=1e-6)


def shuffled(*arrays):
    order = np.random.default_rng(0).permutation(T)
    return [x[:, order] for x in arrays]


@pytest.mark.parametrize("rows", [512, 48])  # one block; three, of which the last is filled up
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (37, 2.0)])
def test_any_order_of_keys_equals_the_reference(qkv, monkeypatch, rows, window, softcap):
    monkeypatch.setattr(attention, "ROWS", rows)
    q, k, v = qkv
    k, v, positions, segments = shuffled(k, v, POSITIONS, SEGMENTS)
    at, k_at = Places(POSITIONS, SEGMENTS), Places(positions, segments)
    rule = {"window": window, "scale": 0.3, "softcap": softcap}

    @jax.jit
    def fast(q, k, v, d_out):
        out, lse = attention.forward(q, k, v, at, k_at, **rule)
        return out, attention.backward(q, k, v, out, lse, d_out, at, k_at, **rule)

    @jax.jit
    def slow(q, k, v, d_out):
        mask = reference.visible(POSITIONS, positions, SEGMENTS, segments, window=window)
        out, pull = jax.vjp(lambda *x: reference.attention(*x, mask, scale=0.3, softcap=softcap), q, k, v)
        return out, pull(d_out)

    d_out = jax.random.normal(jax.random.key(1), q.shape)
    for a, b in zip(*map(jax.tree.leaves, (fast(q, k, v, d_out), slow(q, k, v, d_out))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_parts_join_to_the_whole_and_a_part_that_is_not_seen_weighs_nothing(qkv):
    q, k, v = qkv
    at, rule = Places(POSITIONS, SEGMENTS), {"window": None, "scale": 0.3, "softcap": None}
    part = lambda keys: Places(*(x[:, keys] for x in at))  # noqa: E731
    first, second = slice(70), slice(70, T)
    forward = jax.jit(lambda k, v, k_at: attention.forward(q, k, v, at, k_at, **rule))
    out, lse = forward(k, v, at)
    parts = [forward(k[:, x], v[:, x], part(x)) for x in (first, second)]
    weights = [np.exp(np.swapaxes(x[1] - lse, 1, 2))[..., None] for x in parts]
    np.testing.assert_allclose(parts[0][0] * weights[0] + parts[1][0] * weights[1], out, atol=1e-6)
    out, lse = parts[1]  # no query of columns 0..70 sees these keys
    assert (out[:, :70] == 0).all()
    assert (lse[:, :, :70] == jnp.float32(HIDDEN)).all()
    backward = jax.jit(lambda k, v, d_out: attention.backward(q, k, v, out, lse, d_out, at, part(second), **rule))
    grads = backward(k[:, second], v[:, second], jnp.ones_like(q))
    assert all(jnp.isfinite(x).all() for x in grads)
    assert (grads[0][:, :70] == 0).all()
