"""Memories: a cache answers as the batch itself does, wherever its rows stand, whatever lies in unwritten slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.memory import Dense, Packed, Queries, Rule, dense_cache
from tests.model.test_decoder import PLAIN

B, T, N, K, H, S = 2, 6, 4, 2, 8, 9


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def queries(starts, length):
    positions = np.asarray(starts, np.int32)[:, None] + np.arange(length, dtype=np.int32)[None]
    return Queries(jnp.asarray(positions), jnp.ones(positions.shape, jnp.int32))


def rubbish():
    return Dense(jnp.asarray(random(B, K, S, H) * 100), jnp.asarray(random(B, K, S, H) * -100))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_a_cache_answers_as_the_batch_does(window, softcap):
    q, k, v = map(jnp.asarray, (random(B, T, N, H), random(B, T, K, H), random(B, T, K, H) + 1))
    rule = Rule(H**-0.5, softcap, window)

    @jax.jit
    def both(memory):
        expected, _ = Packed().attend(q, k, v, queries([0, 0], T), rule)
        outs = []
        for start, end in ((0, 3), (3, 4), (4, 6)):
            part = slice(start, end)
            out, memory = memory.attend(q[:, part], k[:, part], v[:, part], queries([start, start], end - start), rule)
            outs.append(out)
        return jnp.concatenate(outs, axis=1), expected

    out, expected = both(rubbish())
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_each_row_writes_where_it_stands():
    before = rubbish()
    q, k = random(B, 2, N, H), random(B, 2, K, H)
    _, after = jax.jit(
        lambda memory: memory.attend(*map(jnp.asarray, (q, k, k + 1)), queries([1, 5], 2), Rule(1.0, None, None))
    )(before)
    expected = np.array(before.k)
    expected[0, :, 1:3], expected[1, :, 5:7] = np.swapaxes(k[0], 0, 1), np.swapaxes(k[1], 0, 1)
    np.testing.assert_array_equal(after.k, expected)
    assert np.array_equal(after.v[0, :, 1:3], np.swapaxes(k[0] + 1, 0, 1))


def test_caches_are_empty_and_as_the_layers_are():
    stacked = dense_cache(PLAIN, B, S)
    assert isinstance(stacked, Dense)
    assert stacked.k.shape == (3, B, K, S, H)
    apart = dense_cache(dataclasses.replace(PLAIN, scan_layers=False, compute_dtype="bfloat16"), B, S)
    assert isinstance(apart, tuple)
    assert [layer.v.shape for layer in apart] == [(B, K, S, H)] * 3
    assert {leaf.dtype for leaf in jax.tree.leaves(apart)} == {jnp.dtype("bfloat16")}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((stacked, apart)))
