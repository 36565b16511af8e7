"""All that changes from step to step, as one sharded pytree: shapes, then shardings, then arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import parameters
from model.parameters import Shape
from parallel.config import AxisRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Donated to every step, saved in every checkpoint. Holds arrays, or their shapes, or their shardings."""

    step: Any  # int32: steps done, skipped ones included
    skipped: Any  # int32: non-finite steps in a row, 0 after a good one
    skipped_total: Any  # int32: non-finite steps in all
    parameters: Any
    optimizer: Any
    ema: Any  # averaged parameters, or None
    key: Any  # the run's random key; step t uses fold_in(key, t)


def create_state(
    model: Shape, optimizer: optax.GradientTransformation, mesh: Mesh, rules: AxisRules, *, ema: bool, seed: int
) -> TrainState:
    """The state before the first step, each array made where it stays; equal on every mesh."""
    run, init = jax.jit(lambda: tuple(jax.random.split(jax.random.key(seed))))()  # one program to compile, not four
    params = parameters.initialize(model, mesh, rules, key=init)
    shardings = state_shardings(model, optimizer, mesh, rules, ema=ema)
    finish = jax.jit(lambda params, key: _state(params, optimizer, ema, key), out_shardings=shardings)
    return finish(params, run)


def abstract_state(model: Shape, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Shapes and types of the state; computes nothing."""
    return jax.eval_shape(
        lambda params: _state(params, optimizer, ema, jax.random.key(0)), parameters.abstract(model).shapes
    )


def state_shardings(
    model: Shape, optimizer: optax.GradientTransformation, mesh: Mesh, rules: AxisRules, *, ema: bool
) -> TrainState:
    """Sharding of every array of the state: moments like their parameters, scalars and factors on every device.

    An optimizer's array belongs to the parameter whose path ends its own, if the shapes agree.
    """
    shapes = abstract_state(model, optimizer, ema=ema)
    split = parameters.shardings(model, mesh, rules)
    everywhere = NamedSharding(mesh, PartitionSpec())
    owners = {
        path: (leaf.shape, where)
        for (path, leaf), where in zip(
            jax.tree.leaves_with_path(shapes.parameters), jax.tree.leaves(split), strict=True
        )
    }

    def place(path, leaf):
        for start in range(len(path)):
            shape, where = owners.get(path[start:], (None, everywhere))
            if shape == leaf.shape:
                return where
        return everywhere

    return dataclasses.replace(
        jax.tree.map(lambda _: everywhere, shapes),
        parameters=split,
        optimizer=jax.tree.map_with_path(place, shapes.optimizer),
        ema=split if ema else None,
    )


def _state(params: Any, optimizer: optax.GradientTransformation, ema: bool, key: jax.Array) -> TrainState:
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(
        step=zero(),
        skipped=zero(),
        skipped_total=zero(),
        parameters=params,
        optimizer=optimizer.init(params),
        ema=average,
        key=key,
    )
