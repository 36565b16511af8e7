"""One optimizer step and one evaluation step, jitted over a mesh. Knows no files, no loop and no text."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from data.packing import Batch
from model import parameters
from model.config import ModelConfig
from model.memory import Packed, Queries
from parallel.config import AxisRules
from parallel.sharding import everywhere, num_copies, spec, summed_gradient, use, whole
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
    batch = NamedSharding(mesh, spec(("batch", "seq"), rules, mesh))
    schedule = learning_rate(optim, total_steps=train.steps)
    batches: Any = Batch._make([batch] * len(Batch._fields))
    specs = jax.tree.map(lambda sharding: sharding.spec, (shardings.parameters, batches))

    def by_device(compute: Callable, out: Any) -> Callable:
        """`compute(parameters, batch)` as a program of one device, with its part of both."""

        def local(params, batch: Batch):
            with use(mesh, rules, manual=True):
                return compute(params, batch)

        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)

    def evaluate(params, batch: Batch):
        loss = _batch_loss(_cast(params, names, model), batch, model, train)
        return _summed({"nll": loss.nll, "tokens": jnp.sum(batch.mask) / num_copies()})

    gradients = by_device(lambda params, batch: _gradients(params, batch, names, model, train), (P(), P(), specs[0]))

    def train_step(state: TrainState, batch: Batch):
        return _updated(state, *gradients(state.parameters, batch), optim, optimizer, schedule)

    return Steps(
        optimizer,
        jax.jit(train_step, in_shardings=(shardings, batches), out_shardings=(shardings, None), donate_argnums=0),
        jax.jit(by_device(evaluate, P()), in_shardings=(shardings.parameters, batches)),
        shardings,
        batch,
    )


def _summed(shares: Any) -> Any:
    """All devices' shares of some sums, added up."""
    return jax.tree.map(lambda x: jax.lax.psum(x, everywhere()) if everywhere() else x, shares)


def _cast(params: Any, names: Any, model: ModelConfig) -> Any:
    """Parameters that are multiplied in the compute dtype, cast once a step, before they are gathered."""
    dtype = jnp.dtype(model.compute_dtype)
    is_cast = lambda names: "vocab" in names or parameters.summed_dims(names) is not None  # noqa: E731
    return jax.tree.map(lambda w, names: w.astype(dtype) if is_cast(names) else w, params, names)


def _batch_loss(params: Any, batch: Batch, model: ModelConfig, train: TrainConfig) -> Loss:
    """This device's share of the summed loss of a batch whose documents cannot see each other."""
    decoder = parameters.decoder(model, params)
    tokens, targets, mask, segments, positions = map(jnp.asarray, batch)
    hidden, _ = decoder(tokens, Queries(positions, segments), Packed())
    chunk = min(train.loss_chunk, tokens.shape[1])
    with jax.named_scope("loss"):
        table = whole(decoder.unembedding, ("vocab", "embed"))
        share = mask / num_copies()
        return chunked_token_loss(hidden, table, targets, share, chunk, model.final_softcap, train.z_loss)


def _gradients(params: Any, batch: Batch, names: Any, model: ModelConfig, train: TrainConfig):
    """-> mean loss, number of tokens, gradients; the batch in `accumulate` parts, one after the other, if asked."""
    tokens = jnp.maximum(_summed(jnp.sum(batch.mask) / num_copies()), 1.0)
    low = _cast(params, names, model)

    def mean(params, batch):
        loss = jax.tree.map(lambda x: x / tokens, _batch_loss(params, batch, model, train))
        return loss.total, loss

    def part(batch):
        (_, loss), grads = jax.value_and_grad(mean, has_aux=True)(low, batch)
        return loss, grads

    if train.accumulate == 1:
        loss, grads = part(batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(-1, train.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        zero = (Loss(jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params))
        add = lambda total, fresh: total + fresh.astype(total.dtype)  # noqa: E731
        loss, grads = jax.lax.scan(lambda sums, batch: (jax.tree.map(add, sums, part(batch)), None), zero, parts)[0]
    return _summed(loss), tokens, jax.tree.map(summed_gradient, grads, names)


def _updated(state: TrainState, loss: Loss, tokens: Float[Array, ""], grads: Any, optim, optimizer, schedule):
    """The state after the optimizer's update, or the same but for its counts where something is not finite."""
    grads = jax.tree.map(lambda grad, parameter: grad.astype(parameter.dtype), grads, state.parameters)
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
