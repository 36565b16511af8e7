"""One optimizer step and one evaluation step, jitted over a mesh. Knows no files, no loop and no text."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from data.packing import Batch
from data.pair_batches import PairBatch
from model import parameters
from model.config import ModelConfig, with_kernels
from model.dropout import Seeds, mixed
from model.memory import GatheredKV, Memory, Packed, Queries, Ring
from model.moe import updated_bias, utilisation
from model.parameters import Shape
from model.seq2seq_config import Seq2SeqConfig
from parallel.compilation import CPU_OPTIONS
from parallel.config import AxisRules, ExecutionConfig
from parallel.peak import require_fp8
from parallel.ring_attention import zigzag
from parallel.sharding import axes_of, everywhere, manual_axes, num_copies, spec, summed_gradient, use
from training import pipelined
from training.config import OptimConfig, TrainConfig
from training.optimizer import learning_rate, make_optimizer
from training.outcome import Outcome, Scale, batch_outcome, pair_outcome
from training.state import TrainState, state_shardings

Metrics = dict[str, Float[Array, ""]]
PLAIN = ExecutionConfig()
BATCHES: dict[type, Any] = {ModelConfig: Batch, Seq2SeqConfig: PairBatch}


class Steps(NamedTuple):
    """What a run calls again and again."""

    optimizer: optax.GradientTransformation
    train: Callable[[TrainState, Any], tuple[TrainState, Metrics]]  # jitted; donates the state
    evaluate: Callable[[Any, Any], Metrics]  # jitted; parameters and a batch -> sums of nll and tokens
    state: TrainState  # shardings
    batch: NamedSharding  # of every [B, T] array of a batch


def make_steps(
    model: Shape,
    optim: OptimConfig,
    train: TrainConfig,
    mesh: Mesh,
    rules: AxisRules,
    execution: ExecutionConfig = PLAIN,
) -> Steps:
    """Compile-ready train and eval steps for one run; raises ValueError where the mesh does not divide the model."""
    platform = mesh.devices.flat[0].platform
    options = CPU_OPTIONS if platform == "cpu" and mesh.size > 1 else None
    if isinstance(model, ModelConfig):
        check_host_memory(model, platform)
        model = with_kernels(model, platform)
        if model.matmul == "fp8":
            require_fp8(mesh.devices.flat[0])
    else:
        rules = rules.with_whole_rows()
    names = parameters.abstract(model).names
    optimizer = make_optimizer(optim, names, total_steps=train.steps)
    shardings = state_shardings(model, optimizer, mesh, rules, ema=optim.ema_decay > 0)
    batch = NamedSharding(mesh, spec(("batch", "seq"), rules, mesh))
    schedule = learning_rate(optim, total_steps=train.steps)
    kind = BATCHES[type(model)]
    batches: Any = kind._make([batch] * len(kind._fields))
    specs = jax.tree.map(lambda sharding: sharding.spec, (shardings.parameters, batches))
    specs = (*specs, spec(("batch",), rules, mesh))
    plan = Plan(model, train, execution, names)

    def by_device(compute: Callable, out: Any) -> Callable:
        """`compute(parameters, batch, seeds, plan)` as a program of one device, with its part of all."""

        def local(params, batch, seeds: Seeds | None):
            with use(mesh, rules, manual=True):
                return compute(params, batch, seeds, plan)

        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return lambda params, batch, seeds=None: mapped(
            _dealt(params, plan, mesh), _in_ring_order(batch, plan, mesh, rules), seeds
        )

    loads = P(spec(("layers",), rules, mesh)[0]) if isinstance(model, ModelConfig) and model.num_experts else None
    gradients = by_device(_gradients, (Outcome._make((P(), P(), loads)), P(), specs[0]))

    def train_step(state: TrainState, batch):
        seeds = _row_seeds(state, batch.tokens.shape[0]) if isinstance(model, Seq2SeqConfig) and model.dropout else None
        told, tokens, grads = gradients(state.parameters, batch, seeds)
        grads = _dealt(grads, plan, mesh, back=True)
        if told.load is not None:
            told = told._replace(load=_dealt({"layers": told.load}, plan, mesh, back=True)["layers"])
        return _updated(state, told, tokens, grads, plan, optim, optimizer, schedule)

    placed = {"in_shardings": (shardings, batches), "out_shardings": (shardings, None)}
    return Steps(
        optimizer,
        jax.jit(train_step, **placed, donate_argnums=0, compiler_options=options),
        jax.jit(by_device(_evaluated, P()), in_shardings=(shardings.parameters, batches), compiler_options=options),
        shardings,
        batch,
    )


def check_host_memory(model: ModelConfig, platform: str) -> None:
    """Raise ValueError where an activation should wait in host memory, but would not."""
    names = ",".join(model.remat_offload)
    if names and platform == "cpu":
        raise ValueError(
            f"model.remat_offload={names} moves arrays to host memory, and a CPU's is the host's; leave it out"
        )
    if names and model.remat in ("none", "dots"):
        raise ValueError(
            f"model.remat_offload={names} does not go with model.remat={model.remat}, which keeps what is not named; "
            "take minimal, attention or full"
        )


class Plan(NamedTuple):
    """What a step computes, and how."""

    model: Any  # a Shape
    train: TrainConfig
    execution: ExecutionConfig
    names: Any  # tree of the parameters' logical names


def _dealt(params: Any, plan: Plan, mesh: Mesh, *, back: bool = False) -> Any:
    """Parameters with their layers in the order of an interleaved pipeline, or back; changes nothing elsewhere."""
    ranks, repeats = mesh.shape["pipe"], plan.execution.repeats
    if ranks == 1 or repeats == 1:
        return params
    return {**params, "layers": pipelined.dealt(params["layers"], plan.model, ranks, repeats, back=back)}


def _row_seeds(state: TrainState, num_rows: int) -> Seeds:
    """Seeds of this step's rows, for dropout: the same wherever a row is."""
    key = jax.random.key_data(state.key).reshape(-1)[-1] + state.step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    return mixed(mixed(key)[None] + jnp.arange(num_rows, dtype=jnp.uint32))


def _in_ring_order(batch: Any, plan: Plan, mesh: Mesh, rules: AxisRules) -> Any:
    """Columns in an order that gives every device of a ring as much to do (parallel/ring_attention.py)."""
    parts = math.prod(mesh.shape[axis] for axis in axes_of(rules.seq))
    if parts == 1 or plan.execution.context != "ring":
        return batch
    order = zigzag(plan.train.seq_len, parts)
    return Batch._make(jnp.take(x, order, axis=1, unique_indices=True) for x in batch)


def _memory(plan: Plan) -> Memory:
    """Where queries find their keys: in their own row, which may be split over devices."""
    axes, kernel = manual_axes("seq"), plan.model.kernel
    if not axes:
        return Packed(kernel=kernel)
    if plan.execution.context == "gather":
        return GatheredKV(axes=axes, kernel=kernel)
    return Ring(axes=axes, balanced=True, kernel=kernel)


def _summed(shares: Any, names: tuple[str, ...] = ()) -> Any:
    """All devices' shares of some sums, added up; devices that split one of `names` keep sums apart."""
    axes = tuple(axis for axis in everywhere() if axis not in manual_axes(*names))
    return jax.tree.map(lambda x: jax.lax.psum(x, axes) if axes else x, shares)


def _cast(params: Any, plan: Plan) -> Any:
    """Parameters that are multiplied in the compute dtype, cast once a step, before they are gathered."""
    dtype = jnp.dtype(plan.model.compute_dtype)
    is_cast = lambda names: "vocab" in names or parameters.summed_dims(names) is not None  # noqa: E731
    return jax.tree.map(lambda w, names: w.astype(dtype) if is_cast(names) else w, params, plan.names)


def _share(params: Any, batch: Any, seeds: Seeds | None, plan: Plan, *, scale: Scale) -> Outcome:
    """This device's share of the loss of a batch whose documents cannot see each other, `scale` times its sum."""
    model, train, execution, _ = plan
    if isinstance(model, Seq2SeqConfig):
        return pair_outcome(parameters.seq2seq(model, params), batch, seeds, train, scale=scale)
    if manual_axes("layers"):
        memory = _memory(plan)
        return pipelined.outcome(params, batch, model, train, execution, memory=memory, scale=scale)
    decoder = parameters.decoder(model, params)
    tokens, _, _, segments, positions = map(jnp.asarray, batch)
    hidden, _, aux = decoder.forward(tokens, Queries(positions, segments), _memory(plan))
    return batch_outcome(decoder, hidden, batch, train, scale=scale).plus(aux, model, scale)


def _evaluated(params: Any, batch: Any, seeds: None, plan: Plan) -> Metrics:
    told = _share(_cast(params, plan), batch, seeds, plan, scale=1.0)
    return _summed({"nll": told.nll, "tokens": jnp.sum(batch.mask) / num_copies()})


def _gradients(params: Any, batch: Any, seeds: Seeds | None, plan: Plan) -> tuple[Outcome, Float[Array, ""], Any]:
    """-> mean loss, number of tokens, gradients; the batch in `accumulate` parts, one after the other, if asked."""
    tokens = jnp.maximum(_summed(jnp.sum(batch.mask) / num_copies()), 1.0)
    low = _cast(params, plan)

    def part(rows: tuple[Any, Seeds | None]) -> tuple[Outcome, Any]:
        (batch, seeds), (model, train, execution, _) = rows, plan
        if manual_axes("layers") and execution.pipeline == "1f1b":
            return pipelined.gradients(low, batch, model, train, execution, memory=_memory(plan), scale=1 / tokens)

        def share(low):
            told = _share(low, batch, seeds, plan, scale=1 / tokens)
            return told.total, told

        (_, told), grads = jax.value_and_grad(share, has_aux=True)(low)
        return told, grads

    if plan.train.accumulate == 1:
        told, grads = part((batch, seeds))
    else:
        split = lambda x: x.reshape(-1, plan.train.accumulate, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
        parts = jax.tree.map(split, (batch, seeds))
        shapes, _ = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (shapes, params))
        add = lambda total, fresh: total + fresh.astype(total.dtype)  # noqa: E731
        told, grads = jax.lax.scan(lambda sums, rows: (jax.tree.map(add, sums, part(rows)), None), zero, parts)[0]
    load = None if told.load is None else _summed(told.load, ("layers",))
    told = Outcome(_summed(told.total), _summed(told.nll), load)
    return told, tokens, jax.tree.map(summed_gradient, grads, plan.names)


def _updated(
    state: TrainState, told: Outcome, tokens: Float[Array, ""], grads: Any, plan: Plan, optim, optimizer, schedule
) -> tuple[TrainState, Metrics]:
    """The state after the optimizer's update, or the same but for its counts where something is not finite."""
    grads = jax.tree.map(lambda grad, parameter: grad.astype(parameter.dtype), grads, state.parameters)
    grad_norm = optax.tree.norm(grads)
    is_good = jnp.isfinite(told.total) & jnp.isfinite(grad_norm)
    with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, fresh = optimizer.update(grads, state.optimizer, state.parameters)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(is_good, n, o), new, old)  # noqa: E731
        rate = schedule(state.step - state.skipped_total)
        params = keep(_balanced(optax.apply_updates(state.parameters, updates), told, plan), state.parameters)
        ema = state.ema
        if optim.ema_decay:
            ema = keep(jax.tree.map(lambda a, p: optim.ema_decay * a + (1 - optim.ema_decay) * p, ema, params), ema)
    bad = 1 - is_good.astype(jnp.int32)
    metrics = {
        "loss": told.nll,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(rate, jnp.float32),
        "tokens": tokens,
        "skipped": (state.skipped + bad) * bad,
        **({} if told.load is None else utilisation(told.load)),
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


def _balanced(params: Any, told: Outcome, plan: Plan) -> Any:
    """Parameters with the routers' biases moved towards evenly used experts, where the model balances by them."""
    if told.load is None or not plan.model.router_bias_rate:
        return params
    ffn = params["layers"]["ffn"]
    ffn = {**ffn, "router_bias": updated_bias(ffn["router_bias"], told.load, plan.model.router_bias_rate)}
    return {**params, "layers": {**params["layers"], "ffn": ffn}}
