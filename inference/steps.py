"""The jitted steps of inference: one for any mix of prompts and answers, and one to score texts. Arrays in, arrays out.

`step` is compiled once for each Shape, of which an engine has a few. Slots and pools are donated: what comes back took
their place in the same buffers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from inference.room import TILE
from inference.sampling import Choice, Slots, choose, logprobs_of, record
from model.config import ModelConfig
from model.decoder import Decoder
from model.memory import BLOCK_NAMES, Packed, Paged, Queries, empty_blocks
from model.parameters import Parameters, decoder
from ops.ragged import Blocks, Groups, Ragged
from parallel.config import AxisRules
from parallel.sharding import Names, fitting, place, use

SCORED_AT_ONCE = 128  # positions whose logits exist at once, over all rows


class Program(NamedTuple):
    """What the steps are compiled for."""

    config: ModelConfig
    mesh: Mesh
    rules: AxisRules
    num_tokens: int  # ids from here on have no text and are never chosen


class Shape(NamedTuple):
    """How a step's flat tokens are laid out: rows of answers first, then tiles of prompts."""

    rows: int
    width: int  # W, tokens of a row: its last one and guesses after it
    tiles: int

    @property
    def groups(self) -> Groups:
        """The same for kernels."""
        return tuple(group for group in ((self.rows, self.width), (self.tiles, TILE)) if group[0])

    @property
    def owners(self) -> Int[np.ndarray, "T"]:
        """Which row or tile each flat token belongs to."""
        counts = [self.width] * self.rows + [TILE] * self.tiles
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @property
    def starts(self) -> Int[np.ndarray, "B"]:
        """Where each row or tile begins among the flat tokens."""
        counts = [self.width] * self.rows + [TILE] * self.tiles
        return np.cumsum([0, *counts[:-1]], dtype=np.int32)

    @property
    def positions_within(self) -> Int[np.ndarray, "T"]:
        """Place of each flat token in its row or tile."""
        return np.arange(len(self.owners), dtype=np.int32) - self.starts[self.owners]

    @property
    def chosen_by(self) -> Int[np.ndarray, "O"]:
        """Which row or tile each choice belongs to: one after each token of a row, one after a tile."""
        return np.concatenate([np.repeat(np.arange(self.rows), self.width), self.rows + np.arange(self.tiles)])

    @property
    def places_chosen(self) -> Int[np.ndarray, "O"]:
        """After which token of its row each choice comes, counted from 0; 0 for tiles."""
        return np.concatenate(
            [np.tile(np.arange(self.width, dtype=np.int32), self.rows), np.zeros(self.tiles, np.int32)]
        )


class Batch(NamedTuple):
    """What the host tells the device for one step. B counts rows and tiles; idle ones have length 0."""

    tokens: Int[Array, "T"]  # -1 is what the row's slot chose last
    slots: Int[Array, "B"]
    positions: Int[Array, "B"]  # of the first token
    lengths: Int[Array, "B"]
    index: Int[Array, "B"]  # place in the answer of the token chosen after the row's first, or the tile's last
    chooses: Bool[Array, "B"]  # whether that token counts: not in the middle of a prompt
    tables: dict[str, Int[Array, "B M"]]  # of each kind of layer


class Stepped(NamedTuple):
    """What a step leaves."""

    slots: Slots
    pools: Any
    choice: Choice  # O rows
    is_taken: Bool[Array, "O"]  # whether the choice belongs to the answer: it counts, and so did all guesses before it


def empty_pools(program: Program, num_blocks: dict[str, int], block_size: int, *, int8: bool) -> Any:
    """Keys and values of every layer, on the mesh: a pair a layer, or one stacked pair where layers are scanned."""
    make = functools.partial(new_pools, program.config, num_blocks, block_size, int8=int8)
    shapes = jax.eval_shape(make)
    return jax.jit(make, out_shardings=pool_shardings(program, shapes))()


def new_pools(config: ModelConfig, num_blocks: dict[str, int], block_size: int, *, int8: bool) -> Any:
    """The same, wherever they are made."""
    sizes = [num_blocks[kind] for kind in config.layer_kinds]
    layers = [tuple(empty_blocks(config, P, block_size, int8=int8) for _ in "kv") for P in sizes]
    return stacked(layers) if config.scan_layers else tuple(layers)


def pool_shardings(program: Program, shapes: Any) -> Any:
    """Where pools lie: split by heads, as attention is, where the mesh divides them."""

    def where(blocks: Blocks) -> Any:
        stack = (None,) * (blocks.values.ndim - len(BLOCK_NAMES))
        scales: Any = (
            None if blocks.scales is None else on_mesh(program, (*stack, *BLOCK_NAMES[:-1]), blocks.scales.shape)
        )
        values: Any = on_mesh(program, (*stack, *BLOCK_NAMES), blocks.values.shape)
        return Blocks(values, scales)

    return jax.tree.map(where, shapes, is_leaf=lambda node: isinstance(node, Blocks))


def on_mesh(program: Program, names: Names, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array lies between two steps: written as XLA writes it, so that no step is compiled twice for it."""
    bound = list(fitting(names, shape, program.mesh, program.rules).spec) if program.mesh.size > 1 else []
    while bound and bound[-1] is None:
        bound.pop()
    return NamedSharding(program.mesh, P(*bound))


def stacked(trees: Any) -> Any:
    """Trees of one structure as one whose leaves have a leading L."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def read(
    model: Decoder, tokens: Int[Array, "T"], pools: Any, batch: Batch, *, program: Program, shape: Shape
) -> tuple[Float[Array, "T 1 D"], Any]:
    """Compute flat tokens; -> what the model makes of each, and pools that have their keys and values."""
    owners, within = shape.owners, shape.positions_within
    segments = jnp.where(batch.lengths[owners] > within, 1, 0)
    queries = Queries((batch.positions[owners] + within)[:, None], segments[:, None])
    hidden, memory = model(tokens[:, None], queries, memories(program, shape, batch, pools))
    pair = lambda paged: (paged.k, paged.v)  # noqa: E731
    return hidden, pair(memory) if isinstance(memory, Paged) else tuple(pair(paged) for paged in memory)


def memories(program: Program, shape: Shape, batch: Batch, pools: Any) -> Any:
    """What each layer's attention reads and extends."""
    config, within = program.config, shape.positions_within
    first = {}  # of each kind: the rows and where tokens are written
    for kind, tables in batch.tables.items():
        rows = Ragged(tables, jnp.asarray(shape.starts), batch.lengths, batch.positions)
        _, _, Z, _ = jax.tree.leaves(pools)[0].shape[-4:]
        position = batch.positions[shape.owners] + within
        block = tables.at[shape.owners, position // Z].get(mode="clip")
        is_token = within < batch.lengths[shape.owners]
        first[kind] = rows, jnp.where(is_token, block * Z + position % Z, position % Z)
    how = {"groups": shape.groups, "kernel": config.kernel}
    if config.scan_layers:
        k, v = pools
        rows, slots = stacked([first[kind] for kind in config.layer_kinds])
        return Paged(k=k, v=v, rows=rows, slots=slots, **how)
    layers = zip(config.layer_kinds, pools, strict=True)
    return tuple(Paged(k=k, v=v, rows=first[kind][0], slots=first[kind][1], **how) for kind, (k, v) in layers)


@functools.partial(jax.jit, static_argnames=("program", "shape"), donate_argnames=("slots", "pools"))
def step(parameters: Parameters, slots: Slots, pools: Any, batch: Batch, *, program: Program, shape: Shape) -> Stepped:
    """Compute a batch's tokens and choose what comes after each row's tokens and each tile's last one."""
    with use(program.mesh, program.rules):
        model = decoder(program.config, parameters)
        tokens = jnp.where(batch.tokens < 0, slots.token[batch.slots[shape.owners]], batch.tokens)
        hidden, pools = read(model, tokens, pools, batch, program=program, shape=shape)
        chosen_by, place_ = shape.chosen_by, shape.places_chosen
        last = jnp.asarray(shape.starts)[chosen_by] + jnp.where(
            chosen_by < shape.rows, place_, jnp.maximum(batch.lengths[chosen_by] - 1, 0)
        )
        logits = rearrange(model.logits(hidden[last]), "O 1 V -> O V")
        logits = place(logits, (None, None))
        slot, index = batch.slots[chosen_by], batch.index[chosen_by] + place_
        guesses = guessed(shape, batch, tokens)
        choice = choose(logits, slots, slot, index, num_tokens=program.num_tokens, drafts=guesses)
        is_taken = taken(shape, batch, tokens, choice.tokens)
        slots = record(slots, slot, choice.tokens, is_taken)
        return Stepped(everywhere(slots), pools, everywhere(choice), everywhere(is_taken))


def guessed(shape: Shape, batch: Batch, tokens: Int[Array, "T"]) -> Int[Array, "O w"] | None:
    """For each choice the guesses that it supposes to be right, -1 where none is; None where nothing is guessed."""
    if shape.width == 1:
        return None
    rows = rearrange(tokens[: shape.rows * shape.width], "(B W) -> B W", W=shape.width)[:, 1:]
    supposed = np.arange(shape.width)[:, None] > np.arange(shape.width - 1)[None]  # [W, W - 1]
    rows = jnp.where(supposed[None], rows[:, None], -1)
    tiles = jnp.full((shape.tiles, shape.width - 1), -1, tokens.dtype)
    return jnp.concatenate([rearrange(rows, "B W w -> (B W) w"), tiles])


def taken(shape: Shape, batch: Batch, tokens: Int[Array, "T"], chosen: Int[Array, "O"]) -> Bool[Array, "O"]:
    """A row's first choice counts; each further one does where all guesses before it are what was chosen."""
    W, num = shape.width, shape.rows * shape.width
    rows, guesses = (rearrange(x[:num], "(B W) -> B W", W=W) for x in (chosen, tokens))
    right = jnp.cumprod(guesses[:, 1:] == rows[:, :-1], axis=1).astype(bool)
    right = jnp.concatenate([jnp.ones((shape.rows, 1), bool), right], axis=1)
    right = right & (jnp.arange(W)[None] < batch.lengths[: shape.rows, None])
    flat = jnp.concatenate([right.reshape(-1), batch.lengths[shape.rows :] > 0])
    return flat & batch.chooses[shape.chosen_by]


@functools.partial(jax.jit, static_argnames="program")
def score(parameters: Parameters, tokens: Int[Array, "B t"], *, program: Program) -> Float[Array, "B T"]:
    """Log-probability of each token but the first, given those before it: no cache. t - 1 is a power of two."""
    with use(program.mesh, program.rules):
        model = decoder(program.config, parameters)
        hidden, _ = model(tokens[:, :-1], whole_rows(tokens[:, :-1]), Packed(program.config.kernel))
        B, T, _ = hidden.shape
        at_once = min(T, power_of_two(SCORED_AT_ONCE // B))
        pieces = (
            rearrange(hidden, "B (n t) D -> n B t D", t=at_once),
            rearrange(tokens[:, 1:], "B (n t) -> n B t", t=at_once),
        )
        logprobs = jax.lax.map(lambda piece: logprobs_of(model.logits(piece[0]), piece[1]), pieces)
        return everywhere(rearrange(logprobs, "n B t -> B (n t)"))


@functools.partial(jax.jit, static_argnames="program")
def embed(
    parameters: Parameters, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], *, program: Program
) -> Float[Array, "B D"]:
    """The mean of each text's final hidden states, of length one."""
    _, T = tokens.shape
    with use(program.mesh, program.rules):
        model = decoder(program.config, parameters)
        hidden, _ = model(tokens, whole_rows(tokens), Packed(program.config.kernel))
        is_token = jnp.arange(T)[None] < lengths[:, None]
        mean = jnp.sum(jnp.where(is_token[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
        return everywhere(mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-30))


def whole_rows(tokens: Int[Array, "B T"]) -> Queries:
    """Every row is one text from its first token on."""
    B, T = tokens.shape
    return Queries(jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T)), jnp.ones((B, T), jnp.int32))


def over_blocks(change, *pools: Any) -> Any:
    """Apply to the values and the scales of every layer's blocks, seen as [..., P, K, Z, …] with the axis of P."""

    def both(*blocks: Blocks) -> Blocks:
        axis = blocks[0].values.ndim - 4
        scales = [one.scales for one in blocks]
        return Blocks(
            change(axis, *(one.values for one in blocks)), None if scales[0] is None else change(axis, *scales)
        )

    return jax.tree.map(both, *pools, is_leaf=lambda node: isinstance(node, Blocks))


@functools.partial(jax.jit, static_argnames="program", donate_argnames="pools")
def copy_blocks(
    pools: Any, source: dict[str, Int[Array, "n"]], target: dict[str, Int[Array, "n"]], *, program: Program
) -> Any:
    """Pools in which some blocks of each kind of layer hold what others do; block 0 may be both, to fill up."""

    def copied(layer: Any, source: Int[Array, "n"], target: Int[Array, "n"]) -> Any:
        return over_blocks(lambda axis, pool: put(pool, target, jnp.take(pool, source, axis=axis), axis), layer)

    kinds = program.config.layer_kinds
    if program.config.scan_layers:
        return jax.vmap(copied)(pools, *stacked([(source[kind], target[kind]) for kind in kinds]))
    return tuple(copied(layer, source[kind], target[kind]) for kind, layer in zip(kinds, pools, strict=True))


@jax.jit
def read_blocks(pools: Any, blocks: Int[Array, "n"]) -> Any:
    """The contents of some blocks: as pools of n blocks."""
    return over_blocks(lambda axis, pool: jnp.take(pool, blocks, axis=axis), pools)


@functools.partial(jax.jit, donate_argnames="pools")
def write_blocks(pools: Any, blocks: Int[Array, "n"], contents: Any) -> Any:
    """Pools in which these blocks hold the contents."""
    return over_blocks(lambda axis, pool, new: put(pool, blocks, new, axis), pools, contents)


def put(pool: Array, blocks: Int[Array, "n"], new: Array, axis: int) -> Array:
    """The pool with new contents in some blocks."""
    return pool.at[(slice(None),) * axis + (blocks,)].set(new)


def everywhere(small: Any) -> Any:
    """Whole on every device: the next step finds it where this one did, and every process reads it."""
    return jax.tree.map(lambda x: place(x, (None,) * x.ndim), small)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
