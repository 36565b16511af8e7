"""Attention for the TPU in Pallas, forward and backward, over the blocks that some query sees. Knows no mesh.

arXiv:2205.14135 with logits stored keys by queries, [S, T]: what belongs to a query (maximum, sum, log-sum-exp) is then
a row, spread over sublanes at no cost, and only H-wide arrays are ever transposed. Softmax in float32 and in base 2.
One visit (`ops/visits.py`) is a block of queries, of all heads of a group, that meets a block of their keys. Backward
is one kernel: d_q gathers over the visits of a query block, d_k and d_v stay in VMEM until their block is left.
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
from ops.visits import ALL, SOME, Visits, key_block, leaving_block, plan, query_block, visit_of

EMPTY = -1e30  # log-sum-exp of a query that sees nothing
HIDDEN = -1e38  # a logit that weighs nothing, even beside EMPTY
LOG2_E = math.log2(math.e)
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

# A jitted function whose results nobody needs is dropped, as where remat has them saved; a bare kernel would be kept.
_jit = functools.partial(jax.jit, static_argnames=("scale", "softcap", "blocks", "interpret"))


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


@_jit
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
    """Attention of queries to keys, wherever both stand, and its log-sum-exp; 0 and -1e30 where nothing is seen."""
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block, q_at, k_at = _fit(blocks, q_at, k_at)
    visits = plan(q_at, k_at, window, queries=block.queries, keys=block.keys)
    spec = _specs(block, N // K, H)
    q, k, v = _heads(q, K, block.queries), _heads(k, K, block.keys), _heads(v, K, block.keys)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(B, K, jnp.max(visits.counts)),
            in_specs=[spec.queries, spec.keys, spec.keys, spec.query_places, spec.key_places],
            out_specs=[spec.queries, spec.rows],
            scratch_shapes=[_kept(N // K, block.queries)] * 2 + [_kept(N // K, H, block.queries)],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)],
        compiler_params=_compiler_params(),
        cost_estimate=_cost((q, q, k, v), pairs=B * N * T * S, products=2, H=H),
        name="attention_forward",
        interpret=interpret,
    )(*visits, q, k, v, jnp.stack(q_at, axis=1), jnp.stack(k_at, axis=1))
    return _tokens(out, T), rearrange(lse[..., :T], "B K G T -> B (K G) T")


@_jit
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
    """Gradients of `forward`; `out` and `lse` may be of more keys than these (ring attention passes those of all)."""
    _, S, _, H = k.shape
    delta = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32)
    part = max(blocks.keys, KEPT_BYTES // (2 * 4 * max(H, 128)) // blocks.keys * blocks.keys)
    knobs = {"window": window, "scale": scale, "softcap": softcap, "blocks": blocks, "interpret": interpret}
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
    visits = plan(q_at, k_at, window, queries=block.queries, keys=block.keys)
    spec = _specs(block, N // K, H)
    q, d_out = _heads(q, K, block.queries), _heads(d_out, K, block.queries)
    k, v = _heads(k, K, block.keys), _heads(v, K, block.keys)
    rows = [_pad(rearrange(row, "B (K G) T -> B K G T", K=K), 3, block.queries) for row in (lse * LOG2_E, delta)]
    *_, keys, _ = k.shape
    d_q, d_k, d_v = pl.pallas_call(
        functools.partial(_backward_kernel, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(B, K, jnp.max(visits.counts)),
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
    )(*visits, q, k, v, d_out, *rows, jnp.stack(q_at, axis=1), jnp.stack(k_at, axis=1))
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
    knobs = {"window": window, "scale": scale, "softcap": softcap, "interpret": interpret}
    return *backward(q, k, v, out, lse, d_out, q_at, k_at, **knobs), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# Kernels.


def _forward_kernel(*refs, scale: float, softcap: float | None):
    visits, inputs, (out_ref, lse_ref), (top_ref, sum_ref, acc_ref) = _split(refs, 5, 2)
    q_ref, k_ref, v_ref, q_at_ref, k_at_ref = inputs
    visit = visit_of(visits)
    *_, G, _, _ = q_ref.shape
    *_, size, _ = k_ref.shape

    @pl.when(visit.starts)
    def clear():
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

    _meet(visit, q_at_ref, k_at_ref, visits.window, G, meet)

    @pl.when(visit.ends)
    def write():
        def finish(heads):
            for g in heads:
                row = pl.ds(g, 1)
                sees = sum_ref[row] > 0
                total = jnp.where(sees, sum_ref[row], 1.0)
                out_ref[0, 0, g] = (acc_ref[g] / total).T.astype(out_ref.dtype)
                lse_ref[0, 0, row] = jnp.where(sees, (top_ref[row] + jnp.log2(total)) / LOG2_E, EMPTY)

        _for_heads(G, finish)


def _backward_kernel(*refs, scale: float, softcap: float | None):
    visits, inputs, (d_q_ref, d_k_ref, d_v_ref), (q_acc, k_acc, v_acc) = _split(refs, 8, 3)
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, q_at_ref, k_at_ref = inputs
    visit = visit_of(visits)
    *_, G, _, _ = q_ref.shape
    *_, size, H = k_ref.shape
    here = pl.ds(visit.key * size, size)

    @pl.when(visit.starts)
    def clear():
        q_acc[...] = jnp.zeros(q_acc.shape, jnp.float32)

    @pl.when(visit.is_first)
    def clear_keys():
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

    _meet(visit, q_at_ref, k_at_ref, visits.window, G, meet)

    @pl.when(visit.ends)
    def write():
        def finish(heads):
            for g in heads:
                d_q_ref[0, 0, g] = (q_acc[g] * scale).T.astype(d_q_ref.dtype)

        _for_heads(G, finish)

    @pl.when(visit.is_last)
    def write_keys():
        d_k_ref[0, 0, 0] = (k_acc[here] * scale).astype(d_k_ref.dtype)
        d_v_ref[0, 0, 0] = v_acc[here].astype(d_v_ref.dtype)


def _meet(visit, q_at_ref, k_at_ref, window, G, meet):
    """Run `meet` for all query heads, with a mask where not all is seen."""

    @pl.when(visit.seen == SOME)
    def meet_in_part():
        q_positions, q_segments = q_at_ref[0, 0:1], q_at_ref[0, 1:2]
        k_positions, k_segments = (jnp.transpose(k_at_ref[0, part : part + 1]) for part in (0, 1))
        distance = q_positions - k_positions
        visible = (distance >= 0) & (distance < window[0]) & (q_segments == k_segments)
        mask = jnp.where(visible, 0.0, HIDDEN)
        _for_heads(G, lambda heads: meet(heads, mask))

    @pl.when(visit.seen == ALL)
    def meet_in_full():
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


# Layout.


def _split(refs, num_inputs, num_outputs):
    """A kernel's references: visits, inputs, outputs, scratch."""
    first = len(Visits._fields)
    second, third = first + num_inputs, first + num_inputs + num_outputs
    return Visits(*refs[:first]), refs[first:second], refs[second:third], refs[third:]


class _Specs(NamedTuple):
    """Blocks of a visit in the arrays."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    leaving_keys: pl.BlockSpec
    rows: pl.BlockSpec
    query_places: pl.BlockSpec
    key_places: pl.BlockSpec


def _specs(block: Blocks, G: int, H: int) -> _Specs:
    queries, keys = (1, 1, G, block.queries, H), (1, 1, 1, block.keys, H)
    return _Specs(
        queries=pl.BlockSpec(queries, lambda b, h, t, *s: (b, h, 0, query_block(b, t, *s), 0)),
        keys=pl.BlockSpec(keys, lambda b, h, t, *s: (b, h, 0, key_block(b, t, *s), 0)),
        leaving_keys=pl.BlockSpec(keys, lambda b, h, t, *s: (b, h, 0, leaving_block(b, t, *s), 0)),
        rows=pl.BlockSpec((1, 1, G, block.queries), lambda b, h, t, *s: (b, h, 0, query_block(b, t, *s))),
        query_places=pl.BlockSpec((1, 2, block.queries), lambda b, h, t, *s: (b, 0, query_block(b, t, *s))),
        key_places=pl.BlockSpec((1, 2, block.keys), lambda b, h, t, *s: (b, 0, key_block(b, t, *s))),
    )


def _fit(blocks: Blocks, q_at: Places, k_at: Places) -> tuple[Blocks, Places, Places]:
    """Blocks in lanes of 128 that leave little over, and places for the rest, which see and are seen by nothing."""

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
