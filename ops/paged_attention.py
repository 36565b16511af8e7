"""Attention to blocks of keys and values for the TPU in Pallas: rows of any length, each to its own. Knows no mesh.

Its slow twin is `ops/paged_reference.py`. The pools stay in HBM; a row's blocks are copied from where its table says
(PagedAttention, arXiv:2309.06180), a stretch of them at a time, while the stretch before is computed with: copies are
in flight across the end of a row, too. Only blocks that some query of the row sees are copied. Logits stand queries by
slots, [heads, queries, slots], so that one query of a few heads is a few registers. Softmax is online, in base 2.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ops.ragged import Blocks, Groups, Ragged, quantized

EMPTY = -1e30  # the largest logit of a query that has seen nothing yet
HIDDEN = -1e38  # a logit that weighs nothing, even beside EMPTY
EVERYTHING = 2**30  # as a window
LOG2_E = math.log2(math.e)
SLOTS = 512  # of a stretch
COPIED_BYTES = 2**21  # of a stretch's keys, at most: many heads make it shorter
ROWS_AT_ONCE = 256  # of logits, heads times queries, in one piece of the program; more heads are looped over
MOST_ENTRIES = 2**16  # of the tables of one call: scalar memory has room for no more; more rows make more calls
CORES = 2  # among which rows are divided, where a device has them
VMEM_BYTES = 32 * 2**20


class _Plan(NamedTuple):
    """What each row sees, in scalar memory."""

    tables: Int[Array, "entries"]  # of all rows
    first: Int[Array, "B"]  # block that some query sees
    end: Int[Array, "B"]  # one after the last that some query sees; an idle row has both 0
    before: Int[Array, "B"]  # stretches of earlier rows: even or odd, it says which buffer is next
    after: Int[Array, "B"]  # the next row of the same core that sees something; B where there is none
    lengths: Int[Array, "B"]
    positions: Int[Array, "B"]
    window: Int[Array, "1"]


class _Refs(NamedTuple):
    """What the kernel reads and writes beside its plan. Scales are () where values are floats."""

    q: Any  # [1, K, Q, H]
    pools: tuple[Any, ...]  # keys, values and their scales, in HBM
    out: Any  # [1, K, Q, H]
    buffers: tuple[
        Any, ...
    ]  # of each pool, two that are filled in turn: [2, K, S, H], scales [2, blocks, K, Z or more]
    scales: tuple[Any, ...]  # of the stretch, its blocks side by side [K, 1, S]
    top: Any  # [K, Q, 1], the largest logit so far
    total: Any  # [K, Q, 1]
    acc: Any  # [K, Q, H]
    semaphores: Any  # one a turn


class _Mask(NamedTuple):
    """Where a stretch is seen in part."""

    pairs: Array  # [1, Q, S]
    slots: Array  # [1, S, H], seen by some query


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
    interpret: Any = False,
) -> Float[Array, "T N H"]:
    """Grouped-query attention of every row's queries to its own blocks; queries past a row's length give zeros."""
    (_, K, Z, _), (_, M) = k.values.shape, rows.tables.shape
    if Z not in (8, 16) and Z % 32 and not interpret:
        raise ValueError(
            f"blocks of {Z} tokens do not fill a TPU's tiles; set engine.block_size to 8, 16 or 32, 64, 96, …"
        )
    most = max(1, MOST_ENTRIES // M)
    window = jnp.asarray(EVERYTHING if window is None else window, jnp.int32)
    *_, H = q.shape
    q = _widened(q, k.values)
    outs, row, token = [], 0, 0
    for count, width in groups:
        for start in range(0, count, most):
            size = min(most, count - start)
            part = rearrange(q[token : token + size * width], "(B t) (K G) H -> B K (t G) H", B=size, K=K)
            mine = Ragged(*(x[row : row + size] for x in rows))
            knobs = {"width": width, "scale": scale, "softcap": softcap, "interpret": interpret}
            out = _rectangle(part, k, v, mine, window, **knobs)
            outs.append(rearrange(out, "B K (t G) H -> (B t) (K G) H", t=width))
            row, token = row + size, token + size * width
    return jnp.concatenate(outs)[..., :H]


def write(blocks: Blocks, new: Float[Array, "T K H"], slots: Int[Array, "T"]) -> Blocks:
    """The blocks with each token in its slot, block · Z + place, in place where they are donated.

    Every head of a token is a row of its own of the pool seen as a matrix: a scatter that XLA leaves in its layout.
    """
    _, _, Z, _ = blocks.values.shape
    block, place = slots // Z, slots % Z

    def put(pool, rows):
        P, K, stride, *rest = pool.shape
        at = (block[:, None] * K + jnp.arange(K, dtype=block.dtype)[None]) * stride + place[:, None]
        return pool.reshape(P * K * stride, *rest).at[at].set(rows, mode="promise_in_bounds").reshape(pool.shape)

    new = _widened(new, blocks.values)
    if blocks.scales is None:
        return Blocks(put(blocks.values, new.astype(blocks.values.dtype)), None)
    values, scales = quantized(new)
    return Blocks(put(blocks.values, values), put(blocks.scales, scales))


def _widened(x: Float[Array, "T heads H"], pool: Array) -> Float[Array, "T heads _"]:
    """As wide as the heads of a pool, which are whole lanes."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, pool.shape[-1] - x.shape[-1])))


def _rectangle(q: Float[Array, "B K Q H"], k: Blocks, v: Blocks, rows: Ragged, window, *, width, interpret, **knobs):
    """Rows of the same number of queries; Q are those of all heads of a group."""
    (B, K, Q, H), (*_, Z, _), (_, M) = q.shape, k.values.shape, rows.tables.shape
    heads = math.gcd(K, max(1, ROWS_AT_ONCE // Q))
    fitting = COPIED_BYTES // (K * max(H, 128) * k.values.dtype.itemsize)
    blocks, cores = min(M, max(1, min(SLOTS, fitting) // Z)), CORES if B % CORES == 0 else 1
    plan = _plan(rows, window, Z=Z, blocks=blocks, cores=cores)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -Q % 8), (0, 0)))
    *_, padded, _ = q.shape
    pools = [x for x in (k.values, v.values, k.scales, v.scales) if x is not None]
    spec = pl.BlockSpec((1, K, padded, H), lambda core, i, *_: (core * (B // cores) + i, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, width=width, group=Q // width, heads=heads, **knobs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(cores, B // cores),
            in_specs=[spec, *[pl.BlockSpec(memory_space=pl.ANY)] * len(pools)],
            out_specs=spec,
            scratch_shapes=[
                *[pltpu.VMEM((2, K, blocks * Z, H), x.dtype) for x in pools[:2]],
                *[pltpu.VMEM((2, blocks, *x.shape[1:]), x.dtype) for x in pools[2:]],
                *[pltpu.VMEM((K, 1, blocks * Z), x.dtype) for x in pools[2:]],
                *[pltpu.VMEM((K, padded, lanes), jnp.float32) for lanes in (1, 1, H)],
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # they are most of what a copy costs; tables are the allocator's
        ),
        cost_estimate=_cost(q, pools, slots=B * M * Z),
        name="paged_attention",
        interpret=interpret,
    )(*plan, q, *pools)
    return out[:, :, :Q]


def _plan(rows: Ragged, window: Int[Array, ""], *, Z: int, blocks: int, cores: int) -> _Plan:
    """For stretches of so many blocks of Z slots."""
    B, M = rows.tables.shape
    works = rows.lengths > 0
    first = jnp.where(works, jnp.maximum(rows.positions - window + 1, 0) // Z, 0)
    end = jnp.where(works, jnp.minimum((rows.positions + rows.lengths - 1) // Z + 1, M), 0)
    stretches = -(-end // blocks) - first // blocks
    row = jnp.where(works, jnp.arange(B, dtype=jnp.int32), B).reshape(cores, -1)
    later = jnp.pad(row[:, 1:], ((0, 0), (0, 1)), constant_values=B)
    return _Plan(
        tables=rows.tables.ravel(),
        first=first,
        end=end,
        before=jnp.cumsum(stretches) - stretches,
        after=jax.lax.cummin(later, axis=1, reverse=True).ravel(),
        lengths=rows.lengths,
        positions=rows.positions,
        window=window.reshape(1),
    )


def _kernel(*refs, width: int, group: int, heads: int, scale: float, softcap: float | None):
    plan, refs = _split(refs)
    row = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    _, K, size, _ = refs.buffers[0].shape
    begin, end = _stretches(plan, refs, row)
    refs.top[...] = jnp.full(refs.top.shape, EMPTY, jnp.float32)
    refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
    refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)

    @pl.when(pl.program_id(1) == 0)
    def start_the_first():
        _start(plan, refs, jnp.where(plan.lengths[row] > 0, row, plan.after[row]), -1)

    def stretch(i, _):
        _start(plan, refs, jnp.where(i + 1 == end, plan.after[row], row), jnp.where(i + 1 == end, -1, i + 1))
        turn = _wait(plan, refs, row, i)
        for scales, buffer in zip(refs.scales, refs.buffers[2:], strict=True):
            _, blocks, _, _ = buffer.shape
            scales[...] = jnp.concatenate([buffer[turn, j, :, : size // blocks] for j in range(blocks)], axis=-1)[
                :, None
            ]
        low, slot = plan.positions[row], i * size
        sees_all = (slot + size - 1 <= low) & (low + width - 1 - slot < plan.window[0]) & (plan.lengths[row] == width)

        def meet(mask):
            for_heads = functools.partial(_meet, refs, turn, mask, scale=scale, softcap=softcap)
            jax.lax.fori_loop(0, K // heads, lambda n, _: for_heads(pl.ds(n * heads, heads)), None)

        pl.when(sees_all)(lambda: meet(None))
        pl.when(jnp.logical_not(sees_all))(lambda: meet(_mask(plan, refs, row, slot, group)))

    jax.lax.fori_loop(begin, end, stretch, None)
    total = refs.total[...]
    refs.out[0] = (refs.acc[...] / jnp.where(total > 0, total, 1.0)).astype(refs.out.dtype)


def _meet(refs: _Refs, turn, mask: _Mask | None, h, *, scale: float, softcap: float | None):
    """Some heads' queries and a stretch of keys and values."""
    k_scales, v_scales = [x[h] for x in refs.scales] or (None, None)
    logits = _dot(refs.q[0, h], refs.buffers[0][turn, h], (2, 2))
    logits = logits if k_scales is None else logits * k_scales
    if softcap is not None:
        logits = jnp.tanh(logits * (scale / softcap)) * (softcap / scale)
    logits = logits * (scale * LOG2_E)
    logits = logits if mask is None else jnp.where(mask.pairs, logits, HIDDEN)
    before, top = refs.top[h], jnp.maximum(refs.top[h], jnp.max(logits, axis=-1, keepdims=True))
    weights, fade = jnp.exp2(logits - top), jnp.exp2(before - top)
    refs.top[h], refs.total[h] = top, refs.total[h] * fade + jnp.sum(weights, axis=-1, keepdims=True)
    values = refs.buffers[1][turn, h]
    # what no query sees may be NaN, and weighs nothing all the same
    if v_scales is not None:
        weights = weights * v_scales
        weights = weights if mask is None else jnp.where(mask.pairs, weights, 0.0)
    elif mask is not None:
        values = jnp.where(mask.slots, values.astype(jnp.float32), 0.0)
    refs.acc[h] = refs.acc[h] * fade + _dot(weights.astype(refs.q.dtype), values, (2, 1))


def _mask(plan: _Plan, refs: _Refs, row, slot, group: int) -> _Mask:
    """What `row` sees of the stretch that begins at `slot`."""
    (_, _, Q, _), (_, _, S, H) = refs.q.shape, refs.buffers[1].shape
    position, length, window = plan.positions[row], plan.lengths[row], plan.window[0]
    query = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (1, Q, 1), 1), jnp.int32(group))
    distance = (position + query) - (slot + jax.lax.broadcasted_iota(jnp.int32, (1, Q, S), 2))
    seen = slot + jax.lax.broadcasted_iota(jnp.int32, (1, S, H), 1)
    return _Mask(
        pairs=(distance >= 0) & (distance < window) & (query < length),
        slots=(seen > position - window) & (seen < position + length),
    )


def _dot(a, b, contract: tuple[int, int]):
    """Of each head, in the type of `a` and summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return jax.lax.dot_general(a, b.astype(a.dtype), dims, precision=precision, preferred_element_type=jnp.float32)


# Copies.


def _stretches(plan: _Plan, refs: _Refs, row):
    """The first of a row, and one after its last."""
    blocks = jnp.int32(_blocks(refs))  # lax.div: // asks which chip this is, for the sign
    return jax.lax.div(plan.first[row], blocks), jax.lax.div(plan.end[row] + blocks - 1, blocks)


def _blocks(refs: _Refs) -> int:
    """Of a stretch."""
    (_, _, size, _), (*_, Z, _) = refs.buffers[0].shape, refs.pools[0].shape
    return size // Z


def _start(plan: _Plan, refs: _Refs, row, i):
    """Begin to copy stretch `i` of a row, or its first where i is -1, if there is such a row."""
    (num_rows,) = plan.first.shape

    @pl.when(row < num_rows)
    def start():
        first, _ = _stretches(plan, refs, row)
        _for_blocks(plan, refs, row, jnp.where(i < 0, first, i), lambda copy: copy.start())


def _wait(plan: _Plan, refs: _Refs, row, i):
    """-> the turn of a stretch, when it is there."""
    turn, (begin, end), blocks = _turn(plan, refs, row, i), _part(plan, refs, row, i), _blocks(refs)

    @pl.when(end - begin == blocks)
    def wait_for_all():  # as one copy of the same number of bytes
        for buffer in refs.buffers:
            pltpu.make_async_copy(buffer.at[turn], buffer.at[turn], refs.semaphores.at[turn]).wait()

    @pl.when(end - begin < blocks)
    def wait_for_each():
        _for_blocks(plan, refs, row, i, lambda copy: copy.wait())

    return turn


def _turn(plan: _Plan, refs: _Refs, row, i):
    """Which buffer a stretch comes to."""
    return (plan.before[row] + i - _stretches(plan, refs, row)[0]) & 1


def _part(plan: _Plan, refs: _Refs, row, i):
    """The blocks of a stretch that the row sees: the first, and one after the last."""
    blocks = _blocks(refs)
    return jnp.maximum(plan.first[row], i * blocks), jnp.minimum(plan.end[row], (i + 1) * blocks)


def _for_blocks(plan: _Plan, refs: _Refs, row, i, do):
    """`do` with each copy of a stretch."""
    (entries,), (num_rows,), (*_, Z, _) = plan.tables.shape, plan.first.shape, refs.pools[0].shape
    table, place, turn = row * (entries // num_rows), i * _blocks(refs), _turn(plan, refs, row, i)

    def block(j, _):
        index = plan.tables[table + j]
        for pool, buffer in zip(refs.pools, refs.buffers, strict=True):
            is_scale = len(pool.shape) == 3
            to = buffer.at[turn, j - place] if is_scale else buffer.at[turn, :, pl.ds((j - place) * Z, Z)]
            do(pltpu.make_async_copy(pool.at[index], to, refs.semaphores.at[turn]))

    jax.lax.fori_loop(*_part(plan, refs, row, i), block, None)


def _split(refs) -> tuple[_Plan, _Refs]:
    """A kernel's references: plan, inputs, outputs, scratch."""
    plan, (q, *refs) = _Plan(*refs[: len(_Plan._fields)]), refs[len(_Plan._fields) :]
    *refs, top, total, acc, semaphores = refs
    has_scales = len(refs) > 5  # pools, out, buffers and rows of scales are 2 + 1 + 2, or 4 + 1 + 4 + 2
    num = 4 if has_scales else 2
    pools, out, buffers, scales = refs[:num], refs[num], refs[num + 1 : 2 * num + 1], refs[2 * num + 1 :]
    return plan, _Refs(q, tuple(pools), out, tuple(buffers), tuple(scales), top, total, acc, semaphores)


def _cost(q, pools, *, slots: int) -> pl.CostEstimate:
    """As if half of the tables' entries were of use; how many are is known at run time only."""
    B, K, Q, H = q.shape
    bytes_a_block = sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in pools)
    _, _, Z, _ = pools[0].shape
    return pl.CostEstimate(
        flops=2 * K * Q * H * slots,
        transcendentals=K * Q * slots // 2,
        bytes_accessed=2 * q.size * q.dtype.itemsize + slots // Z * bytes_a_block // 2,
    )
