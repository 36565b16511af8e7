"""The counts of model/cost.py against the products in the jaxpr of the real step, for every family and remat policy.

What the program does that the convention leaves out, each exactly accounted for here:
- plain attention multiplies blocks of 128 queries by every key up to them: all T of T, where the convention counts
  those a query may see (half of them, or a window);
- memories know one width of a head, so that latent attention's values are multiplied as wide as its keys.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import partial_eval

from data.packing import Batch
from model import cost, parameters
from model.config import ModelConfig
from model.families import PUBLISHED
from model.memory import Packed, Queries
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from tests.model.counting import inner_jaxprs, product_flops
from training.config import OptimConfig, TrainConfig
from training.state import abstract_state
from training.step import make_steps

B, T = 2, 24
SMALL = {"vocab_size": 40, "embed_dim": 12, "head_dim": 6, "ffn_dim": 20, "max_length": 32}
OPTIM, TRAIN = OptimConfig(), TrainConfig(steps=10, batch_size=B, seq_len=T, loss_chunk=8)
INTS: Any = jax.ShapeDtypeStruct((B, T), jnp.int32)
FLOATS: Any = jax.ShapeDtypeStruct((B, T), jnp.float32)


def small(name: str) -> ModelConfig:
    """The family's structure at tiny widths, with as many layers as show every kind it has."""
    config = PUBLISHED[name]()
    change: dict = dict(SMALL, num_layers=max(2, len(config.layers), config.num_dense_layers + 2))
    change |= {"num_heads": 4, "num_kv_heads": 4 if config.num_kv_heads == config.num_heads else 2}
    if config.num_kv_heads == 1:
        change["num_kv_heads"] = 1
    if config.window:
        change["window"] = 7
    if config.kv_rank:
        change |= {"kv_rank": 10, "q_rank": 8 if config.q_rank else 0, "rope_dim": 2, "value_dim": 4}
    if config.num_experts:
        change |= {"num_experts": 8, "experts_per_token": 3, "expert_ffn_dim": 14, "router_groups": 1}
        change |= {"router_top_groups": 1, "shared_ffn_dim": 16 if config.shared_ffn_dim else 0}
    return dataclasses.replace(config, **change)


def structures() -> dict[str, ModelConfig]:
    """One family of each structure: two that differ in their widths alone are the same at tiny ones."""
    found: dict = {}
    for name in PUBLISHED:
        found.setdefault(small(name), name)
    return {name: config for config, name in found.items()}


FAMILIES = structures()


def attention_difference(config: ModelConfig, products: dict[str, float]) -> dict[str, float]:
    """The products as the plain kernel runs them: all keys of a block, values as wide as keys."""
    width = (config.value_dim or config.head_dim) / config.head_dim
    return products | {"mix": products["mix"] / width}


def layers_as_run(config: ModelConfig) -> list[tuple[dict[str, float], bool]]:
    dense = [not config.num_experts or layer < config.num_dense_layers for layer in range(config.num_layers)]
    return [(attention_difference(config, cost.layer_products(config, T, dense=d)), d) for d in dense]


def head(config: ModelConfig) -> int:
    return 2 * config.vocab_size * config.embed_dim


def test_products_of_a_layer_sum_to_the_forward():
    """The list by product and the closed formula are one count, for every family at full size."""
    for name, make in PUBLISHED.items():
        config, total = make(), 0.0
        for layer, kind in enumerate(config.layer_kinds):
            keys = cost._pairs(4096, 0, config.window if kind == "window" else None) / 4096
            dense = not config.num_experts or layer < config.num_dense_layers
            total += sum(cost.layer_products(config, keys, dense=dense).values())
        assert total == pytest.approx(cost.forward_flops(config, 4096, logits=0) / 4096, rel=1e-12), name


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_the_real_ones(name):
    config = FAMILIES[name]

    def forward(params, tokens, positions, segments):
        decoder = parameters.decoder(config, params)
        hidden, _, _ = decoder.forward(tokens, Queries(positions, segments), Packed())
        return decoder.logits(hidden)

    counted = product_flops(jax.make_jaxpr(forward)(parameters.abstract(config).shapes, INTS, INTS, INTS))
    expected = sum(sum(products.values()) for products, _ in layers_as_run(config)) + head(config)
    assert counted == B * T * expected


def traced_step(config: ModelConfig):
    """The jaxpr of one real training step, optimizer and all, on one device."""
    steps = make_steps(config, OPTIM, TRAIN, make_mesh(MeshConfig(), jax.devices()[:1]), AxisRules())
    state = abstract_state(config, steps.optimizer, ema=False)
    return jax.make_jaxpr(steps.train)(state, Batch(INTS, INTS, FLOATS, INTS, INTS))


def expected_step(config: ModelConfig) -> float:
    total = 3 * head(config)
    for products, dense in layers_as_run(config):
        again = cost.recomputed_products(config, dense=dense)
        total += sum(flops * (3 + again[name]) for name, flops in products.items())
    return B * T * total


@pytest.mark.parametrize("remat", ["none", "dots", "minimal", "attention", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_real_one(name, remat):
    """Forward, twice it backward, and what the policy computes again."""
    config = dataclasses.replace(FAMILIES[name], remat=remat)
    assert product_flops(traced_step(config)) == pytest.approx(expected_step(config), rel=1e-12)


def kept_numbers(jaxpr, num_layers: int) -> int:
    """Numbers of [B, T, ...] that the first loop over layers stacks for the loop back."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == num_layers:
            stacked = [var.aval.shape[1:] for var in eqn.outvars[eqn.params["num_carry"] :]]
            return sum(math.prod(shape) for shape in stacked if shape[:2] == (B, T))
        for inner in inner_jaxprs(eqn.params):
            if found := kept_numbers(inner, num_layers):
                return found
    return 0


@pytest.mark.parametrize("remat", ["minimal", "attention", "full"])
@pytest.mark.parametrize("name", ["llama2_7b", "gpt2"])
def test_a_layer_keeps_what_the_real_one_stacks(name, remat):
    config = dataclasses.replace(FAMILIES[name], remat=remat, num_layers=5)
    traced = traced_step(config)
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=True)
    numbers = kept_numbers(jaxpr, 5)
    assert numbers == B * T * cost.kept_bytes(config, dense=True, number_bytes=1)
