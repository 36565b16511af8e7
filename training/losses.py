"""Losses as pure functions of arrays, float32 out. Knows no model, no optimizer and no config."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from parallel.sharding import einsum


class Loss(NamedTuple):
    """Sums over the tokens that count; divide by their number for means."""

    total: Float[Array, ""]  # what is differentiated
    nll: Float[Array, ""]  # its negative log-likelihood part, in nats; carries no gradient


def token_loss(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    softcap: float | None,
    z_loss: float,
) -> Loss:
    """Cross-entropy plus z_loss * log(Z)^2 (arXiv:2204.02311, section 5), all B T V logits at once: the slow twin."""
    logits = einsum("BTD,VD->BTV", hidden, unembedding, out=("batch", "seq", "act_vocab")).astype(jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    nll = jnp.sum((log_z - chosen) * mask)
    return Loss(nll + z_loss * jnp.sum(jnp.square(log_z) * mask), jax.lax.stop_gradient(nll))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def chunked_token_loss(hidden, unembedding, targets, mask, chunk, softcap, z_loss) -> Loss:
    """`token_loss` over `chunk` tokens of every row at a time, so that B x chunk x V logits exist at once.

    Under differentiation each chunk's gradients are made right after its logits, which are never made again:
    three matmuls as in the plain loss, where a chunk over V would need a fourth to find log Z first.
    """

    def add(sums, part):
        loss = token_loss(part[0], unembedding, *part[1:], softcap=softcap, z_loss=z_loss)
        return jax.tree.map(jnp.add, sums, loss), None

    return jax.lax.scan(add, _zero_loss(), _chunks(chunk, hidden, targets, mask))[0]


def _forward(hidden, unembedding, targets, mask, chunk, softcap, z_loss):
    def total(hidden, unembedding, targets, mask):
        loss = token_loss(hidden, unembedding, targets, mask, softcap=softcap, z_loss=z_loss)
        return loss.total, loss

    def add(carry, part):
        sums, table_grad = carry
        (_, loss), (grad, fresh) = jax.value_and_grad(total, (0, 1), has_aux=True)(part[0], unembedding, *part[1:])
        return (jax.tree.map(jnp.add, sums, loss), table_grad + fresh), grad

    zero = (_zero_loss(), jnp.zeros_like(unembedding))
    (loss, table_grad), grads = jax.lax.scan(add, zero, _chunks(chunk, hidden, targets, mask))
    B, T, D = hidden.shape
    hidden_grad = jnp.moveaxis(grads, 0, 1).reshape(B, -1, D)[:, :T]
    return loss, (hidden_grad, table_grad)


def _backward(chunk, softcap, z_loss, residuals, cotangent: Loss):
    hidden_grad, table_grad = residuals
    scale = cotangent.total
    return hidden_grad * scale.astype(hidden_grad.dtype), table_grad * scale, None, None


chunked_token_loss.defvjp(_forward, _backward)


def _zero_loss() -> Loss:
    return Loss(jnp.float32(0), jnp.float32(0))


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], the last chunk filled with zeros (a mask of 0)."""

    def split(x):
        B, T, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *rest), 1, 0)

    return tuple(split(x) for x in arrays)
