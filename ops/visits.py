"""Which blocks of queries meet which blocks of keys: the list that is an attention kernel's grid. Knows no q, k, v.

Read from the places at run time: a hidden pair of blocks costs neither a copy nor a step, and only blocks on an edge
need a mask. The list is in order of query block, then key block; each visit is one integer in scalar memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from ops.attention import Places

NOTHING, SOME, ALL = 0, 1, 2  # what the queries of a visit see of its keys
SEEN, FIRST, LAST = 3, 4, 8  # a visit's bits: what is seen, first and last visit of its key block,
KEY, QUERY, MOST_BLOCKS = 4, 17, 2**13  # and the shifts of its blocks, each less than this many
EVERYTHING = 2**31 - 1  # a window that hides nothing


class Visits(NamedTuple):
    """What a kernel reads before it copies blocks. A row's list has room for all pairs of blocks."""

    visits: Int[Array, "B*visits"]
    leaving: Int[Array, "B*visits"]  # the next key block, counting this one, that has its last visit
    counts: Int[Array, "B"]  # of visits; the rest of a row's list is empty
    window: Int[Array, "1"]


class Visit(NamedTuple):
    """What a kernel knows of the visit it is at."""

    key: Array  # block
    seen: Array  # NOTHING, SOME or ALL
    starts: Array  # the first of its query block
    ends: Array
    is_first: Array  # of its key block
    is_last: Array


class _Range(NamedTuple):
    """First and last token of each block, by segment and then position."""

    first: Int[Array, "B blocks"]
    low: Int[Array, "B blocks"]
    last: Int[Array, "B blocks"]
    high: Int[Array, "B blocks"]


def plan(q_at: Places, k_at: Places, window: Int[Array, ""] | int | None, *, queries: int, keys: int) -> Visits:
    """All visits of blocks of so many queries to blocks of so many keys."""
    window = jnp.asarray(EVERYTHING if window is None else window, jnp.int32)
    seen = _seen(_range(q_at, queries), _range(k_at, keys), window)
    B, num_queries, num_keys = seen.shape
    assert max(num_queries, num_keys) <= MOST_BLOCKS, seen.shape
    query, key = jnp.arange(num_queries)[None, :, None], jnp.arange(num_keys)[None, None]
    visited = seen > NOTHING
    # a block that meets none has a visit all the same, to be written as zeros
    visited |= ~jnp.any(visited, axis=2, keepdims=True) & (key == 0)
    visited |= ~jnp.any(visited, axis=1, keepdims=True) & (query == 0)
    first = query == jnp.argmax(visited, axis=1, keepdims=True)
    last = query == num_queries - 1 - jnp.argmax(visited[:, ::-1], axis=1, keepdims=True)
    visits = (query << QUERY) | (key << KEY) | jnp.where(last, LAST, 0) | jnp.where(first, FIRST, 0) | seen
    visits = jnp.sort(jnp.where(visited, visits, EVERYTHING).reshape(B, -1), axis=1)
    counts = jnp.sum(visited, axis=(1, 2), dtype=jnp.int32)
    _, length = visits.shape
    place = jnp.arange(length)[None]
    leaves = (visits & LAST > 0) & (place < counts[:, None])
    nearest = jnp.where(leaves, place * MOST_BLOCKS + (visits >> KEY) % MOST_BLOCKS, EVERYTHING)
    leaving = jax.lax.cummin(nearest, axis=1, reverse=True) % MOST_BLOCKS
    return Visits(visits.ravel(), leaving.ravel(), counts, window.reshape(1))


def query_block(row, t, visits, leaving, counts, window):
    """Of visit `t`; behind the list's end that of the last, so that nothing is copied."""
    return visits[_place(row, t, visits, counts)] >> QUERY


def key_block(row, t, visits, leaving, counts, window):
    """As `query_block`, of the keys."""
    return _key(visits[_place(row, t, visits, counts)])


def leaving_block(row, t, visits, leaving, counts, window):
    """Where the key block written next belongs: a block is written at its last visit."""
    return leaving[_place(row, t, visits, counts)]


def visit_of(visits: Visits) -> Visit:
    """The visit a kernel is at, of the grid (row, head, visit)."""
    row, t = pl.program_id(0), pl.program_id(2)
    (size,), (num_rows,), count = visits.visits.shape, visits.counts.shape, visits.counts[row]
    here = row * (size // num_rows) + t
    visit, alive = visits.visits[here], t < count
    before, after = visits.visits[jnp.maximum(here - 1, 0)], visits.visits[jnp.minimum(here + 1, size - 1)]
    return Visit(
        key=_key(visit),
        seen=jnp.where(alive, visit & SEEN, NOTHING),
        starts=alive & ((t == 0) | (before >> QUERY != visit >> QUERY)),
        ends=alive & ((t == count - 1) | (after >> QUERY != visit >> QUERY)),
        is_first=alive & (visit & FIRST > 0),
        is_last=alive & (visit & LAST > 0),
    )


def _place(row, t, visits, counts):
    (size,), (num_rows,) = visits.shape, counts.shape
    return row * (size // num_rows) + jnp.minimum(t, counts[row] - 1)


def _key(visit):
    return (visit >> KEY) & (MOST_BLOCKS - 1)


def _seen(q: _Range, k: _Range, window: Int[Array, ""]) -> Int[Array, "B T S"]:
    """What a block of queries may see of a block of keys. Nothing and all are certain, some is not."""
    q = _Range(*(x[:, :, None] for x in q))
    k = _Range(*(x[:, None, :] for x in k))
    overlap = (k.first <= q.last) & (q.first <= k.last)
    some = overlap & ((k.first < q.last) | (k.low <= q.high)) & ((q.first < k.last) | (q.low - k.high < window))
    one = (q.first == q.last) & (k.first == k.last) & (q.first == k.first)
    everything = one & (q.low >= k.high) & (q.high - k.low < window)
    return jnp.where(everything, ALL, jnp.where(some, SOME, NOTHING)).astype(jnp.int32)


def _range(at: Places, block: int) -> _Range:
    positions, segments = (rearrange(x, "B (blocks T) -> B blocks T", T=block) for x in at)
    segments = jnp.where(segments <= 0, EVERYTHING + segments, segments)  # padding stands last
    first, last = jnp.min(segments, axis=2, keepdims=True), jnp.max(segments, axis=2, keepdims=True)
    low = jnp.min(jnp.where(segments == first, positions, EVERYTHING), axis=2)
    high = jnp.max(jnp.where(segments == last, positions, -EVERYTHING), axis=2)
    return _Range(first[..., 0], low, last[..., 0], high)
