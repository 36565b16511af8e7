"""Attention of a sequence that is split over devices: around a ring, or with gathered keys. Knows no model.

Both functions run inside a manual `shard_map`. Each device holds its chunk of the tokens, in any order: a token's
place says what it sees, so a balanced split is a permutation of the tokens outside (`zigzag`). `kernel` has the
`forward` and `backward` of `ops.attention`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ops.attention import HIDDEN, Places

# Steps of a ring that are written out one after the other, which spares the copies of a loop's carry; each is a kernel
# call in the program, so longer rings loop over this many.
UNROLL = 8

OUT, LSE = "attention_out", "attention_lse"  # for remat policies: kept, the backward runs no forward attention again


def ring(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K _"],
    at: Places,
    *,
    axes: tuple[str, ...],
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
    kernel: Any,
    balanced: bool = False,
) -> Float[Array, "B T N _"]:
    """Attention to the keys of all devices along `axes`, which pass by in turn (arXiv:2310.01889).

    `balanced` says that the chunks are those of `zigzag`: then every device computes, of each chunk that passes, just
    the half that causality leaves, and no device waits for another.
    """
    static, late = _apart(window)
    if balanced and q.shape[1] % 2:
        raise ValueError(f"a balanced ring halves each device's chunk, which has an odd {q.shape[1]} tokens")
    return _ring(_Ring(axes, static, scale, softcap, kernel, balanced), q, k, v, at, late)


def gathered(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K _"],
    at: Places,
    *,
    axes: tuple[str, ...],
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
    kernel: Any,
) -> Float[Array, "B T N _"]:
    """The same with all keys gathered first: one kernel call, and memory for the keys of the whole sequence.

    The gathered keys are not kept for the backward, which gathers them again.
    """
    static, late = _apart(window)
    return _gathered(_Ring(axes, static, scale, softcap, kernel, False), q, k, v, at, late)


def zigzag(num_tokens: int, ring_size: int) -> np.ndarray:
    """Order of tokens that gives each device of a ring the same work under a causal mask.

        zigzag(8, 2) -> [0 1 6 7 | 2 3 4 5]

    Of 2C chunks, device c of C holds chunks c and 2C-1-c. `x[:, zigzag(T, C)]` is what to split.
    """
    if num_tokens % (2 * ring_size):
        raise ValueError(
            f"{num_tokens} tokens do not divide into {2 * ring_size} chunks, two for each of {ring_size} devices; "
            f"make the sequence a multiple of {2 * ring_size}"
        )
    chunks = np.arange(num_tokens).reshape(2 * ring_size, -1)
    return np.stack([chunks[:ring_size], chunks[: ring_size - 1 : -1]], axis=1).reshape(-1)


def zigzag_inverse(num_tokens: int, ring_size: int) -> np.ndarray:
    """The permutation that brings `zigzag`'s order back: x[zigzag(T, C)][zigzag_inverse(T, C)] is x."""
    return np.argsort(zigzag(num_tokens, ring_size))


class _Ring(NamedTuple):
    """All that is known when the program is made."""

    axes: tuple[str, ...]
    window: int | None
    scale: float
    softcap: float | None
    kernel: Any
    balanced: bool

    def rule(self, late: Int[Array, ""] | None) -> dict[str, Any]:
        """What kernels want to know."""
        return {"window": self.window if late is None else late, "scale": self.scale, "softcap": self.softcap}

    @property
    def size(self) -> int:
        """Devices of the ring."""
        return math.prod(lax.axis_size(axis) for axis in self.axes)

    @property
    def cut(self) -> "_Cut":
        """How the work of a step is cut."""
        return _HALVES if self.balanced else _WHOLE

    def shift(self, tree: Any) -> Any:
        """What the device before this one holds."""
        following = [(device, (device + 1) % self.size) for device in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, following), tree)

    def gather(self, tree: Any) -> Any:
        """[B T ...] of every device, one after the other along T."""
        return jax.tree.map(lambda x: lax.all_gather(x, self.axes, axis=1, tiled=True), tree)

    def turn(self, at: Places, kv: Any, step: Callable, carry: Any) -> Any:
        """carry = step(carry, kv, whether it comes from a lower rank, its places) for all chunks but one's own.

        The next keys are sent before these are used. The barrier keeps the compiler from computing all steps first and
        then sending the sums of d_k and d_v with nothing beside it, and from keeping each step's keys of the forward
        for the backward. Places come in one small gather ahead of the keys instead of a permute a step.
        """
        if self.size == 1:
            return carry
        everywhere, rank = lax.all_gather(jnp.stack(at), self.axes), lax.axis_index(self.axes)

        def use(carry, kv, distance):
            source = lax.rem(rank + self.size - distance, self.size)
            return step(carry, kv, distance <= rank, Places(*everywhere[source]))

        def body(state, distance):
            carry, kv = state
            ahead = self.shift(kv)
            return lax.optimization_barrier((use(carry, kv, distance), ahead)), None

        distances = jnp.arange(1, self.size - 1, dtype=jnp.int32)
        unroll = max(1, min(UNROLL, self.size - 2))
        (carry, kv), _ = lax.scan(body, (carry, self.shift(kv)), distances, unroll=unroll)
        return use(carry, kv, self.size - 1)


def _apart(window: Int[Array, ""] | int | None) -> tuple[int | None, Int[Array, ""] | None]:
    """A window known now, or one known when the program runs."""
    return (window, None) if window is None or isinstance(window, int) else (None, window)


# Results over some of the keys


class _Partial(NamedTuple):
    """Attention to some keys. Joining is associative, and attention to no key changes nothing."""

    out: Float[Array, "B T N H"]  # float32
    lse: Float[Array, "B T N"]


NOTHING = _Partial(0.0, HIDDEN)  # type: ignore[arg-type]


def _partial(results: tuple[Array, Array]) -> _Partial:
    out, lse = results
    return _Partial(out.astype(jnp.float32), jnp.swapaxes(lse, 1, 2))


def _join(a: _Partial, b: _Partial) -> _Partial:
    lse = jnp.logaddexp(a.lse, b.lse)
    return _Partial(sum(x.out * jnp.exp(x.lse - lse)[..., None] for x in (a, b)), lse)  # type: ignore[arg-type]


# What of a step is computed


class _Cut(NamedTuple):
    """Which queries look at which keys when a chunk passes, as rows of a larger batch, and the way back."""

    queries: Callable  # tree [B T ...], from a lower rank? -> tree for the kernel
    keys: Callable
    to_queries: Callable  # the kernel's tree, from a lower rank?, join, zero -> tree [B T ...]
    to_keys: Callable


_WHOLE = _Cut(
    queries=lambda tree, lower: tree,
    keys=lambda tree, lower: tree,
    to_queries=lambda tree, lower, join, zero: tree,
    to_keys=lambda tree, lower, join, zero: tree,
)

# With zigzag chunks a device's first half stands before all second halves. Keys of a lower rank: its first half is
# seen by all queries, its second by none. Keys of a higher rank: both halves are seen by the second half of queries,
# neither by the first. So (second, first) is always computed, with (first, first) or (second, second): the same
# program on all ranks, half the products. Chunks are in row order, and so are documents and positions in them: what
# chunks hide, places hide, too. (Padding excepted: what a padding token sees depends on the split.)


def _halves(tree: Any) -> tuple[Any, Any]:
    first = jax.tree.map(lambda x: jnp.split(x, 2, axis=1)[0], tree)
    return first, jax.tree.map(lambda x: jnp.split(x, 2, axis=1)[1], tree)


def _chosen(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), yes, no)


def _stacked(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), a, b)


def _unstacked(tree: Any) -> tuple[Any, Any]:
    return tuple(jax.tree.map(lambda x, part=part: jnp.split(x, 2)[part], tree) for part in (0, 1))  # type: ignore


def _beside(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), first, second)


def _half_queries(tree, lower):
    first, second = _halves(tree)
    return _stacked(second, _chosen(lower, first, second))


def _half_keys(tree, lower):
    first, second = _halves(tree)
    return _stacked(first, _chosen(lower, first, second))


def _to_half_queries(tree, lower, join, zero):
    always, other = _unstacked(tree)
    nothing = jax.tree.map(jnp.full_like, other, zero)
    return _beside(_chosen(lower, other, nothing), join(always, _chosen(lower, nothing, other)))


def _to_half_keys(tree, lower, join, zero):
    always, other = _unstacked(tree)
    nothing = jax.tree.map(jnp.full_like, other, zero)
    return _beside(join(always, _chosen(lower, other, nothing)), _chosen(lower, nothing, other))


_HALVES = _Cut(_half_queries, _half_keys, _to_half_queries, _to_half_keys)


# Around the ring


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: _Ring, q, k, v, at: Places, late):
    return _ring_forward(how, q, k, v, at, late)[0]


def _ring_forward(how: _Ring, q, k, v, at: Places, late):
    forward = partial(how.kernel.forward, **how.rule(late))

    def step(found, kv, lower, k_at):
        queries, (keys, their_places) = how.cut.queries((q, at), lower), how.cut.keys((kv, k_at), lower)
        new = _partial(forward(queries[0], *keys, queries[1], their_places))
        return _join(found, how.cut.to_queries(new, lower, _join, NOTHING))

    with jax.named_scope("ring_forward"):
        out, lse = how.turn(at, (k, v), step, _partial(forward(q, k, v, at, at)))
    out, lse = checkpoint_name(out.astype(q.dtype), OUT), checkpoint_name(jnp.swapaxes(lse, 1, 2), LSE)
    return out, (q, k, v, at, late, out, lse)


def _ring_backward(how: _Ring, residuals, d_out):
    """The sums of d_k and d_v travel with their keys, and go one device further than these, which is home."""
    q, k, v, at, late, out, lse = residuals
    backward = partial(how.kernel.backward, **how.rule(late))
    mine = (q, out, jnp.swapaxes(lse, 1, 2), d_out, at)
    add = partial(jax.tree.map, jnp.add)

    def gradients(queries, keys, k_at):
        q, out, lse, d_out, q_at = queries
        grads = backward(q, *keys, out, jnp.swapaxes(lse, 1, 2), d_out, q_at, k_at)
        d_q, *d_kv = (x.astype(jnp.float32) for x in grads)
        return d_q, tuple(d_kv)

    def step(carry, kv, lower, k_at):
        d_q, d_kv = carry
        d_kv = how.shift(d_kv)
        new_q, new_kv = gradients(how.cut.queries(mine, lower), *how.cut.keys((kv, k_at), lower))
        new_q = how.cut.to_queries(new_q, lower, add, 0.0)
        return add(d_q, new_q), add(d_kv, how.cut.to_keys(new_kv, lower, add, (0.0, 0.0)))

    with jax.named_scope("ring_backward"):
        d_q, d_kv = how.turn(at, (k, v), step, gradients(mine, (k, v), at))
        d_k, d_v = how.shift(d_kv)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)


# All keys at once


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(how: _Ring, q, k, v, at: Places, late):
    return _gathered_forward(how, q, k, v, at, late)[0]


def _gathered_forward(how: _Ring, q, k, v, at: Places, late):
    with jax.named_scope("gathered_forward"):
        keys, values, k_at = how.gather((k, v, at))
        out, lse = how.kernel.forward(q, keys, values, at, k_at, **how.rule(late))
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return out, (q, k, v, at, late, out, lse)


def _gathered_backward(how: _Ring, residuals, d_out):
    q, k, v, at, late, out, lse = residuals

    def scattered(grad, like):
        grad = grad.astype(jnp.float32)
        for axis in how.axes:  # one at a time: over several torus dimensions at once it compiles to an all-reduce
            grad = lax.psum_scatter(grad, axis, scatter_dimension=1, tiled=True)
        return grad.astype(like.dtype)

    with jax.named_scope("gathered_backward"):
        keys, values, k_at = how.gather((k, v, at))
        d_q, d_k, d_v = how.kernel.backward(q, keys, values, out, lse, d_out, at, k_at, **how.rule(late))
        return d_q, scattered(d_k, k), scattered(d_v, v), None, None


_gathered.defvjp(_gathered_forward, _gathered_backward)
