"""The soft search of a source: how well each of its states matches the decoder's, by four scores. Knows no recurrence.

e_ts = score(s_t, h_s),  α_t = softmax over s of e_t,  c_t = Σ_s α_ts h_s          (arXiv:1409.0473, eq. 5 and 6)

additive   v · tanh(W s + U h)            arXiv:1409.0473, appendix A.1.2
dot        s · h                          arXiv:1508.04025, eq. 8
general    s · W h
local      general in a window around p = S σ(v · tanh(W s)), times exp(-(s - p)² / 2σ²)      eq. 9 and 10
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.layers import Key, matrix
from model.seq2seq_config import Seq2SeqConfig
from ops.attention import HIDDEN
from parallel.sharding import einsum


class Source(NamedTuple):
    """What a decoder sees of the sources; every array begins with B."""

    states: Float[Array, "B S U"]  # h
    keys: Float[Array, "B S U"]  # h as the score takes it
    mask: Float[Array, "B S"]  # 1 where a token stands


class SoftSearch(nnx.Module):
    """The parameters of one score; `query` of those that take s through a matrix is multiplied by the caller."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        query, keys, energy = jax.random.split(key, 3)
        U = config.recurrent_dim
        names, has_query = ("embed", "rank"), config.score in ("additive", "local")
        self.query = matrix(query, (U, U), names, fan_in=U) if has_query else nnx.data(None)
        self.keys = matrix(keys, (U, U), names, fan_in=U) if config.score != "dot" else nnx.data(None)
        self.energy = matrix(energy, (1, U), (None, "rank"), fan_in=U) if has_query else nnx.data(None)

    def source(self, states: Float[Array, "B S U"], mask: Float[Array, "B S"]) -> Source:
        """What of the score depends on the source alone, once for all steps."""
        keys = states
        if self.keys is not None:
            keys = einsum("BSU,UV->BSV", states, self.keys[...], out=("batch", "seq", "rank"))
        return Source(states, keys, mask)


def attend(
    search: dict[str, Any], source: Source, states: Float[Array, "B T U"], queries: Float[Array, "B T U"] | None, *,
    score: str, window: int,
) -> tuple[Float[Array, "B T U"], Float[Array, "B T S"]]:  # fmt: skip
    """The contexts of T states of the decoder and the weights α; `queries` are the states through `query`."""
    e = _energies(search, source, states, queries, score)
    mask = source.mask[:, None]
    if score != "local":
        weights = jax.nn.softmax(jnp.where(mask > 0, e, HIDDEN), axis=-1)
    else:
        assert queries is not None
        weights = _local(search, e, queries, mask, window)
    weights = weights.astype(states.dtype)
    return jnp.einsum("BTS,BSU->BTU", weights, source.states), weights


def _energies(search, source: Source, states, queries, score: str) -> Float[Array, "B T S"]:
    """e in float32."""
    if score == "additive":
        bent = jnp.tanh(queries[:, :, None] + source.keys[:, None])
        return jnp.einsum("BTSU,U->BTS", bent, search["energy"][0].astype(bent.dtype)).astype(jnp.float32)
    return jnp.einsum("BTU,BSU->BTS", states, source.keys).astype(jnp.float32)


def _local(search, e, queries, mask, window: int) -> Float[Array, "B T S"]:
    """α of local-p: softmax inside of the window, bent by a Gaussian whose σ is half of it."""
    energy = jnp.einsum("BTU,U->BT", jnp.tanh(queries), search["energy"][0].astype(queries.dtype)).astype(jnp.float32)
    center = jnp.sum(mask, axis=-1) * jax.nn.sigmoid(energy)
    distance = jnp.arange(e.shape[-1], dtype=jnp.float32)[None, None] - center[..., None]
    near = (mask > 0) & (jnp.abs(distance) <= window)
    weights = jnp.where(near, jax.nn.softmax(jnp.where(near, e, HIDDEN), axis=-1), 0.0)
    return weights * jnp.exp(-jnp.square(distance) / (2 * (window / 2) ** 2))
