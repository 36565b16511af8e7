"""What a query can look back at: the batch itself (Packed, Ring, GatheredKV) or a cache (Dense, Beginning).

Knows no weights.
"""

import dataclasses
import importlib
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from ops import attention
from ops.attention import Places
from parallel import ring_attention
from parallel.sharding import place

# Modules with `forward` and `backward`: attention to keys in any order.
KERNELS = {"plain": "ops.attention", "pallas": "ops.flash_attention"}

CACHE_NAMES = ("batch", "act_heads", None, None)


def kernel(name: str) -> Any:
    """The module, imported when it is asked for: Pallas is slow to import, and inference does without."""
    return importlib.import_module(KERNELS[name])


class Queries(NamedTuple):
    """Where the tokens being computed stand."""

    positions: Int[Array, "B T"]  # in their document, from 0
    segments: Int[Array, "B T"]  # which document of the row, from 1; 0 is padding


class Rule(NamedTuple):
    """How attention logits are made."""

    scale: float  # multiplies q·k
    softcap: float | None  # cap * tanh(logits / cap)
    window: Int[Array, ""] | int | None  # tokens seen, the query's own included


@runtime_checkable
class Memory(Protocol):
    """Anything that attention can read and extend."""

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        queries: Queries,
        rule: Rule,
    ) -> tuple[Float[Array, "B T N H"], "Memory"]:
        """Remember `k` and `v`, let `q` look at what it may see; -> out, the memory after."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Training's memory: the keys are the batch itself, documents apart by segment. Holds nothing."""

    kernel: str = dataclasses.field(default="plain", metadata={"static": True})  # a key of OWN_ROWS

    def attend(self, q, k, v, queries: Queries, rule: Rule):
        """Causal attention inside each document of a row."""
        return OWN_ROWS[self.kernel](q, k, v, Places(*queries), **rule._asdict()), self


def _plain(q, k, v, at: Places, **rule):
    return checkpoint_name(attention.causal(q, k, v, at.segments, **rule), "attention_out")


def _pallas(q, k, v, at: Places, **rule):
    return kernel("pallas").attend(q, k, v, at, at, **rule)


OWN_ROWS = {"plain": _plain, "pallas": _pallas}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Training's memory where a row is split over devices: keys pass by in turn. Inside a manual `shard_map` only."""

    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})  # mesh axes that split the row
    balanced: bool = dataclasses.field(metadata={"static": True})  # tokens are in the order of ring_attention.zigzag
    kernel: str = dataclasses.field(default="plain", metadata={"static": True})  # a key of KERNELS

    def attend(self, q, k, v, queries: Queries, rule: Rule):
        """Causal attention inside each document of a row, whichever devices hold it."""
        how = {"axes": self.axes, "balanced": self.balanced, "kernel": kernel(self.kernel)}
        return ring_attention.ring(q, k, v, Places(*queries), **how, **rule._asdict()), self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatheredKV:
    """As Ring, by gathering the keys of the whole row first. Any order of tokens."""

    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})  # mesh axes that split the row
    kernel: str = dataclasses.field(default="plain", metadata={"static": True})  # a key of KERNELS

    def attend(self, q, k, v, queries: Queries, rule: Rule):
        """Causal attention inside each document of a row, whichever devices hold it."""
        how = {"axes": self.axes, "kernel": kernel(self.kernel)}
        return ring_attention.gathered(q, k, v, Places(*queries), **how, **rule._asdict()), self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A cache of S slots per sequence; the key of position p stands in slot p.

    A slot past a sequence's end may hold anything: it is written before its position is reached.
    """

    k: Any  # [B, K, S, H], stacked [L, ...] where layers are; an array, or the shape or sharding of one
    v: Any

    def attend(self, q, k, v, queries: Queries, rule: Rule):
        """Write T consecutive tokens from each row's first position on, then look at all slots up to each query."""
        at, (scale, softcap, window) = queries.positions, rule
        after = Dense(place(_write(self.k, k, at), CACHE_NAMES), place(_write(self.v, v, at), CACHE_NAMES))
        out = attention.cached(q, after.k, after.v, at, window=window, scale=scale, softcap=softcap)
        return out, after


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beginning:
    """A Dense cache at the start of its sequences: nothing to look back at, so a query looks at its own batch alone.

    The same answers as from Dense, without the products with slots that no query sees.
    """

    cache: Dense

    def attend(self, q, k, v, queries: Queries, rule: Rule):
        """Write T tokens into the first T slots of every row; what a query sees stands in `k` and `v` already."""
        T, (scale, softcap, window) = k.shape[1], rule
        mine, own = (self.cache.k, self.cache.v), jnp.ones_like(queries.segments)
        new = (rearrange(x, "B T K H -> B K T H").astype(cache.dtype) for x, cache in zip((k, v), mine, strict=True))
        after = (place(cache.at[:, :, :T].set(x), CACHE_NAMES) for cache, x in zip(mine, new, strict=True))
        out = attention.causal(q, k, v, own, window=window, scale=scale, softcap=softcap)
        return out, Beginning(Dense(*after))


def _write(cache: Float[Array, "B K S H"], new: Float[Array, "B T K H"], positions: Int[Array, "B T"]):
    """The cache with each token in the slot of its position, in place where the cache is donated."""
    B, T, *_ = new.shape
    rows = jnp.broadcast_to(jnp.arange(B, dtype=positions.dtype)[:, None], (B, T))
    return cache.at[rows, :, positions].set(new.astype(cache.dtype), mode="promise_in_bounds", unique_indices=True)


def dense_cache(config: ModelConfig, batch: int, slots: int) -> "Dense | tuple[Dense, ...]":
    """Empty cache for every layer: stacked [L, ...] where layers are scanned, else one Dense a layer."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    dtype = jnp.dtype(config.compute_dtype)
    if config.scan_layers:
        shape = (config.num_layers, *shape)
        return Dense(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return tuple(Dense(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def dense_rows(memory: "Dense | tuple[Dense, ...]", rows: Int[Array, "b"]) -> "Dense | tuple[Dense, ...]":
    """The memory whose row i is row rows[i] of this one: rows are dropped, moved or repeated."""
    return jax.tree.map(lambda cache: jnp.take(cache, rows, axis=cache.ndim - 4), memory)


def dense_grown(memory: "Dense | tuple[Dense, ...]", slots: int) -> "Dense | tuple[Dense, ...]":
    """The same memory with more slots, the new ones empty."""

    def grown(cache):
        *_, S, _ = cache.shape
        return jnp.pad(cache, [(0, 0)] * (cache.ndim - 2) + [(0, slots - S), (0, 0)])

    return jax.tree.map(grown, memory)
