"""Norms, rotary positions and the FFN, each against its formula in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import RopeScaling
from model.layers import Embedding, FeedForward, Norm, rope, rope_frequencies
from tests.model.test_decoder import LEARNED, PLAIN

PLAINLY = RopeScaling()


def random(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def with_values(module, **values):
    for name, value in values.items():
        getattr(module, name)[...] = jnp.asarray(value)
    return module


def test_norms_follow_their_formulas():
    x, scale, bias = random(2, 3, 16), random(16), random(16) / 2
    root = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    rms = with_values(Norm(PLAIN, 16), scale=scale)
    np.testing.assert_allclose(rms(jnp.asarray(x)), x / root * scale, rtol=1e-5, atol=1e-5)
    offset = with_values(Norm(dataclasses.replace(PLAIN, norm_zero_centered=True), 16), scale=scale)
    np.testing.assert_allclose(offset(jnp.asarray(x)), x / root * (1 + scale), rtol=1e-5, atol=1e-5)
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt(centred.var(-1, keepdims=True) + 1e-6)
    layer = with_values(Norm(LEARNED, 16), scale=scale, bias=bias)
    np.testing.assert_allclose(layer(jnp.asarray(x)), centred / spread * scale + bias, rtol=1e-5, atol=1e-5)


def test_initial_norms_leave_a_normalised_vector_alone():
    x = random(1, 1, 16)
    x /= np.sqrt((x**2).mean())
    for config in (PLAIN, dataclasses.replace(PLAIN, norm_zero_centered=True)):
        np.testing.assert_allclose(Norm(config, 16)(jnp.asarray(x)), x, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("gelu", lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("relu_squared", lambda x: np.maximum(x, 0) ** 2),
    ],
)
def test_ffn_follows_its_formula(name, formula):
    x = random(2, 3, 16)
    gated = FeedForward(dataclasses.replace(PLAIN, activation=name), jax.random.key(0))
    up, gate, down = (np.asarray(w[...]) for w in (gated.up, gated.gate, gated.down))
    np.testing.assert_allclose(gated(jnp.asarray(x)), (formula(x @ gate) * (x @ up)) @ down, rtol=1e-4, atol=1e-5)
    biased = dataclasses.replace(PLAIN, activation=name, gated=False, ffn_bias=True)
    bare = with_values(FeedForward(biased, jax.random.key(0)), up_bias=random(24), down_bias=random(16))
    up, down = np.asarray(bare.up[...]), np.asarray(bare.down[...])
    expected = formula(x @ up + random(24)) @ down + random(16)
    np.testing.assert_allclose(bare(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_are_scaled_and_placed():
    tokens, positions = jnp.asarray([[3, 7]], jnp.int32), jnp.asarray([[0, 5]], jnp.int32)
    plain, scaled = (
        Embedding(PLAIN, jax.random.key(0)),
        Embedding(dataclasses.replace(PLAIN, embed_scale=True), jax.random.key(0)),
    )
    np.testing.assert_allclose(scaled(tokens, positions), plain(tokens, positions) * 4.0, rtol=1e-6)  # sqrt(16)
    learned = Embedding(LEARNED, jax.random.key(0))
    expected = learned.tokens[...][tokens] + learned.positions[...][positions]
    np.testing.assert_allclose(learned(tokens, positions), expected, rtol=1e-6)


def turned(x, position, scaling=PLAINLY):
    positions = jnp.full((1, 1), position, jnp.int32)
    return np.asarray(rope(positions, x.shape[-1], 1e4, scaling).turn(jnp.asarray(x)[None, None, None]))[0, 0, 0]


def test_rotary_products_depend_on_the_distance_alone():
    q, k = random(8), random(2, 8)[1]
    assert turned(q, 5) @ turned(k, 2) == pytest.approx(turned(q, 103) @ turned(k, 100), rel=1e-4)
    assert turned(q, 5) @ turned(k, 2) != pytest.approx(turned(q, 5) @ turned(k, 3), rel=1e-2)
    assert np.linalg.norm(turned(q, 77)) == pytest.approx(np.linalg.norm(q), rel=1e-5)
    np.testing.assert_array_equal(turned(q, 0), q)


def test_dim_h_turns_with_dim_h_plus_half():
    first = turned(np.eye(8, dtype=np.float32)[1], 3)  # pair 1 of 4: angle 3 * theta ** (-2/8)
    angle = 3 * 1e4 ** (-2 / 8)
    np.testing.assert_allclose(first, [0, math.cos(angle), 0, 0, 0, math.sin(angle), 0, 0], atol=1e-6)


def test_linear_scaling_is_a_slower_clock():
    q = random(8)
    scaling = RopeScaling(kind="linear", factor=4.0)
    np.testing.assert_allclose(turned(q, 20, scaling), turned(q, 5), atol=1e-5)


def test_llama3_scaling_spares_the_fast_and_stretches_the_slow():
    scaling = RopeScaling(kind="llama3", factor=8.0, original_length=8192)
    plain, _ = rope_frequencies(128, 5e5, PLAINLY)
    found, magnitude = rope_frequencies(128, 5e5, scaling)
    turns = [8192 * f / (2 * math.pi) for f in plain]  # over the trained length
    ratio = np.divide(found, plain)
    assert magnitude == 1.0
    assert all(r == 1.0 for r, t in zip(ratio, turns, strict=True) if t > 4)
    assert all(r == pytest.approx(1 / 8) for r, t in zip(ratio, turns, strict=True) if t < 1)
    between = [r for r, t in zip(ratio, turns, strict=True) if 1 < t < 4]
    assert between
    assert all(1 / 8 < r < 1 for r in between)
    assert (np.diff(ratio) <= 0).all()


def test_yarn_scaling_spares_the_fast_and_stretches_the_slow():
    scaling = RopeScaling(kind="yarn", factor=4.0, original_length=4096)
    plain, _ = rope_frequencies(128, 1e4, PLAINLY)
    found, magnitude = rope_frequencies(128, 1e4, scaling)
    turns = [4096 * f / (2 * math.pi) for f in plain]
    ratio = np.divide(found, plain)
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1)  # arXiv:2309.00071, eq. 22
    assert all(r == pytest.approx(1.0) for r, t in zip(ratio, turns, strict=True) if t > 40)
    assert all(r == pytest.approx(1 / 4) for r, t in zip(ratio, turns, strict=True) if t < 0.8)
    assert (np.diff(ratio) <= 1e-12).all()
    given = dataclasses.replace(scaling, attention_factor=1.5)
    q = random(128)
    assert np.linalg.norm(turned(q, 9, given)) == pytest.approx(1.5 * np.linalg.norm(q), rel=1e-5)


def test_every_parameter_has_a_name_for_every_dim():
    for module in (Embedding(LEARNED, jax.random.key(0)), FeedForward(LEARNED, jax.random.key(0)), Norm(LEARNED, 16)):
        for variable in jax.tree.leaves(nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
            assert len(variable.get_metadata()["names"]) == variable.ndim
