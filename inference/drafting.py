"""A small model that guesses ahead for a large one, on the device. Knows no scheduler and no text.

Its keys and values stand in blocks of the same numbers as the large model's, so that whatever the scheduler does with
blocks holds for both. It draws with the large model's keys: where the two agree, they choose the same token
(arXiv:2408.07978), and what the large one says is what counts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int

from inference.sampling import Slots, choose
from inference.steps import Batch, Program, Shape, read
from model.config import ModelConfig
from model.parameters import Parameters, decoder
from parallel.sharding import place, use


class Draft(NamedTuple):
    """The small model."""

    config: ModelConfig
    parameters: Parameters


def check_draft(draft: ModelConfig, config: ModelConfig, *, max_length: int) -> None:
    """Raise ValueError for a model that cannot guess for another."""
    if draft.vocab_size != config.vocab_size:
        raise ValueError(
            f"the draft model has {draft.vocab_size} tokens but the model has {config.vocab_size}; "
            "both must have been trained with one tokenizer"
        )
    for kind in set(draft.layer_kinds):
        if kind not in config.layer_kinds or (kind == "window" and draft.window != config.window):
            raise ValueError(
                f"the draft model has {kind} layers (window {draft.window}) and the model's layers are "
                f"{', '.join(sorted(set(config.layer_kinds)))} (window {config.window}); they share KV blocks, so a "
                "draft model has only kinds of layers that the model has"
            )
    if draft.max_length < max_length:
        raise ValueError(
            f"the draft model's context of {draft.max_length} tokens is shorter than the engine's {max_length}; "
            f"set engine.max_length={draft.max_length}"
        )


@functools.partial(jax.jit, static_argnames=("program", "shape"), donate_argnames="pools")
def draft(
    parameters: Parameters, slots: Slots, pools: Any, batch: Batch, *, program: Program, shape: Shape
) -> tuple[Int[Array, "T"], Any]:
    """-> the batch's tokens with guesses in the rows, after each row's first; pools with all of them.

    A row of length l gets l - 1 guesses; its last one is read, too, since it may be right.
    """
    num = shape.rows * shape.width
    with use(program.mesh, program.rules):
        if shape.tiles:
            tiles = Batch(batch.tokens[num:], *(part(x, shape.rows, None) for x in batch[1:]))  # type: ignore[arg-type]
            _, pools = _read(parameters, tiles.tokens, pools, tiles, program=program, shape=Shape(0, 1, shape.tiles))
        tokens = rearrange(batch.tokens[:num], "(B W) -> B W", W=shape.width)
        if shape.rows:
            rows = Batch(tokens[:, 0], *(part(x, 0, shape.rows) for x in batch[1:]))  # type: ignore[arg-type]
            tokens, pools = _guess(parameters, slots, pools, rows, tokens, program=program)
        return place(jnp.concatenate([tokens.reshape(-1), batch.tokens[num:]]), (None,)), pools


def _guess(parameters, slots: Slots, pools, rows: Batch, tokens: Int[Array, "B W"], *, program: Program):
    """Token after token, each from the one before."""
    B, W = tokens.shape
    first = jnp.where(tokens[:, 0] < 0, slots.token[rows.slots], tokens[:, 0])
    tokens = tokens.at[:, 0].set(first)
    columns = np.arange(W)

    def further(j, carry):
        tokens, pools = carry
        now = rows._replace(positions=rows.positions + j, lengths=(j < rows.lengths).astype(jnp.int32))
        logits, pools = _read(parameters, tokens[:, j], pools, now, program=program, shape=Shape(B, 1, 0))
        so_far = jnp.where(columns[None, 1:] <= j, tokens[:, 1:], -1)
        choice = choose(logits, slots, rows.slots, rows.index + j, num_tokens=program.num_tokens, drafts=so_far)
        return jnp.where(columns[None] == j + 1, choice.tokens[:, None], tokens), pools

    return jax.lax.fori_loop(0, W, further, (tokens, pools))


def _read(parameters, tokens: Int[Array, "T"], pools, batch: Batch, *, program: Program, shape: Shape):
    """Compute tokens; -> logits after each of them, pools with them."""
    model = decoder(program.config, parameters)
    hidden, pools = read(model, tokens, pools, batch, program=program, shape=shape)
    return place(rearrange(model.logits(hidden), "T 1 V -> T V"), (None, None)), pools


def part(x: Any, start: int, end: int | None) -> Any:
    """Some of the rows and tiles."""
    return jax.tree.map(lambda leaf: leaf[start:end], x)
