"""The chunked loss equals the plain one, value and gradient; a uniform model's loss is log V."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.losses import chunked_token_loss, token_loss

B, T, D, V = 3, 7, 8, 16
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN, TABLE = jax.random.normal(KEYS[0], (B, T, D)), jax.random.normal(KEYS[1], (V, D))
TARGETS = jax.random.randint(KEYS[2], (B, T), 0, V)
MASK = (jax.random.uniform(KEYS[3], (B, T)) > 0.3).astype(jnp.float32)


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunks_equal_the_plain_loss(chunk, softcap, z_loss):
    def fast(hidden, table):
        return chunked_token_loss(hidden, table, TARGETS, MASK, chunk, softcap, z_loss).total * 0.5

    def slow(hidden, table):
        return token_loss(hidden, table, TARGETS, MASK, softcap=softcap, z_loss=z_loss).total * 0.5

    value, grads = jax.jit(jax.value_and_grad(fast, (0, 1)))(HIDDEN, TABLE)
    expected, expected_grads = jax.jit(jax.value_and_grad(slow, (0, 1)))(HIDDEN, TABLE)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(fast)(HIDDEN, TABLE), expected, rtol=1e-6)
    for grad, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, atol=2e-6)


def test_a_uniform_model_has_loss_log_vocabulary():
    loss = chunked_token_loss(jnp.zeros((B, T, D)), TABLE, TARGETS, MASK, 4, None, 0.0)
    np.testing.assert_allclose(loss.nll / MASK.sum(), math.log(V), rtol=1e-6)


def test_z_loss_adds_the_square_of_log_z():
    plain = token_loss(jnp.zeros((B, T, D)), TABLE, TARGETS, MASK, softcap=None, z_loss=0.0)
    taxed = token_loss(jnp.zeros((B, T, D)), TABLE, TARGETS, MASK, softcap=None, z_loss=0.1)
    np.testing.assert_allclose((taxed.total - plain.total) / MASK.sum(), 0.1 * math.log(V) ** 2, rtol=1e-5)
    assert taxed.nll == plain.nll


def test_no_array_of_all_logits_exists():
    def gradients(hidden, table):
        return jax.grad(lambda *args: chunked_token_loss(*args, 2, None, 0.0).total, (0, 1))(
            hidden, table, jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64))
        )

    text = jax.jit(gradients).lower(jnp.ones((4, 64, 8)), jnp.ones((1024, 8))).as_text()
    assert "4x2x1024" in text  # one chunk's logits
    assert "4x64x1024" not in text
