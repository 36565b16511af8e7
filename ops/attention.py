"""Attention to a batch's own rows, to a cache, and to any keys that say where they stand. Knows no mesh.

`reference.attention` is the slow twin of all three. `causal` skips in blocks what causality hides: rows of a batch are
packed documents in order, so the distance of two tokens of one document is the distance of their columns. `forward`
and `backward` assume no order, so that what they return for some of the keys can be joined with what the other keys
give; kernels for an accelerator have their signatures.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from ops.reference import visible

BLOCK = 128  # query rows; the quickest of 64, 128, 256, 512 on two CPU cores (docs/benchmarks/training.md)
MOST_BLOCKS = 16  # longer sequences take larger blocks, so that the program stays small
ROWS = 512  # query rows that `forward` and `backward` hold logits of at a time
HIDDEN = -1e30  # a logit that weighs nothing


class Places(NamedTuple):
    """Where tokens stand, in whatever order they come."""

    positions: Int[Array, "B T"]  # in their document, from 0
    segments: Int[Array, "B T"]  # which document of the row, from 1; 0 is padding


def causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of each document to itself and to what came before; softmax in float32."""
    T, K = k.shape[1], k.shape[2]
    q = rearrange(q * jnp.asarray(scale, q.dtype), "B T (K G) H -> B K G T H", K=K)
    k, v = rearrange(k, "B S K H -> B K S H"), rearrange(v, "B S K H -> B K S H")
    block = max(BLOCK, -(-T // MOST_BLOCKS))
    rows = []
    for start in range(0, T, block):
        end = min(start + block, T)
        first = max(0, start - window + 1) if isinstance(window, int) else 0
        mask = _visible(segments, start, end, first, window)
        rows.append(_attend(q[:, :, :, start:end], k[:, :, first:end], v[:, :, first:end], mask, softcap))
    return rearrange(jnp.concatenate(rows, axis=3), "B K G T H -> B T (K G) H")


def cached(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    *,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention to a cache whose slot s holds position s: each query sees slots up to its own."""
    _, K, S, _ = k.shape
    q = rearrange(q * jnp.asarray(scale, q.dtype), "B T (K G) H -> B K G T H", K=K)
    distance = positions[:, :, None] - jnp.arange(S, dtype=positions.dtype)[None, None]
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return rearrange(_attend(q, k, v, mask[:, None, None], softcap), "B K G T H -> B T (K G) H")


def _visible(
    segments: Int[Array, "B T"], start: int, end: int, first: int, window: Int[Array, ""] | int | None
) -> Bool[Array, "B 1 1 t s"]:
    """What queries start..end see of keys first..end."""
    distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = segments[:, start:end, None] == segments[:, None, first:end]
    return (same & near[None])[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: Float[Array, "B K G t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s H"],
    mask: Bool[Array, "B 1 1 t s"],
    softcap: float | None,
) -> Float[Array, "B K G t H"]:
    """softmax(q k) v, divided after the sum over keys: H-wide work instead of s-wide."""
    return _forward(q, k, v, mask, softcap)[0]


def _forward(q, k, v, mask, softcap):
    logits = jnp.einsum("BKGtH,BKsH->BKGts", q, k, preferred_element_type=jnp.float32)
    slope = None
    if softcap is not None:
        bent = jnp.tanh(logits / softcap)
        logits, slope = softcap * bent, 1 - bent * bent
    logits = jnp.where(mask, logits, HIDDEN)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("BKGts,BKsH->BKGtH", weights, v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype), (q, k, v, weights, total, out, slope)


def _backward(softcap, residuals, grad):
    """arXiv:2205.14135, appendix B.2: d logits = weights * (grad vᵀ - grad·out), all divided by the total."""
    q, k, v, weights, total, out, slope = residuals
    grad = grad.astype(jnp.float32) / total
    shared = jnp.sum(grad * out, axis=-1, keepdims=True)
    grad = grad.astype(v.dtype)
    d_weights = jnp.einsum("BKGtH,BKsH->BKGts", grad, v, preferred_element_type=jnp.float32)
    d_logits = weights.astype(jnp.float32) * (d_weights - shared)
    d_logits = (d_logits if slope is None else d_logits * slope).astype(q.dtype)
    d_q = jnp.einsum("BKGts,BKsH->BKGtH", d_logits, k)
    d_k = jnp.einsum("BKGts,BKGtH->BKsH", d_logits, q)
    d_v = jnp.einsum("BKGts,BKGtH->BKsH", weights, grad)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K _"],
    q_at: Places,
    k_at: Places,
    *,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B T N _"], Float[Array, "B N T"]]:
    """-> out, and the float32 log of the sum of exp(logits) over these keys.

    A query that sees none of them has out 0 and log-sum-exp HIDDEN. So attention to the union of two sets of keys is
    the two outs, weighted by exp(log-sum-exp).
    """
    _, T, _, _ = q.shape
    _, _, K, _ = k.shape

    def rows(block):
        q, at = block
        mask, logits, _ = _logits(q, k, at, k_at, window=window, scale=scale, softcap=softcap)
        most = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.where(mask, jnp.exp(logits - most), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out = out / jnp.where(total > 0, total, 1.0)
        return out.astype(q.dtype), jnp.where(total > 0, most + jnp.log(total), HIDDEN)

    outs, sums = jax.lax.map(rows, _in_blocks((rearrange(q, "B T (K G) H -> B T K G H", K=K), q_at)))
    out = rearrange(outs, "i B K G t H -> B (i t) (K G) H")[:, :T]
    return out, rearrange(sums, "i B K G t 1 -> B (K G) (i t)")[:, :, :T]


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K _"],
    out: Float[Array, "B T N _"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N _"],
    q_at: Places,
    k_at: Places,
    *,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K _"]]:
    """-> d_q, d_k, d_v (arXiv:2205.14135, appendix B.2).

    `out` and `lse` may be those over more keys than these: then d_q is these keys' share of it.
    """
    _, T, _, _ = q.shape
    _, _, K, _ = k.shape

    def rows(sums, block):
        q, out, lse, d_out, at = block
        mask, logits, slope = _logits(q, k, at, k_at, window=window, scale=scale, softcap=softcap)
        weights = jnp.where(mask, jnp.exp(logits - rearrange(lse, "B T K G -> B K G T 1")), 0.0)
        shared = jnp.einsum("BTKGH,BTKGH->BKGT", d_out, out, preferred_element_type=jnp.float32)
        d_weights = jnp.einsum("BTKGH,BSKH->BKGTS", d_out, v, preferred_element_type=jnp.float32)
        d_logits = weights * (d_weights - shared[..., None]) * scale
        d_logits = (d_logits if slope is None else d_logits * slope).astype(q.dtype)
        d_q = jnp.einsum("BKGTS,BSKH->BTKGH", d_logits, k)
        d_k = jnp.einsum("BKGTS,BTKGH->BSKH", d_logits, q, preferred_element_type=jnp.float32)
        d_v = jnp.einsum(
            "BKGTS,BTKGH->BSKH", weights.astype(v.dtype), d_out.astype(v.dtype), preferred_element_type=jnp.float32
        )
        return jax.tree.map(jnp.add, sums, (d_k, d_v)), d_q

    grouped = [rearrange(x, "B T (K G) H -> B T K G H", K=K) for x in (q, out, d_out)]
    blocks = _in_blocks((grouped[0], grouped[1], rearrange(lse, "B (K G) T -> B T K G", K=K), grouped[2], q_at))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (k, v))
    (d_k, d_v), d_q = jax.lax.scan(rows, zeros, blocks)
    d_q = rearrange(d_q, "i B t K G H -> B (i t) (K G) H")[:, :T]
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _logits(q, k, q_at: Places, k_at: Places, *, window, scale, softcap):
    """-> what is visible [B 1 1 T S], logits [B K G T S], and their slope under the cap, if there is one."""
    mask = visible(q_at.positions, k_at.positions, q_at.segments, k_at.segments, window=window)[:, None, None]
    logits, slope = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale, None
    if softcap is not None:
        bent = jnp.tanh(logits / softcap)
        logits, slope = softcap * bent, 1 - bent * bent
    return mask, jnp.where(mask, logits, HIDDEN), slope


def _in_blocks(tree):
    """[B T ...] -> [i B t ...] of at most ROWS rows; those that fill the last block are of no document."""

    def cut(x, fill):
        _, T, *rest = x.shape
        num_blocks = -(-T // ROWS)
        rows = -(-T // num_blocks)
        x = jnp.pad(x, [(0, 0), (0, num_blocks * rows - T), *[(0, 0)] * len(rest)], constant_values=fill)
        return rearrange(x, "B (i t) ... -> i B t ...", i=num_blocks)

    *arrays, at = tree
    return *(cut(x, 0) for x in arrays), Places(cut(at.positions, 0), cut(at.segments, -1))
