"""Attention's projections: shared heads, biases, normalised and scaled queries, caps, each against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.attention import Attention
from model.memory import Packed, Queries
from tests.model.test_decoder import PLAIN

B, T, D = 2, 5, 16
QUERIES = Queries(jnp.asarray(np.tile(np.arange(T, dtype=np.int32), (B, 1))), jnp.ones((B, T), jnp.int32))


def slow(module, x, config, *, window=None):
    """One head after another, positions left out."""
    weights = {name: np.asarray(getattr(module, name)[...]) for name in "qkvo"}
    out = np.zeros((B, T, D), np.float32)
    if config.out_bias:
        out += np.asarray(module.o_bias[...])

    def projected(name, head):
        y = x @ weights[name][:, head]
        if config.qkv_bias:
            y = y + np.asarray(getattr(module, f"{name}_bias")[...])[head]
        if config.qk_norm and name != "v":
            scale = np.asarray(getattr(module, f"{name}_norm").scale[...])
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_eps) * scale
        return y

    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        q, k, v = projected("q", head), projected("k", shared), projected("v", shared)
        logits = q @ k.swapaxes(1, 2) * (config.head_dim**-0.5 if config.query_scale is None else config.query_scale)
        if config.attention_softcap is not None:
            logits = config.attention_softcap * np.tanh(logits / config.attention_softcap)
        distance = np.arange(T)[:, None] - np.arange(T)[None]
        logits = np.where((distance >= 0) & (distance < (window or T)), logits, -np.inf)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        out += weight / weight.sum(-1, keepdims=True) @ v @ weights["o"][head]
    return out


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"num_kv_heads": 1}, None),
        ({"num_kv_heads": 4}, None),
        ({"qkv_bias": True, "out_bias": True}, None),
        ({"qk_norm": True}, None),
        ({"query_scale": 0.9}, None),
        ({"attention_softcap": 1.5, "query_scale": 2.0}, 3),
    ],
    ids=str,
)
def test_attention_follows_its_formula(changes, window):
    config = dataclasses.replace(PLAIN, **changes)
    random = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Attention(config, jax.random.key(0))))
    values = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape, np.float32) / 2), state)
    module = nnx.merge(graphdef, values)
    x = random.standard_normal((B, T, D), np.float32)
    out, _ = jax.jit(lambda x: module(x, None, window, QUERIES, Packed()))(jnp.asarray(x))
    np.testing.assert_allclose(out, slow(module, x, config, window=window), rtol=1e-3, atol=1e-4)
