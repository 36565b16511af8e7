"""A mixture of experts in plain jnp, every expert computed for every token: a stand-in. Knows no mesh."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from model.config import ModelConfig
from model.layers import ACTIVATIONS, FeedForward, Key, constant, matrix


class Aux(NamedTuple):
    """What a layer's experts tell of themselves."""

    load: Float[Array, "E"]


class MoE(nnx.Module):
    """Stand-in."""

    def __init__(self, config: ModelConfig, key: Key):
        router, gate, up, down, shared = jax.random.split(key, 5)
        D, E, F, scale = config.embed_dim, config.num_experts, config.expert_ffn_dim, config.init_scale
        self.config, names = config, ("experts", "expert_embed", "expert_ffn")
        self.router = matrix(router, (D, E), ("embed", None), fan_in=D, scale=scale)
        self.router_bias = constant(0.0, (E,), (None,)) if config.router == "sigmoid" else nnx.data(None)
        self.gate = matrix(gate, (E, D, F), names, fan_in=D, scale=scale)
        self.up = matrix(up, (E, D, F), names, fan_in=D, scale=scale)
        names = ("experts", "expert_ffn", "expert_embed")
        self.down = matrix(down, (E, F, D), names, fan_in=F, scale=scale * (2 * config.num_layers) ** -0.5)
        width = dataclasses.replace(config, ffn_dim=config.shared_ffn_dim or 1)
        self.shared = FeedForward(width, shared) if config.shared_ffn_dim else nnx.data(None)

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, "B T D"], Aux]:
        weights = self._weights(jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), self.router[...]))
        act = ACTIVATIONS[self.config.activation]
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        h = act(jnp.einsum("BTD,EDF->BTEF", x, gate)) * jnp.einsum("BTD,EDF->BTEF", x, up)
        y = jnp.einsum("BTEF,EFD,BTE->BTD", h, down, weights.astype(x.dtype))
        return (y if self.shared is None else y + self.shared(x)), Aux(jnp.sum(weights, (0, 1)))

    def _weights(self, logits: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        config = self.config
        scores = jax.nn.sigmoid(logits) if config.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        ranked = scores if self.router_bias is None else scores + self.router_bias[...][None, None]
        if config.router_groups > 1:
            grouped = ranked.reshape(*ranked.shape[:2], config.router_groups, -1)
            best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
            kept = best >= jax.lax.top_k(best, config.router_top_groups)[0][..., -1:]
            ranked = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(ranked.shape)
        chosen = ranked >= jax.lax.top_k(ranked, config.experts_per_token)[0][..., -1:]
        weights = jnp.where(chosen, scores, 0.0)
        if config.router_normalize or config.router == "softmax_after":
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights * config.router_scale
