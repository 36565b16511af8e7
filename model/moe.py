"""A mixture of experts in place of the FFN: router, chosen experts, shared experts, and how evenly they are used.

Nothing is dropped: a token goes through all A experts that it chose (model/experts.py).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.experts import Execution, Weights, apply_experts
from model.layers import RESIDUAL, TOGETHER, FeedForward, Key, constant, matrix
from parallel.sharding import added, manual_axes, num_copies, num_parts, relaid


class Aux(NamedTuple):
    """What training asks of a router besides its choice: sums over tokens that are not padding.

    Inside a shard_map each device has its share: they add up to the whole over all devices.
    """

    balance: Float[Array, ""]  # the number of tokens where experts are used evenly, more where they are not
    router_z: Float[Array, ""]  # squared log-sum-exp of the router's logits: eq. 5 of arXiv:2202.08906
    load: Float[Array, "E"]  # tokens that chose each expert


class Choice(NamedTuple):
    """A router's decision for each token."""

    chosen: Int[Array, "B T A"]  # experts
    gates: Float[Array, "B T A"]  # weights of their results
    scores: Float[Array, "B T E"]  # what it was taken from


class MoE(nnx.Module):
    """shared(x) + sum over the A experts of the router's choice of gate * expert(x)."""

    def __init__(self, config: ModelConfig, key: Key):
        self.config = config
        router, gate, up, down, shared = jax.random.split(key, 5)
        E, D, F = config.num_experts, config.embed_dim, config.expert_ffn_dim
        names, depth_scale = ("experts", "expert_embed", "expert_ffn"), (2 * config.num_layers) ** -0.5
        self.router = matrix(router, (D, E), ("embed", None), fan_in=D, scale=config.init_scale)
        has_bias = config.router == "sigmoid" or config.router_bias_rate > 0
        self.router_bias = constant(0.0, (E,), (None,)) if has_bias else nnx.data(None)
        self.gate = matrix(gate, (E, D, F), names, fan_in=D, scale=config.init_scale)
        self.up = matrix(up, (E, D, F), names, fan_in=D, scale=config.init_scale)
        back = ("experts", "expert_ffn", "expert_embed")
        self.down = matrix(down, (E, F, D), back, fan_in=F, scale=config.init_scale * depth_scale)
        wide = dataclasses.replace(config, ffn_dim=max(config.shared_ffn_dim, 1))
        self.shared = FeedForward(wide, shared) if config.shared_ffn_dim else nnx.data(None)

    def __call__(self, stream: Float[Array, "B t D"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, "B t D"], Aux]:
        """-> y, 0 from the experts where `mask` is False, and what the loss and the metrics need.

        `stream` and y are laid out as RESIDUAL.
        """
        x = relaid(stream, RESIDUAL, TOGETHER)
        E, A = self.config.num_experts, self.config.experts_per_token
        logits = jnp.einsum("BTD,DE->BTE", x, self.router[...].astype(x.dtype), preferred_element_type=jnp.float32)
        choice = choose(self.config, logits, None if self.router_bias is None else self.router_bias[...])
        chosen = jnp.where(mask[..., None], choice.chosen, E)  # padding goes nowhere
        weights = Weights(*(w[...].astype(x.dtype) for w in (self.gate, self.up, self.down)))
        axes, kernel = manual_axes("experts"), self.config.kernel
        how = Execution(E, self.config.activation, axes, self.config.expert_capacity, kernel, "weight")
        tokens, gates = x.reshape(-1, x.shape[-1]), choice.gates.reshape(-1, A)
        y = apply_experts(how, tokens, gates, chosen.reshape(-1, A), weights)
        y = added(y.reshape(x.shape), "expert_ffn", RESIDUAL)
        return y if self.shared is None else y + self.shared(stream), _aux(logits, choice, mask)


def choose(config: ModelConfig, logits: Float[Array, "B T E"], bias: Float[Array, "E"] | None) -> Choice:
    """The A experts of highest score, plus bias where there is one; gates are of scores alone.

    Softmax is over all experts; over the chosen alone is the same, normalized. Sigmoids, biases, and groups (those with
    the highest sum of their two best experts are left to choose from) as in section 2.1.2 of arXiv:2412.19437.
    """
    scores = jax.nn.sigmoid(logits) if config.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    ranked = jax.lax.stop_gradient(scores)
    if bias is not None:
        ranked = ranked + jax.lax.stop_gradient(bias).astype(jnp.float32)[None, None]
    if config.router_groups > 1:
        ranked = _within_top_groups(ranked, config.router_groups, config.router_top_groups)
    _, chosen = jax.lax.top_k(ranked, config.experts_per_token)
    gates = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.router_normalize or config.router == "softmax_after":
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    return Choice(chosen, gates * config.router_scale, scores)


def _within_top_groups(ranked: Float[Array, "B T E"], num_groups: int, num_kept: int) -> Float[Array, "B T E"]:
    """-inf for experts outside each token's best groups."""
    B, T, E = ranked.shape
    grouped = ranked.reshape(B, T, num_groups, E // num_groups)
    best, _ = jax.lax.top_k(grouped, min(2, E // num_groups))
    _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), num_kept)
    is_kept = jnp.any(kept[..., None] == jnp.arange(num_groups)[None, None, None], axis=2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(B, T, E)


def _aux(logits: Float[Array, "B T E"], choice: Choice, mask: Bool[Array, "B T"]) -> Aux:
    """Balance as in eq. 4 of arXiv:2101.03961, of each sequence by itself (eq. 17-20 of arXiv:2412.19437).

    sum over tokens and experts of probability * use, where use, an expert's share of the sequence's choices times E,
    is 1 if all are used evenly. A choice has no gradient, so use can be counted over all devices that have part of a
    sequence while each adds its own tokens: shares add up, and neither mesh nor microbatches change the sum.
    """
    *_, E = logits.shape
    valid = mask.astype(jnp.float32)
    is_chosen = (choice.chosen[..., None] == jnp.arange(E)[None, None, None]) & mask[..., None, None]
    load = jnp.sum(is_chosen, axis=(1, 2), dtype=jnp.float32)
    counted = jax.lax.psum(load, manual_axes("seq"))
    use = counted * E / jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1.0)
    probability = choice.scores / (jnp.sum(choice.scores, axis=-1, keepdims=True) + 1e-20)
    balance = jnp.einsum("BTE,BE,BT->", probability, use, valid)
    router_z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * valid)
    copies = num_copies() // num_parts(manual_axes("layers"))  # a layer is in one stage of a pipeline alone
    return jax.tree.map(lambda total: total / copies, Aux(balance, router_z, jnp.sum(load, axis=0)))


def updated_bias(bias: Float[Array, "... E"], load: Float[Array, "... E"], rate: float) -> Float[Array, "... E"]:
    """Biases after a step: up by `rate` where load was below the mean, down above; arXiv:2408.15664, algorithm 1.

    The balancing without an auxiliary loss of section 2.1.2 of arXiv:2412.19437.
    """
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def utilisation(load: Float[Array, "... E"]) -> dict[str, Float[Array, ""]]:
    """How evenly experts are used: the mean over layers, where there are some.

    max_load: the busiest expert's tokens over the mean expert's, 1 at best; unused: share of experts without a token.
    """
    mean = jnp.maximum(jnp.mean(load, axis=-1), 1e-9)
    busiest = jnp.mean(jnp.max(load, axis=-1) / mean)
    return {"max_load": busiest, "unused": jnp.mean((load == 0).astype(jnp.float32))}
