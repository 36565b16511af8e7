"""What a query can look back at: the batch itself (Packed, Ring, GatheredKV) or a cache (Dense, Paged).

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
from ops.ragged import LANES, Blocks, Groups, Ragged
from parallel import ring_attention
from parallel.sharding import place

# Modules with `forward` and `backward`: attention to keys in any order.
KERNELS = {"plain": "ops.attention", "pallas": "ops.flash_attention"}

# Modules with `attend`, queries of rows of any lengths to blocks, and `write`, tokens into blocks.
PAGED_KERNELS = {"plain": "ops.paged_reference", "pallas": "parallel.paged_attention"}

CACHE_NAMES = ("batch", "act_heads", None, None)
BLOCK_NAMES = (None, "act_heads", None, None)


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
@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged:
    """A cache in blocks that any sequences share: which block a token is written to, and which a query sees, is said.

    Tokens stand flat, [T, 1]: rows of any lengths, one after the other.
    """

    k: Blocks  # [P, K, Z, H]; all leaves are stacked [L, ...] where layers are
    v: Blocks
    rows: Ragged
    slots: Any  # [T], where each token is written: block · Z + place in it; block 0 takes what nobody wants
    groups: Groups = dataclasses.field(metadata={"static": True})
    kernel: str = dataclasses.field(metadata={"static": True})  # a key of PAGED_KERNELS

    def attend(self, q, k, v, queries: Queries, rule: Rule):
        """Write all tokens, then look: tokens of one sequence may stand in several rows of the batch."""
        q, k, v = (rearrange(x, "T 1 N H -> T N H") for x in (q, k, v))
        room = importlib.import_module(PAGED_KERNELS[self.kernel])
        k, v = (_placed(room.write(blocks, new, self.slots)) for blocks, new in ((self.k, k), (self.v, v)))
        out = room.attend(q, k, v, self.rows, groups=self.groups, **rule._asdict())
        return rearrange(out, "T N H -> T 1 N H"), dataclasses.replace(self, k=k, v=v)


def _placed(blocks: Blocks) -> Blocks:
    return blocks._replace(values=place(blocks.values, BLOCK_NAMES))


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


def empty_blocks(config: ModelConfig, num_blocks: int, block_size: int, *, int8: bool) -> Blocks:
    """Keys or values of one layer: nothing in them yet. For a TPU's kernel, rows are whole lanes."""
    lanes = LANES if config.kernel == "pallas" else 1
    H, Z = (-(-size // lanes) * lanes for size in (config.head_dim, block_size))
    shape = (num_blocks, config.num_kv_heads, block_size, H)
    if int8:
        return Blocks(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:2], Z), jnp.float32))
    return Blocks(jnp.zeros(shape, jnp.dtype(config.compute_dtype)), None)
