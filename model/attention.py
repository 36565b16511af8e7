"""Grouped-query self-attention: projections, positions, and one question to a memory. Knows no cache."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.layers import RESIDUAL, TOGETHER, Key, Norm, Rope, add_bias, constant, matrix, product_of
from model.memory import Memory, Queries, Rule
from parallel.sharding import einsum, relaid


class Attention(nnx.Module):
    """Queries in N heads, keys and values in K heads of width H."""

    def __init__(self, config: ModelConfig, key: Key):
        q, k, v, o = jax.random.split(key, 4)
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        names, scale = ("embed", "heads", "head"), config.init_scale
        self.softcap, self.product = config.attention_softcap, product_of(config)
        self.query_scale = H**-0.5 if config.query_scale is None else config.query_scale
        self.q = matrix(q, (D, N, H), names, fan_in=D, scale=scale)
        self.k = matrix(k, (D, K, H), names, fan_in=D, scale=scale)
        self.v = matrix(v, (D, K, H), names, fan_in=D, scale=scale)
        depth_scale = scale * (2 * config.num_layers) ** -0.5
        self.o = matrix(o, (N, H, D), ("heads", "head", "embed"), fan_in=N * H, scale=depth_scale)
        has_bias, names = config.qkv_bias, ("heads", "head")
        self.q_bias = constant(0.0, (N, H), names) if has_bias else nnx.data(None)
        self.k_bias = constant(0.0, (K, H), names) if has_bias else nnx.data(None)
        self.v_bias = constant(0.0, (K, H), names) if has_bias else nnx.data(None)
        self.o_bias = constant(0.0, (D,), (None,)) if config.out_bias else nnx.data(None)
        self.q_norm = Norm(config, H) if config.qk_norm else nnx.data(None)
        self.k_norm = Norm(config, H) if config.qk_norm else nnx.data(None)

    def __call__(
        self, x: Float[Array, "B t D"], rope: Rope | None, window, queries: Queries, memory: Memory
    ) -> tuple[Float[Array, "B t D"], Memory]:
        """x and what comes out are laid out as RESIDUAL."""
        x, names = relaid(x, RESIDUAL, TOGETHER), ("batch", "seq", "act_heads", None)
        q = add_bias(einsum("BTD,DNH->BTNH", x, self.q[...], out=names, product=self.product), self.q_bias)
        k = add_bias(einsum("BTD,DKH->BTKH", x, self.k[...], out=names, product=self.product), self.k_bias)
        v = add_bias(einsum("BTD,DKH->BTKH", x, self.v[...], out=names, product=self.product), self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope.turn(q), rope.turn(k)
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        out, memory = memory.attend(q, k, v, queries, Rule(self.query_scale, self.softcap, window))
        out = einsum("BTNH,NHD->BTD", out, self.o[...], sums="act_heads", out=RESIDUAL, product=self.product)
        return add_bias(out, self.o_bias), memory
