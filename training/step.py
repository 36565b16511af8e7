"""One optimizer step and one evaluation step, jitted over a mesh. Knows no files, no loop and no text."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from data.packing import Batch
from model import parameters
from model.config import ModelConfig
from model.memory import Packed, Queries
from parallel.config import AxisRules
from parallel.sharding import spec, use
from training.config import OptimConfig, TrainConfig
from training.losses import Loss, chunked_token_loss
from training.optimizer import learning_rate, make_optimizer
from training.state import TrainState, state_shardings

Metrics = dict[str, Float[Array, ""]]


class Steps(NamedTuple):
    """What a run calls again and again."""

    optimizer: optax.GradientTransformation
    train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # jitted; donates the state
    evaluate: Callable[[Any, Batch], Metrics]  # jitted; parameters and a batch -> sums of nll and tokens
    state: TrainState  # shardings
    batch: NamedSharding  # of every [B, T] array of a batch


def make_steps(model: ModelConfig, optim: OptimConfig, train: TrainConfig, mesh: Mesh, rules: AxisRules) -> Steps:
    """Compile-ready train and eval steps for one run; raises ValueError where the mesh does not divide the model."""
    names = parameters.abstract(model).names
    optimizer = make_optimizer(optim, names, total_steps=train.steps)
    shardings = state_shardings(model, optimizer, mesh, rules, ema=optim.ema_decay > 0)
    batch = NamedSharding(mesh, spec(("batch", "seq"), rules))
    schedule = learning_rate(optim, total_steps=train.steps)

    def train_step(state: TrainState, batch: Batch):
        with use(mesh, rules):
            return _train_step(state, batch, model, optim, train, optimizer, schedule)

    def evaluate(params, batch: Batch):
        with use(mesh, rules):
            loss = _batch_loss(params, batch, model, train)
            return {"nll": loss.nll, "tokens": jnp.sum(batch.mask)}

    batches: Any = Batch._make([batch] * len(Batch._fields))
    return Steps(
        optimizer,
        jax.jit(train_step, in_shardings=(shardings, batches), out_shardings=(shardings, None), donate_argnums=0),
        jax.jit(evaluate, in_shardings=(shardings.parameters, batches)),
        shardings,
        batch,
    )


def _batch_loss(params: Any, batch: Batch, model: ModelConfig, train: TrainConfig) -> Loss:
    """Summed loss of a batch whose documents cannot see each other."""
    decoder = parameters.decoder(model, params)
    tokens, targets, mask, segments, positions = map(jnp.asarray, batch)
    hidden, _ = decoder(tokens, Queries(positions, segments), Packed())
    chunk = min(train.loss_chunk, tokens.shape[1])
    with jax.named_scope("loss"):
        return chunked_token_loss(hidden, decoder.unembedding, targets, mask, chunk, model.final_softcap, train.z_loss)


def _train_step(state: TrainState, batch: Batch, model, optim, train, optimizer, schedule):
    tokens = jnp.maximum(jnp.sum(batch.mask), 1.0)
    loss, grads = _gradients(state.parameters, batch, tokens, model, train)
    grad_norm = optax.tree.norm(grads)
    is_good = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)
    with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, fresh = optimizer.update(grads, state.optimizer, state.parameters)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(is_good, n, o), new, old)  # noqa: E731
        rate = schedule(state.step - state.skipped_total)
        params = keep(optax.apply_updates(state.parameters, updates), state.parameters)
        ema = state.ema
        if optim.ema_decay:
            ema = keep(jax.tree.map(lambda a, p: optim.ema_decay * a + (1 - optim.ema_decay) * p, ema, params), ema)
    bad = 1 - is_good.astype(jnp.int32)
    metrics = {
        "loss": loss.nll,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(rate, jnp.float32),
        "tokens": tokens,
        "skipped": (state.skipped + bad) * bad,
    }
    after = dataclasses.replace(
        state,
        step=state.step + 1,
        skipped=(state.skipped + 1) * bad,
        skipped_total=state.skipped_total + bad,
        parameters=params,
        optimizer=keep(fresh, state.optimizer),
        ema=ema,
    )
    return after, metrics


def _gradients(params: Any, batch: Batch, tokens: Float[Array, ""], model, train) -> tuple[Loss, Any]:
    """Mean loss and its gradient; the batch in `accumulate` parts, one after the other, if asked."""

    def mean(params, batch):
        loss = jax.tree.map(lambda x: x / tokens, _batch_loss(params, batch, model, train))
        return loss.total, loss

    def part(batch):
        (_, loss), grads = jax.value_and_grad(mean, has_aux=True)(params, batch)
        return loss, grads

    if train.accumulate == 1:
        return part(batch)
    parts = jax.tree.map(lambda x: x.reshape(-1, train.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = (Loss(jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params))
    add = lambda sums, batch: (jax.tree.map(jnp.add, sums, part(batch)), None)  # noqa: E731
    return jax.lax.scan(add, zero, parts)[0]
