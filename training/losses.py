"""Losses as pure functions of arrays, float32 out. Knows no optimizer and no config.

In a manual layout V may be split, as the table's rows are: what runs over all of V is then a sum over devices, and each
device's gradients are its part of the whole.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.layers import TOGETHER, my_rows
from parallel.sharding import einsum, manual_axes, num_parts


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
    top = _over_all(jax.lax.pmax, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    log_z = top + jnp.log(_over_all(jax.lax.psum, jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)))
    nll = jnp.sum((log_z - _chosen(logits, targets, unembedding)[..., 0]) * mask)
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
    def add(carry, part):
        sums, table_grad = carry
        loss, grad, fresh = _loss_and_gradients(part[0], unembedding, *part[1:], softcap=softcap, z_loss=z_loss)
        return (jax.tree.map(jnp.add, sums, loss), table_grad + fresh), grad

    zero = (_zero_loss(), jnp.zeros(unembedding.shape, jnp.float32))
    (loss, table_grad), grads = jax.lax.scan(add, zero, _chunks(chunk, hidden, targets, mask))
    B, T, D = hidden.shape
    hidden_grad = jnp.moveaxis(grads, 0, 1).reshape(B, -1, D)[:, :T]
    return loss, (hidden_grad, table_grad.astype(unembedding.dtype))


def _loss_and_gradients(hidden, unembedding, targets, mask, *, softcap, z_loss):
    """One chunk's loss, and its gradients by hand: d nll / d logits = softmax - one_hot(target).

    The V-wide arrays are touched as seldom as can be: 1/Z and the mask multiply on the D side, and the one-hot part
    is a gather and a scatter of rows.
    """
    table = unembedding.astype(hidden.dtype)
    raw = einsum("BTD,VD->BTV", hidden, table, out=("batch", "seq", "act_vocab")).astype(jnp.float32)
    logits = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    top = _over_all(jax.lax.pmax, jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = _over_all(jax.lax.psum, jnp.sum(weights, axis=-1, keepdims=True))
    log_z = (top + jnp.log(total))[..., 0]
    chosen = _chosen(logits, targets, table)
    nll = jnp.sum((log_z - chosen[..., 0]) * mask)
    loss = Loss(nll + z_loss * jnp.sum(jnp.square(log_z) * mask), nll)

    mine, is_mine = my_rows(targets, table)
    mask = mask * num_parts(manual_axes("vocab"))  # every device's share of the loss depends on every part of V
    hit = -(mask * is_mine.astype(mask.dtype))[:, :, None]
    if softcap is not None:
        weights, hit = weights * (1 - jnp.square(logits / softcap)), hit * (1 - jnp.square(chosen / softcap))
    spread = (mask * (1 + 2 * z_loss * log_z))[:, :, None] / total
    spread, hit, weights = (x.astype(hidden.dtype) for x in (spread, hit, weights))
    rows = jnp.take(table, mine, axis=0)
    grad = einsum("BTV,VD->BTD", weights, table, out=TOGETHER) * spread + rows * hit
    table_grad = jnp.einsum("BTV,BTD->VD", weights, hidden * spread, preferred_element_type=jnp.float32)
    return loss, grad, table_grad.at[mine].add((hidden * hit).astype(jnp.float32))


def _backward(chunk, softcap, z_loss, residuals, cotangent: Loss):
    hidden_grad, table_grad = residuals
    scale = cotangent.total
    return hidden_grad * scale.astype(hidden_grad.dtype), table_grad * scale.astype(table_grad.dtype), None, None


chunked_token_loss.defvjp(_forward, _backward)


def _over_all(add: Callable, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A sum or maximum over V, from those over each device's part of it."""
    axes = manual_axes("vocab")
    return add(x, axes) if axes else x


def _chosen(logits: Float[Array, "B T V"], targets: Int[Array, "B T"], table: Array) -> Float[Array, "B T 1"]:
    """The targets' logits."""
    mine, is_mine = my_rows(targets, table)
    chosen = jnp.take_along_axis(logits, mine[:, :, None], axis=-1)
    return _over_all(jax.lax.psum, jnp.where(is_mine[:, :, None], chosen, 0)) if manual_axes("vocab") else chosen


def _zero_loss() -> Loss:
    return Loss(jnp.float32(0), jnp.float32(0))


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], the last chunk filled with zeros (a mask of 0)."""

    def split(x):
        B, T, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *rest), 1, 0)

    return tuple(split(x) for x in arrays)
