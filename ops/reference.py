"""The slow truth in plain jnp: what every fast kernel must equal. Knows no mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    window: Int[Array, ""] | int | None,
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: its own document, not later than itself, at most `window` tokens back."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = (distance >= 0) & (query_segments[:, :, None] == key_segments[:, None, :])
    return mask if window is None else mask & (distance < window)


def attention_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B N T S"]:
    """How much each query takes of each key (arXiv:2305.13245), in float32; one that sees nothing takes all alike."""
    *_, K, _ = k.shape
    q_BTKGH = rearrange(q, "B T (K G) H -> B T K G H", K=K)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e30), axis=-1)
    return rearrange(weights, "B K G T S -> B (K G) T S")


def weighted(weights: Float[Array, "B N T S"], v: Float[Array, "B S K H"]) -> Float[Array, "B T N H"]:
    """The values, mixed as the weights say; N/K query heads share each head of values."""
    *_, K, _ = v.shape
    weights_BKGTS = rearrange(weights.astype(v.dtype), "B (K G) T S -> B K G T S", K=K)
    return rearrange(jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v), "B T K G H -> B T (K G) H")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, softmax in float32; a query that sees nothing returns the mean."""
    return weighted(attention_weights(q, k, mask, scale=scale, softcap=softcap), v)


def grouped_matmul(
    x: Float[Array, "rows D"], w: Float[Array, "E D F"], sizes: Int[Array, "E"]
) -> Float[Array, "rows F"]:
    """Each row times the matrix of its group, rows sorted by group; zeros beyond the last group."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
    return jnp.einsum("ME,MD,EDF->MF", jax.nn.one_hot(group, len(w), dtype=x.dtype), x, w)


def mixture(
    x: Float[Array, "tokens D"],
    gates: Float[Array, "tokens A"],
    chosen: Int[Array, "tokens A"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: Callable[[Array], Array],
) -> Float[Array, "tokens D"]:
    """Every token through every expert's gated FFN, weighed by its gate; 0 for experts that it did not choose."""
    hidden = activation(jnp.einsum("MD,EDF->EMF", x, gate)) * jnp.einsum("MD,EDF->EMF", x, up)
    weights = jnp.einsum("MAE,MA->ME", jax.nn.one_hot(chosen, len(gate)), gates).astype(x.dtype)
    return jnp.einsum("EMF,EFD,ME->MD", hidden, down, weights)
