"""Loss and gradients of a decoder whose layers are spread over the pipe axis. Knows no optimizer.

Every stage embeds all microbatches (a look-up), the layers pass them on, and head and loss of the last stage's results
are shared by all stages: by microbatch after the circular schedule, by token within the other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from data.packing import Batch
from model import parameters
from model.config import ModelConfig
from model.decoder import looped, window_layers
from model.layers import RESIDUAL, TOGETHER
from model.memory import Memory, Queries
from parallel.config import ExecutionConfig
from parallel.pipeline import circular, layer_order, one_forward_one_backward
from parallel.sharding import manual_axes, num_parts, part_index, relaid
from training.config import TrainConfig
from training.outcome import Outcome, Scale, batch_outcome, expert_losses


def dealt(tree: Any, config: ModelConfig, ranks: int, repeats: int, *, back: bool = False) -> Any:
    """Stacks of layers in the order in which an even split deals out the chunks, or back from it."""
    order = layer_order(config.num_layers, ranks, repeats)
    if repeats == 1:
        return tree
    order = sorted(range(len(order)), key=order.__getitem__) if back else order
    return jax.tree.map(lambda w: jnp.take(w, jnp.asarray(order), axis=0, unique_indices=True), tree)


def outcome(
    params: Any,
    batch: Batch,
    config: ModelConfig,
    train: TrainConfig,
    execution: ExecutionConfig,
    *,
    memory: Memory,
    scale: Scale,
) -> Outcome:
    """This device's share of the loss by the circular schedule, which jax differentiates."""
    decoder, (axis,) = parameters.decoder(config, params), manual_axes("layers")
    ranks, repeats = num_parts((axis,)), execution.repeats
    parts = _microbatches(batch, execution.microbatches or ranks)
    chunks, stage = _stages(decoder, config, memory, repeats)
    x, aux = circular(
        stage,
        chunks,
        _embedded(decoder, parts),
        Queries(parts.positions, parts.segments),
        axis=axis,
        repeats=repeats,
        remat=jax.checkpoint if repeats > 1 else lambda run: run,
    )
    mine = jax.tree.map(lambda x: _mine(x, axis, ranks), parts)
    x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)  # zero but on the last rank: dealt out
    told = batch_outcome(decoder, decoder.finish(_joined(x)), jax.tree.map(_joined, mine), train, scale=scale * ranks)
    return told.plus(aux, config, scale)


def gradients(
    low: Any,
    batch: Batch,
    config: ModelConfig,
    train: TrainConfig,
    execution: ExecutionConfig,
    *,
    memory: Memory,
    scale: Scale,
) -> tuple[Outcome, Any]:
    """Share of the loss and its gradients, each microbatch's backward as soon as its loss is known."""
    (axis,) = manual_axes("layers")
    ranks = num_parts((axis,))
    parts = _microbatches(batch, execution.microbatches or ranks)
    ends = {name: leaf for name, leaf in low.items() if name != "layers"}
    with_ends = lambda ends: parameters.decoder(config, {**low, **ends})  # noqa: E731
    x, pull = jax.vjp(lambda ends: _embedded(with_ends(ends), parts), ends)
    chunks, stage = _stages(with_ends(ends), config, memory, 1)
    alone = [relaid(part, (None, *TOGETHER[:2]), (None, *RESIDUAL[:2])) for part in (parts.targets, parts.mask)]

    def run(chunk: Any, x: Any, side: Any):
        return stage(chunk, x, side[0])

    def finish(ends: Any, x: Any, side: Any):
        queries, targets, mask = side
        targets, mask = (relaid(part, RESIDUAL[:2], TOGETHER[:2]) for part in (targets, mask))
        part = Batch._make((targets, targets, mask, targets, targets))  # targets and mask are what a loss reads
        decoder = with_ends(ends)
        told = batch_outcome(decoder, decoder.finish(x), part, train, scale=scale * ranks)
        return told.total, told.nll

    result = one_forward_one_backward(
        run,
        finish,
        jax.tree.map(lambda w: w[0], chunks),
        ends,
        x,
        (Queries(parts.positions, parts.segments), *alone),
        axis=axis,
        split_dim=1,
        penalty=lambda aux: expert_losses(aux, config, scale),
    )
    (from_inputs,) = pull(result.input_grads)
    grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), result.finish_grads, from_inputs)
    state, *_ = result.chunk_grads
    load = None if result.stage_aux is None else result.stage_aux.load[0]
    return Outcome(result.loss, jnp.sum(result.finish_aux), load), {**grads, "layers": state}


def _microbatches(batch: Batch, num: int) -> Any:
    """[B, T] -> [M, B / M, T]."""
    return Batch._make(jnp.asarray(x).reshape(num, -1, *x.shape[1:]) for x in batch)


def _joined(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def _mine(x: jax.Array, axis: str, ranks: int) -> jax.Array:
    """This rank's microbatches."""
    size = len(x) // ranks
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size)


def _embedded(decoder: Any, parts: Batch) -> jax.Array:
    whole = jax.tree.map(_joined, parts)
    x = decoder.embed(whole.tokens, Queries(whole.positions, whole.segments))
    return x.reshape(*parts.tokens.shape[:2], *x.shape[1:])


def _stages(decoder: Any, config: ModelConfig, memory: Memory, repeats: int):
    """-> this rank's chunks [repeats, …], and how one is run. A chunk tells of its experts in a row of its own."""
    graphdef, state = nnx.split(decoder.layers)
    ranks, size = num_parts(manual_axes("layers")), config.num_layers // num_parts(manual_axes("layers"))
    kinds = dealt(window_layers(config), config, ranks, repeats)
    kinds = jax.lax.dynamic_slice_in_dim(kinds, part_index(manual_axes("layers")) * size, size)
    stacks = jax.tree.map(lambda w: w.reshape(repeats, -1, *w.shape[1:]), (nnx.to_pure_dict(state), kinds))

    def stage(chunk: Any, x: jax.Array, queries: Queries):
        weights, kinds, row = chunk
        layers = nnx.merge(graphdef, weights)
        x, _, aux = looped(config, layers, kinds, x, Queries(*queries), memory)
        return x, jax.tree.map(lambda told: jnp.einsum("r,l...->rl...", row.astype(told.dtype), told), aux)

    return (*stacks, jnp.eye(repeats, dtype=jnp.int32)), stage
