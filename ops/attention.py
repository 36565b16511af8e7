"""Attention to a batch's own rows, in blocks that skip what causality hides, and to a cache. Knows no mesh.

`reference.attention` is the slow twin of both. Rows of a batch are packed documents in order, so the distance of two
tokens of one document is the distance of their columns.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # query rows; the quickest of 64, 128, 256, 512 on two CPU cores (docs/benchmarks/training.md)
MOST_BLOCKS = 16  # longer sequences take larger blocks, so that the program stays small
HIDDEN = -1e30  # a logit that weighs nothing


class Places(NamedTuple):
    """Where tokens stand: position in the document from 0, and the document's segment (0 is padding)."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]


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
