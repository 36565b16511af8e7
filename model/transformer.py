"""The encoder–decoder of "Attention is all you need": layers of self- and cross-attention. Knows no token and no loss.

Layers normalise what they read (pre-norm, arXiv:2002.04745) rather than what they give, which trains without a
delicate warm-up; positions are sinusoids added to the embeddings, or T5's biases on the logits of self-attention.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from model.decoder import gathered, stacked
from model.dropout import Seeds, dropout
from model.layers import FeedForward, Key, Norm, matrix
from model.looks import Looks
from model.seq2seq_config import Seq2SeqConfig
from ops.attention import HIDDEN
from parallel.sharding import einsum


class KeysValues(NamedTuple):
    """What attention finds; every array begins with B."""

    k: Float[Array, "B S N H"]
    v: Float[Array, "B S N H"]


class Heads(nnx.Module):
    """Multi-head attention (arXiv:1706.03762, section 3.2.2) to any keys."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        q, k, v, o = jax.random.split(key, 4)
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        names = ("embed", "heads", "head")
        self.q, self.k, self.v = (matrix(part, (D, N, H), names, fan_in=D) for part in (q, k, v))
        scale = (2 * config.num_layers) ** -0.5
        self.o = matrix(o, (N, H, D), ("heads", "head", "embed"), fan_in=N * H, scale=scale)

    def keys_values(self, x: Float[Array, "B S D"]) -> KeysValues:
        """Of the tokens x."""
        names = ("batch", "seq", "act_heads", None)
        k, v = (einsum("BSD,DNH->BSNH", x, w[...], out=names) for w in (self.k, self.v))
        return KeysValues(k, v)

    def __call__(
        self, x: Float[Array, "B T D"], seen: KeysValues, bias: Float[Array, "#B #N #T S"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T S"]]:
        """What the tokens x find, and with which weights; `bias` is added to the logits, HIDDEN where nothing is."""
        q = einsum("BTD,DNH->BTNH", x, self.q[...], out=("batch", "seq", "act_heads", None))
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, seen.k, preferred_element_type=jnp.float32)
        with jax.numpy_rank_promotion("allow"):
            weights = jax.nn.softmax(logits + bias, axis=-1).astype(q.dtype)
        out = jnp.einsum("BNTS,BSNH->BTNH", weights, seen.v)
        return einsum("BTNH,NHD->BTD", out, self.o[...], sums="act_heads", out=("batch", "seq", "act_embed")), weights


class EncoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        attention, ffn = jax.random.split(key)
        self.dropout = config.dropout
        self.attention_norm, self.ffn_norm = Norm(config.layer, config.embed_dim), Norm(config.layer, config.embed_dim)
        self.attention, self.ffn = Heads(config, attention), FeedForward(config.layer, ffn)

    def __call__(
        self, x: Float[Array, "B S D"], bias, seeds: Seeds | None, site
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B N S S"]]:
        """-> x and the weights of attention."""
        y = self.attention_norm(x)
        y, weights = self.attention(y, self.attention.keys_values(y), bias)
        x = x + dropout(y, self.dropout, seeds, site)
        return x + dropout(self.ffn(self.ffn_norm(x)), self.dropout, seeds, site + 1), weights


class DecoderLayer(nnx.Module):
    """Self-attention to what came before, cross-attention to the source, FFN; each adds to x."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        attention, cross, ffn = jax.random.split(key, 3)
        self.dropout = config.dropout
        self.attention_norm, self.cross_norm, self.ffn_norm = (Norm(config.layer, config.embed_dim) for _ in range(3))
        self.attention, self.cross = Heads(config, attention), Heads(config, cross)
        self.ffn = FeedForward(config.layer, ffn)

    def __call__(
        self, x: Float[Array, "B T D"], before: KeysValues, source: KeysValues, biases, seeds: Seeds | None, site
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B N T _"], Float[Array, "B N T S"]]]:
        """`before` are this layer's keys and values of the target, those of x included; `source` those of the source.

        -> x and the weights of self- and cross-attention.
        """
        y, own = self.attention(self.attention_norm(x), before, biases[0])
        x = x + dropout(y, self.dropout, seeds, site)
        y, weights = self.cross(self.cross_norm(x), source, biases[1])
        x = x + dropout(y, self.dropout, seeds, site + 1)
        return x + dropout(self.ffn(self.ffn_norm(x)), self.dropout, seeds, site + 2), (own, weights)

    def own(self, x: Float[Array, "B T D"]) -> KeysValues:
        """Keys and values of x for self-attention."""
        return self.attention.keys_values(self.attention_norm(x))


class Distances(nnx.Module):
    """T5's relative positions: a learned bias for each head and bucket of distances (arXiv:1910.10683, section 2.1).

    Parameters are in units of sqrt(H) logits: Adam moves one by no more than its rate an update, and a few hundred
    updates should be enough to tell near from far.
    """

    def __init__(self, config: Seq2SeqConfig, *, both_ways: bool):
        self.config, self.both_ways = config, both_ways
        self.biases = nnx.Param(jnp.zeros((config.num_heads, config.num_distances)), names=("heads", None))

    def __call__(self, queries: Int[Array, "T"], keys: Int[Array, "S"]) -> Float[Array, "1 N T S"]:
        """The biases between these positions."""
        config = self.config
        buckets = distance_bucket(
            keys[None] - queries[:, None], config.num_distances, config.max_distance, both_ways=self.both_ways
        )
        return jnp.take(self.biases[...] * config.head_dim**0.5, buckets, axis=1)[None]


def distance_bucket(
    distance: Int[Array, "T S"], num_buckets: int, max_distance: int, *, both_ways: bool
) -> Int[Array, "T S"]:
    """Near distances have a bucket each, far ones share, ever more of them, up to max_distance; as T5 has it."""
    first = jnp.zeros_like(distance)
    if both_ways:
        num_buckets //= 2
        first = jnp.where(distance > 0, num_buckets, 0)
        back = jnp.abs(distance)
    else:
        back = jnp.maximum(-distance, 0)
    exact = max(num_buckets // 2, 1)
    ratio = jnp.log(jnp.maximum(back, 1).astype(jnp.float32) / exact) / math.log(max(max_distance / exact, 1.001))
    far = exact + (ratio * (num_buckets - exact)).astype(distance.dtype)
    return first + jnp.where(back < exact, back, jnp.minimum(far, num_buckets - 1))


def sinusoids(length: int, dim: int) -> Float[np.ndarray, "T D"]:
    """Sines and cosines of position / 10000^(2i/D), interleaved (arXiv:1706.03762, section 3.5)."""
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, dim, 2) / dim)[None]
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, -1)
    return waves[:, :dim].astype(np.float32)


class Read(NamedTuple):
    """A batch of sources as the encoder has read them."""

    states: Float[Array, "B S D"]
    mask: Float[Array, "B S"]  # 1 where a token stands


class Encoder(nnx.Module):
    """L layers over the whole source at once."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        self.config = config
        self.layers = stacked(lambda key: EncoderLayer(config, key), jax.random.split(key, config.num_layers))
        self.norm = Norm(config.layer, config.embed_dim)
        is_relative = config.positions == "relative"
        self.distances = Distances(config, both_ways=True) if is_relative else nnx.data(None)

    def __call__(self, x: Float[Array, "B S D"], mask: Float[Array, "B S"], seeds: Seeds | None) -> Read:
        """What the source says, token by token."""
        return self.looked(x, mask, seeds)[0]

    def looked(
        self, x: Float[Array, "B S D"], mask: Float[Array, "B S"], seeds: Seeds | None
    ) -> tuple[Read, Float[Array, "B L N S S"]]:
        """The same, and what each token looked at."""
        config, bias = self.config, hidden(mask)
        if self.distances is not None:
            places = jnp.arange(x.shape[1])
            bias = bias + self.distances(places, places)
        graphdef, state = nnx.split(self.layers)

        def body(x, turn):
            state, layer = turn
            return gathered(nnx.merge(graphdef, state))(x, bias, seeds, 10 + 8 * layer)

        x, weights = jax.lax.scan(body, positioned(x, config), (state, jnp.arange(config.num_layers)), unroll=True)
        return Read(self.norm(x), mask), weights.swapaxes(0, 1)


def hidden(mask: Float[Array, "B S"]) -> Float[Array, "B 1 1 S"]:
    """What hides padding."""
    return jnp.where(mask > 0, 0.0, HIDDEN)[:, None, None]


def positioned(x: Float[Array, "B T D"], config: Seq2SeqConfig) -> Float[Array, "B T D"]:
    """x with sinusoids added, where the config has them."""
    if config.positions == "relative":
        return x
    _, T, D = x.shape
    return x + jnp.asarray(sinusoids(T, D)).astype(x.dtype)[None]


class Encoded(NamedTuple):
    """A batch of sources as the decoder's layers use them; every array begins with B."""

    source: tuple[KeysValues, ...]  # of each layer's cross-attention
    mask: Float[Array, "B S"]


class DecoderState(NamedTuple):
    """Keys and values of the target so far; every array begins with B."""

    before: tuple[KeysValues, ...]  # of each layer's self-attention, room for all tokens
    length: Int[Array, "B"]  # tokens so far, the same in all rows


class Decoder(nnx.Module):
    """L layers over the target, each token seeing those before it and the source."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        self.config = config
        self.layers = stacked(lambda key: DecoderLayer(config, key), jax.random.split(key, config.num_layers))
        self.norm = Norm(config.layer, config.embed_dim)
        is_relative = config.positions == "relative"
        self.distances = Distances(config, both_ways=False) if is_relative else nnx.data(None)

    def __call__(self, read: Read, y: Float[Array, "B T D"], seeds: Seeds | None) -> Float[Array, "B T D"]:
        """Hidden states of all tokens of known targets at once."""
        return self.looked(read, y, seeds)[0]

    def looked(self, read: Read, y: Float[Array, "B T D"], seeds: Seeds | None) -> tuple[Float[Array, "B T D"], Looks]:
        """The same, and what each token looked at."""
        x, config = positioned(y, self.config), self.config
        places = jnp.arange(x.shape[1])
        biases = self._before(places, places), hidden(read.mask)
        graphdef, state = nnx.split(self.layers)

        def body(x, turn):
            state, number = turn
            layer = gathered(nnx.merge(graphdef, state))
            return layer(x, layer.own(x), layer.cross.keys_values(read.states), biases, seeds, 1010 + 8 * number)

        x, (own, cross) = jax.lax.scan(body, x, (state, jnp.arange(config.num_layers)), unroll=True)
        return self.norm(x), Looks(decoder=own.swapaxes(0, 1), cross=cross.swapaxes(0, 1))

    def encoded(self, read: Read) -> Encoded:
        """Keys and values of the source for every layer, once for all steps."""
        return Encoded(tuple(layer.cross.keys_values(read.states) for layer in self._apart()), read.mask)

    def start(self, encoded: Encoded, length: int) -> DecoderState:
        """Before the first token, with room for so many."""
        k = encoded.source[0].k
        room = jnp.zeros((k.shape[0], length, *k.shape[2:]), k.dtype)
        return DecoderState((KeysValues(room, room),) * self.config.num_layers, jnp.zeros(k.shape[0], jnp.int32))

    def step(
        self, encoded: Encoded, state: DecoderState, y: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B D"], DecoderState, Float[Array, "B L N S"]]:
        """One token further: hidden state, what is carried on, and the weights over the source."""
        config, at = self.config, state.length[0]
        room = state.before[0].k.shape[1]
        places, x = jnp.arange(room), y[:, None]
        if config.positions == "sinusoidal":
            x = x + jax.lax.dynamic_slice_in_dim(jnp.asarray(sinusoids(room, x.shape[-1])), at, 1).astype(x.dtype)[None]
        biases = self._before(at[None], places), hidden(encoded.mask)
        before, told = [], []
        for layer, source, past in zip(self._apart(), encoded.source, state.before, strict=True):
            now = KeysValues(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, new, at, 1)
                    for old, new in zip(past, layer.own(x), strict=True)
                )
            )
            x, (_, weights) = layer(x, now, source, biases, None, 0)
            before.append(now)
            told.append(weights[:, :, 0])
        return self.norm(x)[:, 0], DecoderState(tuple(before), state.length + 1), jnp.stack(told, axis=1)

    def _before(self, queries: Int[Array, "T"], keys: Int[Array, "S"]) -> Float[Array, "1 #N T S"]:
        """What hides the tokens after each query, and its distances to the others."""
        bias = jnp.where(keys[None] <= queries[:, None], 0.0, HIDDEN)[None, None]
        return bias if self.distances is None else bias + self.distances(queries, keys)

    def _apart(self) -> list[Any]:
        """The layers one by one."""
        graphdef, state = nnx.split(self.layers)
        each = [jax.tree.map(lambda w, l=l: w[l], state) for l in range(self.config.num_layers)]
        return [nnx.merge(graphdef, state) for state in each]
