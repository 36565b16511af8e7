"""The jitted steps of decoding: read a prompt, choose the first token, decode many more. Arrays in, arrays out.

Each is compiled once for a program, a batch and a number of slots, all powers of two; `prefill` also for the length of
a piece. The memory is donated: what comes back took its place in the same buffers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from inference.sampling import Choice, Knobs, logprobs_of
from inference.sampling import choose_rows as choose
from model.config import ModelConfig
from model.memory import CACHE_NAMES, Beginning, Dense, Queries, dense_cache, dense_grown, dense_rows
from model.parameters import Parameters, decoder
from parallel.config import AxisRules
from parallel.sharding import Names, place, spec, use

CHUNK = 32  # tokens a row that one dispatch decodes at most
SCORED_AT_ONCE = 128  # positions whose logits exist at once, over all rows


class Program(NamedTuple):
    """What the steps are compiled for."""

    config: ModelConfig
    mesh: Mesh
    rules: AxisRules
    num_tokens: int  # ids from here on have no text and are never chosen

    def batch(self, rows: int) -> int:
        """The batch for so many rows: a power of two on each part of the mesh that splits it."""
        axes = spec(("batch",), self.rules, self.mesh)[0] or ()
        parts = math.prod(self.mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))
        return parts * power_of_two(-(-rows // parts))


class Prefilled(NamedTuple):
    """What is known after a prompt, or a piece of it."""

    logits: Float[Array, "B V"]  # of the token after each row's last
    hidden: Float[Array, "B T D"]
    memory: Any


class Limits(NamedTuple):
    """When a row ends."""

    is_end: Bool[Array, "V"]  # tokens that end a text
    budget: Int[Array, "B"]  # tokens the row may choose


class Cursor(NamedTuple):
    """Where each row stands between two dispatches."""

    token: Int[Array, "B"]  # chosen last, not yet in the memory
    position: Int[Array, "B"]  # where it will stand
    index: Int[Array, "B"]  # tokens chosen so far
    finished: Bool[Array, "B"]
    seen: Bool[Array, "B V"]  # tokens that the row has, its prompt's included


class Chunk(NamedTuple):
    """Tokens of one dispatch. A row's entries after its end mean nothing."""

    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]


@functools.cache
def empty_memory(program: Program, rows: int, slots: int) -> Callable[[], Any]:
    """What makes a cache with nothing in it."""
    make = functools.partial(dense_cache, program.config, rows, slots)
    where = jax.tree.map(lambda cache: on_mesh(program, cache_names(cache)), jax.eval_shape(make))
    return jax.jit(make, out_shardings=where)


def on_mesh(program: Program, names: Names) -> NamedSharding:
    """Where an array lies between two steps: written as XLA writes it, so that no step is compiled twice for it."""
    bound = list(spec(names, program.rules, program.mesh)) if program.mesh.size > 1 else []
    while bound and bound[-1] is None:
        bound.pop()
    return NamedSharding(program.mesh, P(*bound))


def cache_names(cache: Any) -> Names:
    """Logical names of one array of a memory, stacked or not."""
    return (None,) * (cache.ndim - len(CACHE_NAMES)) + CACHE_NAMES


@functools.partial(jax.jit, static_argnames=("program", "slots"))
def grown_memory(memory: Any, *, program: Program, slots: int) -> Any:
    """The same cache with more slots."""
    with use(program.mesh, program.rules):
        return placed(dense_grown(memory, slots))


@functools.partial(jax.jit, static_argnames="program")
def spread(
    logits: Float[Array, "b V"], memory: Any, source: Int[Array, "B"], *, program: Program
) -> tuple[Float[Array, "B V"], Any]:
    """Rows that share a prompt read it once: row i gets what row source[i] has."""
    with use(program.mesh, program.rules):
        return jnp.take(logits, source, axis=0), placed(dense_rows(memory, source))


def placed(memory: Any) -> Any:
    """A cache on its mesh."""
    return jax.tree.map(lambda cache: place(cache, cache_names(cache)), memory)


@functools.partial(jax.jit, static_argnames=("program", "begins"), donate_argnames=("logits", "memory"))
def prefill(
    parameters: Parameters,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
    logits: Float[Array, "B V"],
    memory: Any,
    *,
    program: Program,
    begins: bool,
) -> Prefilled:
    """Read a piece of each row's prompt: tokens stand from `start` on, the first `lengths` of them count.

    A row may end in this piece (its next-token logits are set), have ended before (length <= 0: its logits are kept)
    or go on in the next one (length > T). `begins` says that every row starts at 0: no query looks at the cache.
    """
    _, T = tokens.shape
    with use(program.mesh, program.rules):
        model = decoder(program.config, parameters)
        hidden, memory = model(tokens, queries_from(start, T), beginning(memory) if begins else memory)
        memory = begun(memory) if begins else memory
        last = jnp.take_along_axis(hidden, jnp.clip(lengths - 1, 0, T - 1)[:, None, None], axis=1)
        logits = place(jnp.where((lengths > 0)[:, None], model.logits(last)[:, 0], logits), (None, None))
    return Prefilled(logits, hidden, memory)


def beginning(memory: Any) -> Any:
    """A cache in which nothing is to be looked up yet."""
    return jax.tree.map(Beginning, memory, is_leaf=lambda node: isinstance(node, Dense))


def begun(memory: Any) -> Any:
    """The cache, with something in it."""
    return jax.tree.map(lambda node: node.cache, memory, is_leaf=lambda node: isinstance(node, Beginning))


def queries_from(start: Int[Array, "B"], length: int) -> Queries:
    """`length` consecutive positions from each row's start; to a cache all of them are one document."""
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return Queries(positions, jnp.ones_like(positions))


@functools.partial(jax.jit, static_argnames="program")
def target_logprobs(
    parameters: Parameters, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, program: Program
) -> Float[Array, "B T"]:
    """Log-probability of each target after its hidden state, a few positions at a time. T is a power of two."""
    B, T, _ = hidden.shape
    at_once = min(T, power_of_two(SCORED_AT_ONCE // B))
    pieces = rearrange(hidden, "B (n t) D -> n B t D", t=at_once), rearrange(targets, "B (n t) -> n B t", t=at_once)
    with use(program.mesh, program.rules):
        model = decoder(program.config, parameters)
        logprobs = jax.lax.map(lambda piece: logprobs_of(model.logits(piece[0]), piece[1]), pieces)
    return rearrange(logprobs, "n B t -> B (n t)")


@functools.partial(jax.jit, static_argnames="program")
def first(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    position: Int[Array, "B"],
    limits: Limits,
    knobs: Knobs,
    *,
    program: Program,
) -> tuple[Cursor, Chunk]:
    """Choose each row's first token from its prompt's logits; rows without a budget have ended from the start."""
    none = jnp.zeros_like(position)
    choice = choose(logits, seen, none, knobs, num_tokens=program.num_tokens)
    cursor = advanced(Cursor(none, position - 1, none, limits.budget <= 0, seen), choice, limits)
    with use(program.mesh, program.rules):
        return everywhere(cursor), everywhere(Chunk(*columns(choice)))


def advanced(cursor: Cursor, choice: Choice, limits: Limits) -> Cursor:
    """The cursor after each unfinished row took its choice."""
    (B,) = cursor.token.shape
    token = jnp.where(cursor.finished, cursor.token, choice.tokens)
    one = (~cursor.finished).astype(jnp.int32)
    index = cursor.index + one
    return Cursor(
        token=token,
        position=cursor.position + one,
        index=index,
        finished=cursor.finished | limits.is_end[token] | (index >= limits.budget),
        seen=cursor.seen.at[jnp.arange(B), token].set(True),
    )


@functools.partial(jax.jit, static_argnames="program", donate_argnames=("cursor", "memory"))
def decode(
    parameters: Parameters,
    cursor: Cursor,
    memory: Any,
    limits: Limits,
    knobs: Knobs,
    stopped: Bool[Array, "B"],
    steps: Int[Array, ""],
    *,
    program: Program,
) -> tuple[Cursor, Any, Chunk]:
    """Up to `steps` more tokens a row without the host; ends early when every row has ended.

    `stopped` are rows that the host ended since the last dispatch. `steps` is data, so that any number of them up to
    CHUNK is the same compiled program.
    """
    (B,) = cursor.token.shape
    cursor = cursor._replace(finished=cursor.finished | stopped)

    def going(carry):
        step, cursor, *_ = carry
        return (step < steps) & ~jnp.all(cursor.finished)

    def body(carry):
        step, cursor, memory, chunk = carry
        hidden, memory = model(cursor.token[:, None], queries_from(cursor.position, 1), memory)
        logits = rearrange(model.logits(hidden), "B 1 V -> B V")
        choice = choose(logits, cursor.seen, cursor.index, knobs, num_tokens=program.num_tokens)
        written = (
            jax.lax.dynamic_update_slice_in_dim(had, new, step, 1)
            for had, new in zip(chunk, columns(choice), strict=True)
        )
        return step + 1, advanced(cursor, choice, limits), memory, Chunk(*written)

    with use(program.mesh, program.rules):
        model = decoder(program.config, parameters)
        empty = Chunk(jnp.zeros((B, CHUNK), jnp.int32), jnp.zeros((B, CHUNK), jnp.float32))
        _, cursor, memory, chunk = jax.lax.while_loop(going, body, (jnp.int32(0), cursor, memory, empty))
        return everywhere(cursor), memory, everywhere(chunk)


def everywhere(small: Any) -> Any:
    """Whole on every device: the next step finds a cursor where this one did, and every process reads a chunk."""
    return jax.tree.map(lambda x: place(x, (None,) * x.ndim), small)


def columns(choice: Choice) -> tuple[Int[Array, "B 1"], Float[Array, "B 1"]]:
    """A choice as one column of a chunk."""
    return choice.tokens[:, None], choice.logprobs[:, None]


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
