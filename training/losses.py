"""Losses as pure functions of arrays, float32 out. Knows no optimizer and no config.

In a manual layout V may be split, as the table's rows are: what runs over all of V is then a sum over devices, and each
device's gradients are its part of the whole.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.decoder import capped, output_logits
from model.layers import TOGETHER, my_rows
from parallel.sharding import einsum, manual_axes, num_parts, part_index, whole


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
    logits = output_logits(hidden, unembedding, softcap=softcap)
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
    logits = output_logits(hidden, table, softcap=softcap)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def vocabulary_loss(hidden, table, targets, mask, chunk, softcap, z_loss) -> Loss:
    """`token_loss` over at most `chunk` entries of V at a time, of a table that is gathered part by part.

    log Z is known only after all of V, so gradients take a second round in which the parts are gathered and their
    logits made again: a fourth product, for which neither the logits nor the table nor its gradient ever exist whole.
    """
    return _vocabulary_sums(hidden, table, targets, mask, chunk, softcap, z_loss)[0]


def _vocabulary_sums(hidden, table, targets, mask, chunk, softcap, z_loss) -> tuple[Loss, Float[Array, "B T"]]:
    """-> loss, log Z."""
    B, T, _ = hidden.shape

    def add(sums, part):
        top, total, chosen = sums
        logits, _ = _part_logits(hidden, part[0], softcap)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
        hit = _hits(part, targets)
        return (higher, total, chosen + jnp.sum(jnp.where(hit, logits, 0), axis=-1)), None

    zeros = jnp.zeros((B, T), jnp.float32)
    (top, total, chosen), _ = jax.lax.scan(add, (zeros - jnp.inf, zeros, zeros), _parts(table, chunk))
    highest = _over_all(jax.lax.pmax, top)
    log_z = highest + jnp.log(_over_all(jax.lax.psum, total * jnp.exp(top - highest)))
    nll = jnp.sum((log_z - _over_all(jax.lax.psum, chosen)) * mask)
    return Loss(nll + z_loss * jnp.sum(jnp.square(log_z) * mask), nll), log_z


def _vocabulary_forward(hidden, table, targets, mask, chunk, softcap, z_loss):
    loss, log_z = _vocabulary_sums(hidden, table, targets, mask, chunk, softcap, z_loss)
    mask = mask * num_parts(manual_axes("vocab"))  # every device's share of the loss depends on every part of V
    spread = (mask * (1 + 2 * z_loss * log_z))[..., None]

    def add(grad, part):
        logits, entries = _part_logits(hidden, part[0], softcap)
        d_logits = spread * jnp.exp(logits - log_z[..., None]) - jnp.where(_hits(part, targets), mask[..., None], 0)
        if softcap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / softcap))
        d_logits = d_logits.astype(hidden.dtype)
        grad = grad + jnp.einsum("BTV,VD->BTD", d_logits, entries, preferred_element_type=jnp.float32)
        _, pull = jax.vjp(lambda rows: whole(rows, ("vocab", "embed")), part[0])
        (fresh,) = pull(jnp.einsum("BTV,BTD->VD", d_logits, hidden).astype(table.dtype))
        return grad, fresh

    grad, table_grad = jax.lax.scan(add, jnp.zeros(hidden.shape, jnp.float32), _parts(table, chunk))
    return loss, (grad.astype(hidden.dtype), table_grad.reshape(table.shape))


def _vocabulary_backward(chunk, softcap, z_loss, residuals, cotangent: Loss):
    return (*(grad * cotangent.total.astype(grad.dtype) for grad in residuals), None, None)


vocabulary_loss.defvjp(_vocabulary_forward, _vocabulary_backward)


def _parts(table: Float[Array, "V D"], chunk: int) -> tuple[Array, Array]:
    """The table in equal parts of at most `chunk` rows, and the entry of V that each begins with."""
    V, D = table.shape
    size = part_size(V, chunk)
    first = part_index(manual_axes("vocab")) * V + jnp.arange(V // size, dtype=jnp.int32) * size
    return table.reshape(V // size, size, D), first


def part_size(V: int, chunk: int) -> int:
    """Entries in each part of V: the most up to `chunk` in equal parts, of multiples of 128 where there are some."""
    fitting = [V // num for num in range(1, V + 1) if V % num == 0 and V // num <= max(chunk, 1)]
    return next((size for size in fitting if size % 128 == 0), fitting[0])


def _part_logits(hidden: Float[Array, "B T D"], rows: Float[Array, "V d"], softcap: float | None):
    """-> logits of a part of V, capped, and its rows with all of D."""
    entries = whole(rows, ("vocab", "embed")).astype(hidden.dtype)
    logits = jnp.einsum("BTD,VD->BTV", hidden, entries, preferred_element_type=jnp.float32)
    return capped(logits, softcap), entries


def _hits(part: tuple[Array, Array], targets: Int[Array, "B T"]) -> Bool[Array, "B T V"]:
    """Which entry of this part of V is a token's target."""
    rows, first = part
    return (targets - first)[..., None] == jnp.arange(rows.shape[0], dtype=targets.dtype)[None, None]


def _over_all(add: Callable, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A sum or maximum over V, from those over each device's part of it."""
    axes = manual_axes("vocab")
    return add(x, axes) if axes else x


def _chosen(logits: Float[Array, "B T V"], targets: Int[Array, "B T"], table: Array) -> Float[Array, "B T 1"]:
    """The targets' logits."""
    mine, is_mine = my_rows(targets, table)
    chosen = jnp.take_along_axis(logits, mine[:, :, None], axis=-1)
    return _over_all(jax.lax.psum, jnp.where(is_mine[:, :, None], chosen, 0)) if manual_axes("vocab") else chosen


def smoothing(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> Float[Array, ""]:
    """What label smoothing by ε adds to the cross-entropy, without ε: the sum over tokens of (target's - mean) logit.

    (1 - ε) (-log p_y) + ε mean_v(-log p_v) = -log p_y + ε (logit_y - mean_v logit_v), arXiv:1512.00567, section 7. So
    no second pass over V is needed: the mean logit is that of the mean row of the table. Uncapped logits are meant.
    """
    V, _ = unembedding.shape
    parts = num_parts(manual_axes("vocab"))
    mine, is_mine = my_rows(targets, unembedding)
    table = unembedding.astype(jnp.float32)
    rows = jnp.where(is_mine[..., None], jnp.take(table, mine, axis=0), 0) - jnp.sum(table, axis=0)[None, None] / (
        V * parts
    )
    return jnp.sum(jnp.sum(hidden.astype(jnp.float32) * rows, axis=-1) * mask) * parts


def _zero_loss() -> Loss:
    return Loss(jnp.float32(0), jnp.float32(0))


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], the last chunk filled with zeros (a mask of 0)."""

    def split(x):
        B, T, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *rest), 1, 0)

    return tuple(split(x) for x in arrays)
