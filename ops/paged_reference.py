"""Attention to blocks of keys and values in plain jnp: what CPUs run, and the slow twin of the kernel. Knows no mesh.

Rows are read a part of their tables at a time and joined by online softmax (arXiv:1805.02867), so that the work
follows the longest row of the batch and not the longest that a table could hold. A part in which a row sees nothing
changes nothing of the row, to the bit: a row's result does not depend on the others'.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from ops.ragged import Blocks, Groups, Ragged, quantized

SLOTS = 128  # keys that are looked at together: what stays in a core's cache (docs/benchmarks/serving.md)
TOGETHER = 8  # rows whose loop is as long as the longest of them needs
HIDDEN = -1e30  # a logit that weighs nothing


def attend(
    q: Float[Array, "T N H"],
    k: Blocks,
    v: Blocks,
    rows: Ragged,
    *,
    groups: Groups,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "T N H"]:
    """Grouped-query attention of every row's queries to its own blocks; queries past a row's length give zeros."""
    outs, row, token = [], 0, 0
    for count, width in groups:
        mine = Ragged(*(x[row : row + count] for x in rows))
        part = rearrange(q[token : token + count * width], "(B t) N H -> B t N H", B=count)
        look = functools.partial(_rectangle, k=k, v=v, window=window, scale=scale, softcap=softcap)
        outs.append(_in_turns(look, part, mine))
        row, token = row + count, token + count * width
    return jnp.concatenate([rearrange(out, "B t N H -> (B t) N H") for out in outs])


def _in_turns(look: Callable, q: Float[Array, "B t N H"], rows: Ragged) -> Float[Array, "B t N H"]:
    """A few rows at a time: of many rows in the order of their lengths, most need not wait for the longest."""
    B = len(q)
    if B <= TOGETHER or B % TOGETHER:
        return look(q, rows)
    apart = jax.tree.map(lambda x: rearrange(x, "(i b) ... -> i b ...", b=TOGETHER), (q, rows))
    return rearrange(jax.lax.map(lambda part: look(*part), apart), "i b t N H -> (i b) t N H")


def write(blocks: Blocks, new: Float[Array, "T K H"], slots: Int[Array, "T"]) -> Blocks:
    """The blocks with each token in its slot, block · Z + place, in place where they are donated."""
    _, _, Z, _ = blocks.values.shape
    block, place = slots // Z, slots % Z
    if blocks.scales is None:
        values, scales = new.astype(blocks.values.dtype), None
    else:
        values, factor = quantized(new)
        scales = blocks.scales.at[block, :, place].set(factor, mode="promise_in_bounds")
    return Blocks(blocks.values.at[block, :, place].set(values, mode="promise_in_bounds"), scales)


def _rectangle(q: Float[Array, "B t N H"], rows: Ragged, *, k: Blocks, v: Blocks, window, scale, softcap):
    """Rows of the same number of queries."""
    B, t, N, H = q.shape
    P, K, Z, _ = k.values.shape
    _, M = rows.tables.shape
    step = max(1, SLOTS // Z)  # blocks
    tables = jnp.pad(rows.tables, ((0, 0), (0, -M % step)))
    q = rearrange(q * jnp.asarray(scale, q.dtype), "B t (K G) H -> B K (G t) H", K=K)
    within = jnp.arange(t, dtype=jnp.int32)[None]
    positions = rows.positions[:, None] + within
    is_query = within < rows.lengths[:, None]
    last = jnp.max(jnp.where(is_query, positions, -1), initial=-1)
    first = jnp.int32(0)
    if window is not None:
        seen = jnp.where(rows.lengths > 0, jnp.maximum(rows.positions - window + 1, 0), last)
        first = jnp.maximum(jnp.min(seen, initial=jnp.iinfo(jnp.int32).max), 0) // (step * Z)

    def part(i, carry):
        out, most, total = carry
        table = jax.lax.dynamic_slice_in_dim(tables, i * step, step, axis=1)
        keys, values = _gathered(k, table, q.dtype), _gathered(v, table, q.dtype)
        logits = jnp.einsum("BKQH,BKSH->BKQS", q, keys, preferred_element_type=jnp.float32)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        slots = i * step * Z + jnp.arange(step * Z, dtype=jnp.int32)
        distance = positions[:, :, None] - slots[None, None]
        mask = (distance >= 0) & is_query[:, :, None]
        if window is not None:
            mask = mask & (distance < window)
        mask = jnp.tile(mask, (1, N // K, 1))[:, None]
        logits = jnp.where(mask, logits, HIDDEN)
        top = jnp.maximum(most, jnp.max(logits, axis=-1))
        weights = jnp.where(mask, jnp.exp(logits - top[..., None]), 0.0)
        fade = jnp.exp(most - top)
        seen = jnp.any(mask, axis=2)[..., None]  # what a block that nobody sees holds, NaN too, weighs nothing
        added = jnp.einsum(
            "BKQS,BKSH->BKQH", weights.astype(q.dtype), jnp.where(seen, values, 0), preferred_element_type=jnp.float32
        )
        return out * fade[..., None] + added, top, total * fade + jnp.sum(weights, axis=-1)

    shape = (B, K, q.shape[2])
    begin = (jnp.zeros((*shape, H), jnp.float32), jnp.full(shape, HIDDEN), jnp.zeros(shape, jnp.float32))
    out, _, total = jax.lax.fori_loop(first, last // (step * Z) + 1, part, begin)
    out = (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype)
    return rearrange(out, "B K (G t) H -> B t (K G) H", t=t)


def _gathered(blocks: Blocks, table: Int[Array, "B m"], dtype) -> Float[Array, "B K S H"]:
    """The rows' blocks side by side, heads first: each head of a block is looked up by itself, so nothing is moved."""
    P, K, Z, H = blocks.values.shape
    index = table[:, None, :] * K + jnp.arange(K, dtype=table.dtype)[None, :, None]
    take = {"mode": "promise_in_bounds"}
    found = blocks.values.reshape(P * K, Z, H).at[index].get(**take).astype(dtype)
    if blocks.scales is not None:
        scales = blocks.scales.reshape(P * K, Z).at[index].get(**take)
        found = found * scales[..., None].astype(dtype)
    return rearrange(found, "B K m Z H -> B K (m Z) H")
