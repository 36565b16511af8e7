"""Latent attention against its equations in numpy, one head after another; its widths, and what a cache then holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import RopeScaling
from model.latent_attention import LatentAttention
from model.layers import rope
from model.memory import Packed, Queries
from model.weights import leaves
from tests.model.test_decoder import MIXTURE

B, T, D = 2, 5, 16
QUERIES = Queries(jnp.asarray(np.tile(np.arange(T, dtype=np.int32), (B, 1))), jnp.ones((B, T), jnp.int32))


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + MIXTURE.norm_eps) * scale


def turned(x, turn):
    """[B, T, H]: pairs h and h + H/2."""
    cos, sin = (np.asarray(half)[:, :, 0] for half in turn)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def slow(weights, x, turn, config, *, scale):
    """arXiv:2405.04434, eqs. 9 to 19."""
    latent = rms(x @ weights["kv_down"], weights["kv_norm.scale"])
    query = rms(x @ weights["q_down"], weights["q_norm.scale"]) if config.q_rank else x
    k_rope, out = turned(x @ weights["k_rope"], turn), np.zeros((B, T, D), np.float32)
    for head in range(config.num_heads):
        q = np.concatenate([query @ weights["q"][:, head], turned(query @ weights["q_rope"][:, head], turn)], axis=-1)
        k = np.concatenate([latent @ weights["k"][:, head], k_rope], axis=-1)
        logits = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(1, 2) * scale, -np.inf)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        out += weight @ (latent @ weights["v"][:, head]) @ weights["o"][head]
    return out


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"rope_scaling": RopeScaling()}, 8**-0.5),
        ({"q_rank": 0, "value_dim": 0}, 8**-0.5 * (0.1 * 0.5 * np.log(4) + 1) ** 2),
        ({"query_scale": 0.7, "rope_scaling": RopeScaling()}, 0.7),
    ],
    ids=str,
)
def test_latent_attention_follows_its_equations(changes, scale):
    config = dataclasses.replace(MIXTURE, **changes)
    random = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LatentAttention(config, jax.random.key(0))))
    values = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape, np.float32) / 2), state)
    module, weights = nnx.merge(graphdef, values), nnx.to_pure_dict(values)
    weights = {path: np.asarray(leaf) for path, leaf in leaves(weights)}
    x = random.standard_normal((B, T, D), np.float32)
    turn = rope(QUERIES.positions, config.rope_dim, config.rope_theta, config.rope_scaling)
    out, _ = jax.jit(lambda x: module(x, turn, None, QUERIES, Packed()))(jnp.asarray(x))
    np.testing.assert_allclose(out, slow(weights, x, turn, config, scale=scale), rtol=1e-3, atol=1e-4)


def test_every_parameter_has_a_name_for_every_dim():
    module = LatentAttention(MIXTURE, jax.random.key(0))
    for variable in jax.tree.leaves(nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        assert len(variable.get_metadata()["names"]) == variable.ndim
