"""Experts on one device and on many give what every token through every expert gives, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from model.experts import Execution, Weights, apply_experts
from ops import reference

E, A, D, F, TOKENS = 8, 2, 4, 6, 32
HOW = Execution(E, "silu", (), 1.25, "plain", "float32")


def inputs(seed, skewed=False):
    """x, gates, chosen, weights, and d_y; 3 tokens are padding. Skewed: all choose experts 2 and 3."""
    keys = jax.random.split(jax.random.key(seed), 7)
    shapes = ((TOKENS, D), (TOKENS, A), (E, D, F), (E, D, F), (E, F, D), (TOKENS, D))
    x, gates, gate, up, down, d_y = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    chosen = jax.lax.top_k(jax.random.normal(keys[6], (TOKENS, E)), A)[1]
    chosen = jnp.full_like(chosen, 2) + jnp.arange(A)[None] if skewed else chosen
    return x, gates, chosen.at[-3:].set(E), Weights(gate, up, down), d_y


@jax.jit
def slow(x, gates, chosen, weights, d_y):
    def twin(x, gates, weights):
        return reference.mixture(x, gates, chosen, *weights, activation=jax.nn.silu)

    y, pull = jax.vjp(twin, x, gates, weights)
    return y, pull(d_y)


@functools.partial(jax.jit, static_argnums=0)
def gradients(how, x, gates, chosen, weights, d_y):
    y, pull = jax.vjp(lambda x, gates, weights: apply_experts(how, x, gates, chosen, weights), x, gates, weights)
    return y, pull(d_y)


@functools.cache
def on_mesh(data, expert, tensor, accumulate="float32"):
    """`gradients` with tokens over data and expert, experts over expert, F over tensor."""
    mesh = Mesh(np.array(jax.devices()[: data * expert * tensor]).reshape(data, expert, tensor), ("d", "e", "t"))
    how = HOW._replace(axes=("e",), accumulate=accumulate)

    def inside(x, gates, chosen, weights, d_y):
        y, (d_x, d_gates, d_weights) = gradients(how, x, gates, chosen, weights, d_y)
        y, d_x, d_gates = jax.lax.psum((y, d_x, d_gates), "t")
        return y, (d_x, d_gates, jax.lax.psum(d_weights, "d"))

    tokens, weights = P(("d", "e")), Weights(P("e", None, "t"), P("e", None, "t"), P("e", "t"))
    return jax.jit(
        jax.shard_map(
            inside,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, weights, tokens),
            out_specs=(tokens, (tokens, tokens, weights)),
            check_vma=False,
        )
    )


def assert_equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), skewed=st.booleans())
def test_one_device(seed, skewed):
    args = inputs(seed, skewed)
    assert_equal(gradients(HOW, *args), slow(*args))


@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, 8, 1), (2, 2, 2)])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), skewed=st.booleans())
def test_many_devices(mesh, seed, skewed):
    args = inputs(seed, skewed)
    assert_equal(on_mesh(*mesh)(*args), slow(*args))


def test_gradients_can_add_up_in_the_weights_type():
    args = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 3 else x, inputs(0, skewed=True))
    x, gates, chosen, weights, d_y = args
    narrow = x.astype(jnp.bfloat16), gates, chosen, weights, d_y.astype(jnp.bfloat16)
    exact = on_mesh(1, 8, 1)(*narrow)[1][2]
    rounded = on_mesh(1, 8, 1, "weight")(*narrow)[1][2]
    for a, b in zip(exact, rounded, strict=True):  # 3 rounds: two more roundings of 2**-9 of a partial sum
        assert a.dtype == b.dtype == jnp.bfloat16
        bound = 3 * 2**-9 * float(jnp.max(jnp.abs(a.astype(jnp.float32))))
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=bound)


def test_under_remat_no_exchange_runs_twice():
    mesh = Mesh(np.array(jax.devices()), ("e",))

    def loss(x, gates, chosen, weights):
        layer = jax.checkpoint(lambda *args: x + apply_experts(HOW._replace(axes=("e",)), *args))
        return jnp.sum(jnp.sin(layer(x, gates, chosen, weights)))

    spread = jax.shard_map(
        jax.grad(loss, argnums=(0, 1, 3)),
        mesh=mesh,
        in_specs=P("e"),
        out_specs=(P("e"), P("e"), P("e")),
        check_vma=False,
    )
    text = jax.jit(spread).lower(*inputs(0)[:4]).as_text()
    moved = [line for line in text.splitlines() if "all_to_all" in line]
    assert sum(f"x{D}xf32>" in line.split("->")[-1] for line in moved) == 2 + 3  # tokens
    assert len(moved) == 5 + 3  # gates there twice, their gradients back
