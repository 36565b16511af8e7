"""Attention for the TPU in Pallas, forward and backward, over the blocks that some query sees. Knows no mesh.

arXiv:2205.14135 with logits stored keys by queries, [S, T]: what belongs to a query (maximum, sum, log-sum-exp) is then a
row, spread over sublanes at no cost, and only H-wide arrays are ever transposed. Softmax in float32 and in base 2.

Which block of keys a block of queries sees is read from the places at run time and becomes a list of visits, which is the
grid: a hidden pair of blocks costs neither a copy nor a step, and only blocks on an edge compute a mask.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ops.attention import Places

EMPTY = -1e30  # log-sum-exp of a query that sees nothing
HIDDEN = -1e38  # a logit that weighs nothing, even beside EMPTY
LOG2_E = math.log2(math.e)
EVERYTHING = 2**31 - 1  # a window that hides nothing
NOTHING, SOME, ALL = 0, 1, 2  # what the queries of a visit see of its keys
SEEN, FIRST, LAST = 3, 4, 8  # a visit in one integer: what is seen, first and last visit of its key block,
KEY, QUERY, MOST_BLOCKS = 4, 17, 2**13  # and the shifts of its blocks, each less than this many
HEADS_AT_ONCE = 2  # query heads in one stretch of the program; more are looped over
KEYS_AT_ONCE = 256  # in a step of the running softmax
KEPT_BYTES = 2**24  # of float32 d_k and d_v of one head, which the backward kernel keeps in VMEM
VMEM_BYTES = 48 * 2**20
TRANSPOSED, ACROSS, PLAIN = ((0,), (0,)), ((1,), (1,)), ((1,), (0,))  # products aᵀ b, a bᵀ and a b


class Blocks(NamedTuple):
    """How many queries, of every head of a group, meet how many keys in one visit."""

    queries: int
    keys: int


BLOCKS = Blocks(512, 512)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_at: Places,
    k_at: Places,
    *,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`forward` with its gradient. A remat policy that saves "attention_out" and "attention_lse" runs it once."""
    return _attend(q, k, v, q_at, k_at, window, scale, softcap, interpret)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_at: Places,
    k_at: Places,
    *,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
    blocks: Blocks = BLOCKS,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention of queries to keys, wherever both stand, and its log-sum-exp: 0 and -1e30 where a query sees nothing."""
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block, q_at, k_at = _fit(blocks, q_at, k_at)
    scalars, spec = _plan(block, q_at, k_at, window, N // K, H)
    q, k, v = _heads(q, K, block.queries), _heads(k, K, block.keys), _heads(v, K, block.keys)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, K, jnp.max(scalars.counts)),
            in_specs=[spec.queries, spec.keys, spec.keys, spec.query_places, spec.key_places],
            out_specs=[spec.queries, spec.rows],
            scratch_shapes=[_kept(N // K, block.queries)] * 2 + [_kept(N // K, H, block.queries)],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)],
        compiler_params=_compiler_params(),
        cost_estimate=_cost((q, q, k, v), pairs=B * N * T * S, products=2, H=H),
        name="attention_forward",
        interpret=interpret,
    )(*scalars, q, k, v, jnp.stack(q_at, axis=1), jnp.stack(k_at, axis=1))
    return _tokens(out, T), rearrange(lse[..., :T], "B K G T -> B (K G) T")


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    q_at: Places,
    k_at: Places,
    *,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
    blocks: Blocks = BLOCKS,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of `forward`; `out` and `lse` may stand for more keys than these (ring attention passes those of all)."""
    _, S, _, H = k.shape
    delta = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32)
    part = max(blocks.keys, KEPT_BYTES // (2 * 4 * max(H, 128)) // blocks.keys * blocks.keys)
    knobs = dict(window=window, scale=scale, softcap=softcap, blocks=blocks, interpret=interpret)
    if part >= S:
        return _backward(q, k, v, lse, delta, d_out, q_at, k_at, **knobs)
    d_q, d_k, d_v = jnp.zeros(q.shape, jnp.float32), [], []
    for start in range(0, S, part):
        here = slice(start, start + part)
        at = Places(*(row[:, here] for row in k_at))
        more = _backward(q, k[:, here], v[:, here], lse, delta, d_out, q_at, at, **knobs)
        d_q, d_k, d_v = d_q + more[0].astype(jnp.float32), [*d_k, more[1]], [*d_v, more[2]]
    return d_q.astype(q.dtype), jnp.concatenate(d_k, axis=1), jnp.concatenate(d_v, axis=1)


def _backward(q, k, v, lse, delta, d_out, q_at, k_at, *, window, scale, softcap, blocks, interpret):
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block, q_at, k_at = _fit(blocks, q_at, k_at)
    scalars, spec = _plan(block, q_at, k_at, window, N // K, H)
    q, d_out = _heads(q, K, block.queries), _heads(d_out, K, block.queries)
    k, v = _heads(k, K, block.keys), _heads(v, K, block.keys)
    rows = [_pad(rearrange(row, "B (K G) T -> B K G T", K=K), 3, block.queries) for row in (lse * LOG2_E, delta)]
    *_, keys, _ = k.shape
    d_q, d_k, d_v = pl.pallas_call(
        functools.partial(_backward_kernel, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, K, jnp.max(scalars.counts)),
            in_specs=[
                *(spec.queries, spec.keys, spec.keys, spec.queries, spec.rows, spec.rows),
                *(spec.query_places, spec.key_places),
            ],
            out_specs=[spec.queries, spec.leaving_keys, spec.leaving_keys],
            scratch_shapes=[_kept(N // K, H, block.queries), _kept(keys, H), _kept(keys, H)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        compiler_params=_compiler_params(),
        cost_estimate=_cost((q, q, q, k, k, v, v), pairs=B * N * T * S, products=5, H=H),
        name="attention_backward",
        interpret=interpret,
    )(*scalars, q, k, v, d_out, *rows, jnp.stack(q_at, axis=1), jnp.stack(k_at, axis=1))
    return _tokens(d_q, T), _tokens(d_k, S), _tokens(d_v, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(q, k, v, q_at, k_at, window, scale, softcap, interpret):
    return forward(q, k, v, q_at, k_at, window=window, scale=scale, softcap=softcap, interpret=interpret)[0]


def _attend_forward(q, k, v, q_at, k_at, window, scale, softcap, interpret):
    out, lse = forward(q, k, v, q_at, k_at, window=window, scale=scale, softcap=softcap, interpret=interpret)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, out, lse, q_at, k_at, window)


def _attend_backward(scale, softcap, interpret, residuals, d_out):
    q, k, v, out, lse, q_at, k_at, window = residuals
    knobs = dict(window=window, scale=scale, softcap=softcap, interpret=interpret)
    return *backward(q, k, v, out, lse, d_out, q_at, k_at, **knobs), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# Kernels. A visit is one block of queries of G heads meeting one block of keys of their KV head.


def _forward_kernel(
    *refs,
    scale: float,
    softcap: float | None,
):
    scalars, (q_ref, k_ref, v_ref, q_at_ref, k_at_ref), (out_ref, lse_ref), (top_ref, sum_ref, acc_ref) = _split(
        refs, 5, 2
    )
    visit = _visit(scalars)
    *_, G, _, _ = q_ref.shape
    *_, size, _ = k_ref.shape

    @pl.when(visit.starts)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, EMPTY, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def meet(heads, mask):
        parts = [pl.ds(start, min(KEYS_AT_ONCE, size - start)) for start in range(0, size, KEYS_AT_ONCE)]

        def logits(g, part):
            hidden = None if mask is None else mask[part.start : part.start + part.size]
            return _logits(k_ref[0, 0, 0, part], q_ref[0, 0, g], hidden, scale, softcap)[0]

        # the next product stands before this softmax, so that the compiler runs them side by side
        work = [(g, part) for g in heads for part in parts]
        ahead = logits(*work[0])
        for step, (g, part) in enumerate(work):
            now, row = ahead, pl.ds(g, 1)
            if step + 1 < len(work):
                ahead = logits(*work[step + 1])
            if part is parts[0]:
                top, total, acc = top_ref[row], sum_ref[row], acc_ref[g]
            v = v_ref[0, 0, 0, part]
            before, top = top, jnp.maximum(top, jnp.max(now, axis=0, keepdims=True))
            weights, shrunk = jnp.exp2(now - top), jnp.exp2(before - top)
            total = total * shrunk + jnp.sum(weights, axis=0, keepdims=True)
            acc = acc * shrunk + _dot(v, weights.astype(v.dtype), TRANSPOSED)
            if part is parts[-1]:
                top_ref[row], sum_ref[row], acc_ref[g] = top, total, acc

    _meet(visit, q_at_ref, k_at_ref, scalars.window, G, meet)

    @pl.when(visit.ends)
    def _():
        def finish(heads):
            for g in heads:
                row = pl.ds(g, 1)
                sees = sum_ref[row] > 0
                total = jnp.where(sees, sum_ref[row], 1.0)
                out_ref[0, 0, g] = (acc_ref[g] / total).T.astype(out_ref.dtype)
                lse_ref[0, 0, row] = jnp.where(sees, (top_ref[row] + jnp.log2(total)) / LOG2_E, EMPTY)

        _for_heads(G, finish)


def _backward_kernel(*refs, scale: float, softcap: float | None):
    scalars, inputs, (d_q_ref, d_k_ref, d_v_ref), (q_acc, k_acc, v_acc) = _split(refs, 8, 3)
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, q_at_ref, k_at_ref = inputs
    visit = _visit(scalars)
    *_, G, _, _ = q_ref.shape
    *_, size, H = k_ref.shape
    here = pl.ds(visit.key * size, size)

    @pl.when(visit.starts)
    def _():
        q_acc[...] = jnp.zeros(q_acc.shape, jnp.float32)

    @pl.when(visit.is_first)
    def _():
        k_acc[here] = jnp.zeros((size, H), jnp.float32)
        v_acc[here] = jnp.zeros((size, H), jnp.float32)

    def meet(heads, mask):
        for g in heads:
            row = pl.ds(g, 1)
            q, k, v, d_out = q_ref[0, 0, g], k_ref[0, 0, 0], v_ref[0, 0, 0], d_out_ref[0, 0, g]
            logits, slope = _logits(k, q, mask, scale, softcap)
            weights = jnp.exp2(logits - lse_ref[0, 0, row])
            v_acc[here] += _dot(weights.astype(d_out.dtype), d_out, PLAIN)
            d_logits = weights * (_dot(v, d_out, ACROSS) - delta_ref[0, 0, row])
            d_logits = (d_logits if slope is None else d_logits * slope).astype(q.dtype)
            k_acc[here] += _dot(d_logits, q, PLAIN)
            q_acc[g] += _dot(k, d_logits, TRANSPOSED)

    _meet(visit, q_at_ref, k_at_ref, scalars.window, G, meet)

    @pl.when(visit.ends)
    def _():
        def finish(heads):
            for g in heads:
                d_q_ref[0, 0, g] = (q_acc[g] * scale).T.astype(d_q_ref.dtype)

        _for_heads(G, finish)

    @pl.when(visit.is_last)
    def _():
        d_k_ref[0, 0, 0] = (k_acc[here] * scale).astype(d_k_ref.dtype)
        d_v_ref[0, 0, 0] = v_acc[here].astype(d_v_ref.dtype)


def _meet(visit, q_at_ref, k_at_ref, window, G, meet):
    """Run `meet` for all query heads, with a mask where not all is seen."""

    @pl.when(visit.seen == SOME)
    def _():
        q_positions, q_segments = q_at_ref[0, 0:1], q_at_ref[0, 1:2]
        k_positions, k_segments = (jnp.transpose(k_at_ref[0, part : part + 1]) for part in (0, 1))
        distance = q_positions - k_positions
        visible = (distance >= 0) & (distance < window[0]) & (q_segments == k_segments)
        mask = jnp.where(visible, 0.0, HIDDEN)
        _for_heads(G, lambda heads: meet(heads, mask))

    @pl.when(visit.seen == ALL)
    def _():
        _for_heads(G, lambda heads: meet(heads, None))


def _for_heads(G, run):
    """`run` with a few heads at a time."""
    size = math.gcd(G, HEADS_AT_ONCE)
    if size == G:
        run(range(G))
    else:
        jax.lax.fori_loop(0, G // size, lambda n, _: run([n * size + g for g in range(size)]), None)


def _logits(k, q, mask, scale, softcap):
    """Of one head, [keys, queries], in units of log 2; and the slope of the cap."""
    logits, slope = _dot(k, q, ACROSS), None
    if softcap is None:
        logits = logits * (scale * LOG2_E)
    else:
        bent = jnp.tanh(logits * (scale / softcap))
        logits, slope = bent * (softcap * LOG2_E), 1 - bent * bent
    return (logits if mask is None else logits + mask), slope


def _dot(a, b, contract):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


# The list of visits, made before the kernel, and read in it.


class _Scalars(NamedTuple):
    """What the kernel reads before it copies blocks, in SMEM. A row's list has room for all pairs of blocks."""

    visits: Int[Array, "B*visits"]
    leaving: Int[Array, "B*visits"]  # the next key block, counting this one, that has its last visit
    counts: Int[Array, "B"]  # of visits; the rest of a row's list is empty
    window: Int[Array, "1"]


class _Visit(NamedTuple):
    """What the kernel knows of the visit it is at."""

    key: Array  # block
    seen: Array  # NOTHING, SOME or ALL
    starts: Array  # the first of its query block
    ends: Array
    is_first: Array  # of its key block
    is_last: Array


class _Specs(NamedTuple):
    """Blocks of a visit in the arrays."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    leaving_keys: pl.BlockSpec
    rows: pl.BlockSpec
    query_places: pl.BlockSpec
    key_places: pl.BlockSpec


class _Range(NamedTuple):
    """First and last token of each block, by segment and then position."""

    first: Int[Array, "B blocks"]
    low: Int[Array, "B blocks"]
    last: Int[Array, "B blocks"]
    high: Int[Array, "B blocks"]


def _plan(block, q_at, k_at, window, G, H):
    """The visits, and where their blocks lie."""
    window = jnp.asarray(EVERYTHING if window is None else window, jnp.int32)
    seen = _seen(_range(q_at, block.queries), _range(k_at, block.keys), window)
    B, num_queries, num_keys = seen.shape
    assert max(num_queries, num_keys) <= MOST_BLOCKS, (seen.shape, block)
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
    return _Scalars(visits.ravel(), leaving.ravel(), counts, window.reshape(1)), _specs(block, length, G, H)


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
    first, last = jnp.min(segments, axis=2, keepdims=True), jnp.max(segments, axis=2, keepdims=True)
    low = jnp.min(jnp.where(segments == first, positions, EVERYTHING), axis=2)
    high = jnp.max(jnp.where(segments == last, positions, -EVERYTHING), axis=2)
    return _Range(first[..., 0], low, last[..., 0], high)


def _specs(block: Blocks, length: int, G: int, H: int) -> _Specs:
    def place(row, t, counts):
        return row * length + jnp.minimum(t, counts[row] - 1)

    def query(row, t, visits, leaving, counts, window):
        return visits[place(row, t, counts)] >> QUERY

    def key(row, t, visits, leaving, counts, window):
        return (visits[place(row, t, counts)] >> KEY) & (MOST_BLOCKS - 1)

    def leaving_key(row, t, visits, leaving, counts, window):
        return leaving[place(row, t, counts)]

    return _Specs(
        queries=pl.BlockSpec((1, 1, G, block.queries, H), lambda b, h, t, *s: (b, h, 0, query(b, t, *s), 0)),
        keys=pl.BlockSpec((1, 1, 1, block.keys, H), lambda b, h, t, *s: (b, h, 0, key(b, t, *s), 0)),
        leaving_keys=pl.BlockSpec((1, 1, 1, block.keys, H), lambda b, h, t, *s: (b, h, 0, leaving_key(b, t, *s), 0)),
        rows=pl.BlockSpec((1, 1, G, block.queries), lambda b, h, t, *s: (b, h, 0, query(b, t, *s))),
        query_places=pl.BlockSpec((1, 2, block.queries), lambda b, h, t, *s: (b, 0, query(b, t, *s))),
        key_places=pl.BlockSpec((1, 2, block.keys), lambda b, h, t, *s: (b, 0, key(b, t, *s))),
    )


def _visit(scalars: _Scalars) -> _Visit:
    row, t = pl.program_id(0), pl.program_id(2)
    (size,), (num_rows,), count = scalars.visits.shape, scalars.counts.shape, scalars.counts[row]
    here = row * (size // num_rows) + t
    visit, alive = scalars.visits[here], t < count
    before, after = scalars.visits[jnp.maximum(here - 1, 0)], scalars.visits[jnp.minimum(here + 1, size - 1)]
    return _Visit(
        key=(visit >> KEY) & (MOST_BLOCKS - 1),
        seen=jnp.where(alive, visit & SEEN, NOTHING),
        starts=alive & ((t == 0) | (before >> QUERY != visit >> QUERY)),
        ends=alive & ((t == count - 1) | (after >> QUERY != visit >> QUERY)),
        is_first=alive & (visit & FIRST > 0),
        is_last=alive & (visit & LAST > 0),
    )


def _split(refs, num_inputs, num_outputs):
    """A kernel's references: scalars, inputs, outputs, scratch."""
    first = len(_Scalars._fields)
    second, third = first + num_inputs, first + num_inputs + num_outputs
    return _Scalars(*refs[:first]), refs[first:second], refs[second:third], refs[third:]


# Layout.


def _fit(blocks: Blocks, q_at: Places, k_at: Places) -> tuple[Blocks, Places, Places]:
    """Blocks in lanes of 128 that leave little over, and places for what is over, which see nothing and are not seen."""

    def fit(length, most):
        return -(-length // -(-length // most) // 128) * 128

    (_, T), (_, S) = q_at.positions.shape, k_at.positions.shape
    block = Blocks(fit(T, blocks.queries), fit(S, blocks.keys))
    q_at = Places(_pad(q_at.positions, 1, block.queries), _pad(q_at.segments, 1, block.queries, -1))
    k_at = Places(_pad(k_at.positions, 1, block.keys), _pad(k_at.segments, 1, block.keys, -2))
    return block, q_at, k_at


def _pad(x, dim: int, multiple: int, value: int = 0):
    over = -x.shape[dim] % multiple
    return jnp.pad(x, [(0, over if d == dim else 0) for d in range(x.ndim)], constant_values=value) if over else x


def _heads(x: Float[Array, "B T N H"], K: int, block: int) -> Float[Array, "B K G t H"]:
    return _pad(rearrange(x, "B T (K G) H -> B K G T H", K=K), 3, block)


def _tokens(x: Float[Array, "B K G t H"], T: int) -> Float[Array, "B T N H"]:
    return rearrange(x[:, :, :, :T], "B K G T H -> B T (K G) H")


def _kept(*shape: int):
    return pltpu.VMEM(shape, jnp.float32)


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)


def _cost(arrays, *, pairs: int, products: int, H: int) -> pl.CostEstimate:
    """As if half of the pairs were seen; which are is known at run time only."""
    return pl.CostEstimate(
        flops=products * pairs * H,
        transcendentals=pairs // 2,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
